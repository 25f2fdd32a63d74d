"""Name a bias by its values, where the model multiplies slope and clock out of sight of a structural reading.

What: one term that is affine in the key, row by row at the captured size (or mirrored at the query), and is a
    product of a slope and a value that counts keys; or a table that is finished (finished_tables.py).
Leaves alone: everything that depends on activations, and sums of several biases.
Cost: one evaluation of the term in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from grape_compile.encoding import Absolute, Distance, Signed
from grape_compile.passes.bias_parts import BiasPart
from grape_compile.passes.clocks import counted_by, counts, is_given
from grape_compile.passes.elements import Reader
from grape_compile.passes.finished_tables import TablePart, at_key, finished_table, unknown
from grape_compile.passes.graph import Program, Taint, Unreadable
from grape_compile.passes.operands import Operand
from grape_compile.passes.plans import Miss
from grape_compile.passes.score_terms import ScoreTerm
from grape_compile.passes.scores import BATCH, DEAD, HEAD, KEY, QUERY, Scores, last_row
from grape_compile.passes.terms import Factor, Index, Term

_AFFINE = 1e-6


def evaluated(
    scores: Scores, biases: list[ScoreTerm], masks: list[ScoreTerm]
) -> list[BiasPart | TablePart] | Miss:
    """The one bias that a term without activations is. What the bias itself hides is added to the masks."""
    learned = next((term for term in biases if _is_learned(scores.program, term.node)), None)
    if len(biases) > 1:
        if learned is not None:
            return _miss(scores, learned)
        return Miss("terms", f"{len(biases)} biases are added to the scores of one layer", 2)
    stored = finished_table(scores, biases[0], masks, stored=True)
    if isinstance(stored, TablePart):
        return [stored]
    found = _Term(scores, biases[0], masks).part()
    return stored if isinstance(found, Miss) and stored is not None else found


class _Term:
    def __init__(self, scores: Scores, term: ScoreTerm, masks: list[ScoreTerm]) -> None:
        self.scores, self.term, self.masks = scores, term, masks
        self.program, self.looked_at = scores.program, list(masks)
        if scores.is_static and self.program.taints[term.node] is Taint.STRUCTURE:
            # What another call may leave in sight has to be right as well.
            self.looked_at = [mask for mask in masks if scores.are_known([mask])]
        self.alive, self.apart = scores.alive(self.looked_at), False

    def part(self) -> list[BiasPart | TablePart] | Miss:
        """The bias; what its numbers and those of the masks have shown is relied on."""
        found = self._part()
        if not isinstance(found, Miss):
            self.scores.rely_on_numbers(mask.node for mask in self.looked_at)
        return found

    def _part(self) -> list[BiasPart | TablePart] | Miss:
        scores, term = self.scores, self.term
        value = scores.value(term).clamp_min(-1e30)
        distance = self._distance(value)
        if distance is None:
            return _miss(scores, term)
        views = self._views()
        if views is None:
            return self._table(distance)
        number, slopes, clock = views
        if QUERY in clock.token_axes or isinstance(distance, Absolute):
            if not scores.is_static:
                return Miss(
                    "sizes",
                    "a matrix of distances of symbolic size is not proved from one length",
                    3,
                    "ALiBi by absolute distance" if isinstance(distance, Absolute) else "ALiBi",
                )
            if self.program.made_of(clock.node) is None:
                return unknown(self.program, clock.node, "distances")
            scores.rely_on_numbers([clock.node])
        if isinstance(distance, Absolute):
            sign = -1.0 if float(scores.aligned(clock).max()) > 0 else 1.0
            return [BiasPart(term.factor * number * sign, (slopes,), distance=Absolute())]
        given = is_given(clock.node)
        stride = next(axis.stride for axis in clock.axes if axis.role == KEY)
        steps = counted_by(clock.node) if clock.token_axes == (KEY,) and stride == 1 else None
        if steps is not None:
            return [BiasPart(term.factor * number * steps, (slopes,))]
        if not given and not (self._unit(clock) and self._counting(clock)):
            return Miss(
                "steps",
                "the slope is multiplied by something that does not count keys one by one",
                3,
                "ALiBi at every key position",
            )
        clock = last_row(clock, scores.shape[QUERY])
        number *= term.factor
        if not given and self._falls(clock):
            clock, number = replace(clock, scale=-1.0), -number
        return [BiasPart(number, (slopes,), clock, given=given)]

    def _distance(self, value: Tensor) -> Distance | None:
        """Signed when every row is affine in the key, Absolute when it is mirrored at the query; one slope per head."""
        alive = self.alive
        _, _, queries, keys = self.scores.shape
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

    def _views(self) -> tuple[float, Operand, Operand] | None:
        """Slope and clock as operands, when the term is a product of the two."""
        lead, index, rows = self.scores.samples(self.term)
        reader = Reader(self.program, self.scores.replay, alive=True)
        for read in (reader.position, reader.product):
            found = _factors(read, self.term.node, index, rows)
            if found is None:
                continue
            number, factors = found
            views = [self.scores.view(factor, lead) for factor in factors]
            if views[0] is None or views[1] is None:
                self.apart = True
                continue
            slopes, clock = (views[0], views[1]) if KEY in views[1].token_axes else (views[1], views[0])
            if reader.frozen and not _shiftable(slopes, clock):
                continue
            if reader.masked and not (
                self.scores.is_static and self.program.taints[self.term.node] is Taint.STRUCTURE
            ):
                continue
            if (
                set(slopes.token_axes) <= {BATCH, HEAD}
                and KEY in clock.token_axes
                and HEAD not in clock.token_axes
            ):
                return number, slopes, clock
        return None

    def _counting(self, clock: Operand) -> bool:
        """A clock that counts whatever it is given, or one made of constants alone, seen whole."""
        return self.program.is_constant(clock.node) or counts(self.program, clock)

    def _unit(self, clock: Operand) -> bool:
        """Live keys of a row are one step apart."""
        value = self.scores.aligned(clock)
        rises = value[..., 1:] - value[..., :-1]
        both = self.alive[..., 1:] & self.alive[..., :-1] if self.alive.shape[-1] > 1 else self.alive
        shape = torch.broadcast_shapes(rises.shape, both.shape)
        return bool((rises.abs().expand(shape)[both.expand(shape)] == 1).all())

    def _falls(self, clock: Operand) -> bool:
        """A clock that counts down from key to key (`t - j`)."""
        value = self.scores.aligned(clock)
        rises = value[..., 1:] - value[..., :-1]
        return bool((rises < 0).sum() > (rises > 0).sum())

    def _table(self, distance: Distance) -> list[BiasPart | TablePart] | Miss:
        """A finished table: the slope is read off all of it, or off the last row of the one cut there is."""
        scores, program, node = self.scores, self.program, self.term.node
        whole = finished_table(scores, self.term, self.masks, stored=False)
        if isinstance(whole, TablePart):
            return [whole]
        if program.made_of(node) is None and self.apart:
            return Miss(
                "product",
                "the bias is a product of which one side does not lie along the axes of the scores, as do slopes that "
                "are kept in another order than the heads: keep one for each head, in their order",
                3,
                "ALiBi",
            )
        if program.made_of(node) is None:
            return unknown(program, node, "biases")
        keys = scores.shape[KEY]
        if isinstance(distance, Absolute) or keys < 2:
            return Miss(
                "product",
                "the bias is affine in the key, but slope and position cannot be told apart",
                3,
                "ALiBi",
            )
        lead, index, _ = scores.samples(self.term)
        view = scores.view(Factor(node, index), lead)
        if view is None:
            return Miss(
                "product", "the table of biases is not regular enough to be handed to an operator", 3, "ALiBi"
            )
        scores.rely_on_numbers([node])
        row = last_row(view, scores.shape[QUERY])
        return [TablePart(self.term.factor, at_key(row, 0), at_key(row, keys - 1), keys - 1)]


def _miss(scores: Scores, term: ScoreTerm) -> Miss:
    if _is_learned(scores.program, term.node):
        return Miss(
            "table", "the bias is looked up in a learned table of relative positions: it has no slope", 2
        )
    value = scores.value(term).clamp_min(-1e30)
    steps = value[..., 1:] - value[..., :-1]
    spread = float((steps.amax(-1) - steps.amin(-1)).max())
    return Miss(
        "affine",
        f"the bias is not one slope per head times the key position: from one key to the next it changes by "
        f"amounts that differ by up to {spread:.3g} within a row",
        3,
        "ALiBi: a bias that changes by the same slope from every key to the next",
    )


def _is_learned(program: Program, node: fx.Node) -> bool:
    """A value made of weights, directly or by looking them up."""
    seen, stack = {node}, [node]
    while stack:
        step = stack.pop()
        if program.taints[step] is Taint.PARAMETER:
            return True
        new = [operand for operand in step.all_input_nodes if operand not in seen]
        seen.update(new)
        stack += new
    return False


def _factors(
    read: Callable[[fx.Node, Index, Tensor], list[Term]], node: fx.Node, index: Index, rows: Tensor
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


def _shiftable(slopes: Operand, clock: Operand) -> bool:
    """An offset known for the captured sizes only does no harm to a count of the keys: softmax ignores it."""
    counting = clock.token_axes == (KEY,) and counted_by(clock.node) is not None
    return counting and all(axis.offset == 0 and axis.stride == 1 for axis in slopes.axes)
