"""Find additive position biases by what softmax can see.

What: attention layers whose scores carry slope_h * clock_j off the mask, up to a constant per row (GRAPE 4.2): softmax
    ignores the constant, so `slope * j` and `slope * (j - t)` are one bias.
How: the terms added to the scores are read in fp64 at the captured size, every row of them; slope and clock are
    followed back to the values the model multiplies.
Leaves alone: buckets, saturating tables, slopes that differ per key, anything behind a non-linear operation.
Cost: one evaluation per distinct term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from grape_compile.encoding import Absolute, Distance, Signed
from grape_compile.passes.attention import Attention, ScoreTerm, find_attention
from grape_compile.passes.clocks import counted_by, counts, is_given
from grape_compile.passes.elements import Reader
from grape_compile.passes.graph import Program, Sizes, Taint, Unreadable, require_fake
from grape_compile.passes.movement import is_symbolic
from grape_compile.passes.operands import Axis, Operand, fit
from grape_compile.passes.plans import Miss
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Factor, Index, Term, broadcast

DEAD = -1e4
"""An added value this low marks a dead entry."""
NEVER = -1e9
"""A value this low removes an entry whatever the scores are; only such a mask may be replaced by `is_causal`."""
_AFFINE = 1e-6
_BATCH, _HEAD, _QUERY, _KEY = range(4)


@dataclass(frozen=True)
class BiasPlan:
    """A bias found: `slopes` [B, H] to multiply by `clock` [B, Tk] or, where that is None, by the number of the key.

    `table` holds finished biases [B, H, Tk] instead, for slopes to be taken from.
    """

    layer: Attention
    masks: tuple[ScoreTerm, ...]
    slopes: Operand | None
    clock: Operand | None
    table: Operand | None
    distance: Distance
    number: float
    given: bool
    is_causal: bool
    window: int | None


def detect_biases(program: Program) -> tuple[list[BiasPlan], list[tuple[fx.Node, Miss]]]:
    """All additive biases of a program, and the layers with a position-dependent bias of another form."""
    plans: list[BiasPlan] = []
    misses: list[tuple[fx.Node, Miss]] = []
    replay = Replay(program)
    for layer in find_attention(program):
        try:
            result = _Layer(program, replay, layer).plan()
        except Unreadable as reason:
            result = Miss("readable", f"what is added to the scores cannot be read: {reason}", 1)
        if isinstance(result, BiasPlan):
            plans.append(result)
        elif result is not None:
            misses.append((layer.softmax, result))
    return plans, misses


class _Layer:
    def __init__(self, program: Program, replay: Replay, layer: Attention) -> None:
        self.program, self.replay, self.layer = program, replay, layer
        self.sizes = Sizes()
        self.shape = self._shape()

    def _shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, queries, keys."""
        query, value = self.sizes.shape(self.layer.query), self.sizes.shape(self.layer.value)
        if len(query) == 4:
            batch, heads, queries = (self.sizes(self.layer.size("query", axis)) for axis in range(3))
            return batch, heads, queries, self.sizes(self.layer.size("value", 2))
        if self.layer.batch_heads is None:
            return 1, query[0], query[1], value[-2]
        batch, heads = (self.sizes(size) for size in self.layer.batch_heads)
        return batch, heads, query[1], value[-2]

    def plan(self) -> BiasPlan | Miss | None:
        if 0 in self.shape:
            return None
        masks, biases = self._split()
        if not biases:
            return None
        if self.layer.obstacle:
            return Miss("attention", f"the layer adds a position bias, but {self.layer.obstacle}", 3)
        if len(biases) > 1:
            if any(self._is_learned(term.node) for term in biases):
                return self._miss(
                    next(term for term in biases if self._is_learned(term.node)), self.value(biases[0])
                )
            return Miss("terms", f"{len(biases)} biases are added to the scores of one layer", 2)
        alive = self._alive(masks)
        return self._affine(biases[0], alive, masks)

    # -- masks and biases apart ----------------------------------------------------------------------------------------

    def _split(self) -> tuple[list[ScoreTerm], list[ScoreTerm]]:
        masks, biases = [], []
        for term in self.layer.terms:
            if term.dead is not None:
                masks.append(term)
                continue
            value = self.value(term)
            live = value[value > DEAD]
            if live.numel() == 0 or bool((live == 0).all()):
                masks.append(term)
            elif bool((value <= DEAD).any()):
                masks.append(replace(term, finished=True))
                biases.append(term)
            elif value.shape[-1] > 1 and bool((value != value[..., :1]).any()):
                biases.append(term)
        return masks, biases

    def value(self, term: ScoreTerm) -> Tensor:
        """What a term adds, with four axes: [B or 1, H or 1, Tq or 1, Tk or 1], without its factor."""
        return self.unfolded(term, self.replay.tensor(term.node))

    def unfolded(self, term: ScoreTerm, value: Tensor) -> Tensor:
        if self.layer.is_folded(term):
            batch, heads = self.shape[:2]
            while value.dim() < 3:
                value = value.unsqueeze(0)
            return (
                value.unsqueeze(0) if value.shape[0] == 1 else value.reshape(batch, heads, *value.shape[1:])
            )
        while value.dim() < 4:
            value = value.unsqueeze(0)
        return value

    def _alive(self, masks: list[ScoreTerm]) -> Tensor:
        """Entries a query can see."""
        alive = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        if self.layer.is_causal:
            alive = torch.ones(self.shape[_QUERY], self.shape[_KEY], dtype=torch.bool).tril()[None, None]
        for term in masks:
            value = self.value(term)
            dead = value.bool() == term.dead if term.dead is not None else value * term.factor <= DEAD
            alive = alive & ~dead
        return alive

    # -- the bias ------------------------------------------------------------------------------------------------------

    def _affine(self, term: ScoreTerm, alive: Tensor, masks: list[ScoreTerm]) -> BiasPlan | Miss:
        causal, window = self._causal(alive, masks)
        plan = BiasPlan(
            self.layer, tuple(masks), None, None, None, Signed(), term.factor, False, causal, window
        )
        value = self.value(term).clamp_min(-1e30)
        distance = self._distance(value, alive)
        if distance is None:
            return self._miss(term, value)
        views = self._views(term)
        if views is None:
            return self._table(plan, term, distance)
        number, slopes, clock = views
        given = is_given(clock.node)
        steps = counted_by(clock.node) if clock.token_axes == (_KEY,) and _stride(clock, _KEY) == 1 else None
        if steps is not None and isinstance(distance, Signed):
            return replace(plan, slopes=slopes, number=term.factor * number * steps, distance=distance)
        if not given and not (
            (self._unit(clock, alive) and self._counting(clock)) or isinstance(distance, Absolute)
        ):
            return Miss(
                "steps",
                "the slope is multiplied by something that does not count keys one by one",
                3,
                "ALiBi at every key position",
            )
        if isinstance(distance, Absolute) and any(
            is_symbolic(size) for size in require_fake(self.layer.query).shape
        ):
            return Miss(
                "sizes",
                "a mirrored bias of symbolic length cannot be proved from one length",
                3,
                "ALiBi by absolute distance",
            )
        return replace(
            plan, slopes=slopes, clock=clock, number=term.factor * number, distance=distance, given=given
        )

    def _distance(self, value: Tensor, alive: Tensor) -> Distance | None:
        """Signed when every row is affine in the key, Absolute when it is mirrored at the query; one slope per head."""
        _, _, queries, keys = self.shape
        rises = value[..., 1:] - value[..., :-1] if value.shape[-1] > 1 else value[..., :0]
        both = (alive[..., 1:] & alive[..., :-1]) if alive.shape[-1] > 1 else alive
        shape = torch.broadcast_shapes(rises.shape, both.shape)
        if torch.Size(shape).numel() == 0:
            return Signed()
        seen, steps = both.expand(shape), rises.expand(shape)
        scale = _AFFINE * float(torch.where(value > DEAD, value, 0.0).abs().max())
        high = torch.where(seen, steps, -torch.inf).amax(dim=(-2, -1))
        low = torch.where(seen, steps, torch.inf).amin(dim=(-2, -1))
        if bool(((high - low)[torch.isfinite(high)] <= scale).all()):
            return Signed()
        if queries != keys:
            return None
        offset = torch.arange(keys) - torch.arange(queries)[:, None]
        mirrored = torch.where(offset[:, :-1] < 0, steps, -steps)
        high = torch.where(seen, mirrored, -torch.inf).amax(dim=(-2, -1))
        low = torch.where(seen, mirrored, torch.inf).amin(dim=(-2, -1))
        return Absolute() if bool(((high - low)[torch.isfinite(high)] <= scale).all()) else None

    def _miss(self, term: ScoreTerm, value: Tensor) -> Miss:
        if self._is_learned(term.node):
            return Miss(
                "table", "the bias is looked up in a learned table of relative positions: it has no slope", 2
            )
        steps = value[..., 1:] - value[..., :-1]
        spread = float((steps.amax(-1) - steps.amin(-1)).max())
        return Miss(
            "affine",
            f"the bias is not one slope per head times the key position: from one key to the next it changes by "
            f"amounts that differ by up to {spread:.3g} within a row",
            3,
            "ALiBi: a bias that changes by the same slope from every key to the next",
        )

    def _is_learned(self, node: fx.Node) -> bool:
        """A value made of weights, directly or by looking them up."""
        seen, stack = {node}, [node]
        while stack:
            step = stack.pop()
            if self.program.taints[step] is Taint.PARAMETER:
                return True
            new = [operand for operand in step.all_input_nodes if operand not in seen]
            seen.update(new)
            stack += new
        return False

    def _views(self, term: ScoreTerm) -> tuple[float, Operand, Operand] | None:
        """Slope and clock as operands, when the term is a product of the two."""
        lead, index, rows = self._samples(term)
        reader = Reader(self.program, self.replay, alive=True)
        for read in (reader.position, reader.product):
            found = self._factors(read, term.node, index, rows)
            if found is None:
                continue
            number, factors = found
            views = [self._view(factor, lead) for factor in factors]
            if views[0] is None or views[1] is None:
                continue
            slopes, clock = (views[0], views[1]) if _KEY in views[1].token_axes else (views[1], views[0])
            if reader.frozen and not self._shiftable(slopes, clock):
                continue
            if (
                set(slopes.token_axes) <= {_BATCH, _HEAD}
                and _KEY in clock.token_axes
                and _HEAD not in clock.token_axes
            ):
                return number, slopes, clock
        return None

    def _shiftable(self, slopes: Operand, clock: Operand) -> bool:
        """An offset known for the captured sizes only does no harm to a count of the keys: softmax ignores it."""
        counting = clock.token_axes == (_KEY,) and counted_by(clock.node) is not None
        return counting and all(axis.offset == 0 and axis.stride == 1 for axis in slopes.axes)

    def _factors(
        self, read: Callable[[fx.Node, Index, Tensor], list[Term]], node: fx.Node, index: Index, rows: Tensor
    ) -> tuple[float, tuple[Factor, ...]] | None:
        """A number and exactly two elements whose product a term is, for every sampled row."""
        try:
            terms = read(node, index, rows)
        except Unreadable:
            return None
        if len(terms) != 1 or len(terms[0].rows) != len(rows) or len(terms[0].factors) != 2:
            return None
        number = terms[0].constant()
        return None if number is None else (number, terms[0].factors)

    def _samples(self, term: ScoreTerm) -> tuple[Index, Index, Tensor]:
        """Sampled (batch, head, query, key), and the element of the term each of them sees."""
        choices = [
            torch.tensor(sorted({0, 1, size // 2, size - 1} & set(range(size)))) for size in self.shape
        ]
        grid = torch.cartesian_prod(*choices).reshape(-1, 4)
        lead = tuple(grid[:, axis] for axis in range(4))
        shape = self.sizes.shape(term.node)
        full: Index = lead
        if self.layer.is_folded(term):
            full = (lead[0] * self.shape[_HEAD] + lead[1], lead[2], lead[3])
        return lead, broadcast(full, shape), torch.arange(len(grid))

    def _view(self, factor: Factor, lead: Index) -> Operand | None:
        if factor.part not in ("value", "reciprocal"):
            return None
        node = self.program.representative(factor.node)
        plane = torch.zeros_like(lead[0])
        axes = fit(self.program, node, factor.index, lead, plane, self.sizes, (*self.shape, 1))
        return None if axes is None else Operand(node, axes, factor.part)

    def _counting(self, clock: Operand) -> bool:
        """A clock that counts whatever it is given, or one made of constants alone, seen whole."""
        return self.program.is_constant(clock.node) or counts(self.program, clock)

    def _unit(self, clock: Operand, alive: Tensor) -> bool:
        """Live keys of a row are one step apart."""
        value = self._aligned(clock)
        rises = value[..., 1:] - value[..., :-1]
        both = alive[..., 1:] & alive[..., :-1] if alive.shape[-1] > 1 else alive
        shape = torch.broadcast_shapes(rises.shape, both.shape)
        return bool((rises.abs().expand(shape)[both.expand(shape)] == 1).all())

    def _aligned(self, clock: Operand) -> Tensor:
        """The clock with axes batch, head, query, key."""
        value = self.replay.tensor(clock.node)
        kept: list[int] = []
        for dimension in reversed(range(len(clock.axes))):
            axis = clock.axes[dimension]
            if axis.role == "fixed":
                value = value.select(dimension, axis.offset)
                continue
            kept.insert(0, int(axis.role))
            count = self.shape[int(axis.role)]
            value = value.index_select(dimension, axis.offset + axis.stride * torch.arange(count))
        value = value.permute([kept.index(role) for role in sorted(kept)])
        for role in range(4):
            if role not in kept:
                value = value.unsqueeze(role)
        return value.double()

    def _table(self, plan: BiasPlan, term: ScoreTerm, distance: Distance) -> BiasPlan | Miss:
        """A finished table: the slope is taken from its last row."""
        if not self.program.is_constant(term.node):
            return Miss(
                "buffer",
                "the finished biases are kept in a tensor that may change after compilation",
                3,
                "ALiBi computed from its slopes",
            )
        if isinstance(distance, Absolute) or self.shape[_KEY] < 2:
            return Miss(
                "product",
                "the bias is affine in the key, but slope and position cannot be told apart",
                3,
                "ALiBi",
            )
        lead, index, _ = self._samples(term)
        view = self._view(Factor(term.node, index), lead)
        if view is None:
            return Miss(
                "product", "the table of biases is not regular enough to be handed to an operator", 3, "ALiBi"
            )
        return replace(plan, table=last_row(view, self.shape[_QUERY]), distance=distance)

    def _causal(self, alive: Tensor, masks: list[ScoreTerm]) -> tuple[bool, int | None]:
        """Whether the masks are exactly lower-right causal (and a window) for the only size the graph can run at."""
        _, _, queries, keys = self.shape
        if not masks:
            return self.layer.is_causal, None
        if self.layer.is_causal or any(self.program.taints[term.node] > Taint.STRUCTURE for term in masks):
            return False, None
        for term in masks:
            if any(not isinstance(size, int) for size in require_fake(term.node).shape):
                return False, None
            lowest = self.value(term) * term.factor
            if (term.dead is None and bool(((lowest <= DEAD) & (lowest > NEVER)).any())) or (
                term.dead is not None and term.value > NEVER
            ):
                return False, None
        offset = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
        seen = alive[..., -1, :].expand(*alive.shape[:-2], keys).sum(-1)
        window = int(seen.max())
        wanted = (offset <= 0) & (offset > -window)
        if not bool((alive == wanted).all()) or alive.shape[-2:] != wanted.shape:
            return False, None
        return True, None if window >= keys else window


def added_rows(program: Program, replay: Replay, layer: Attention, queries: list[int]) -> Tensor:
    """Everything the model adds to the scores of some queries, in fp64: [B or 1, H or 1, queries, Tk]; dead is -inf."""
    reading = _Layer(program, replay, layer)
    total = torch.zeros(1, 1, len(queries), reading.shape[_KEY], dtype=torch.float64)
    if layer.is_causal:
        future = torch.arange(reading.shape[_KEY]) > torch.tensor(queries)[:, None]
        total = total.masked_fill(future, -torch.inf)
    for term in layer.terms:
        value = reading.value(term)
        value = value[:, :, queries] if value.shape[_QUERY] > 1 else value
        if term.dead is not None:
            total = torch.where(value.bool() == term.dead, -torch.inf, total)
        else:
            added = value * term.factor
            total = total + torch.where(added <= DEAD, -torch.inf, added)
    return total


def _stride(view: Operand, role: int) -> int:
    return next(axis.stride for axis in view.axes if axis.role == role)


def last_row(view: Operand, queries: int) -> Operand:
    """The view with its query axis fixed at the last query, which sees every key."""
    axes = tuple(
        Axis("fixed", axis.offset + axis.stride * (queries - 1)) if axis.role == _QUERY else axis
        for axis in view.axes
    )
    return replace(view, axes=axes)
