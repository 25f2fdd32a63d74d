"""Read biases that lie finished in a tensor the model keeps, however its code cuts them out.

What: tables [.., heads, .., keys] with a slope per head from every key to the next, all of it: whatever is cut out,
    and wherever the cut begins, is ALiBi up to a number per row, which softmax does not see. Tables mirrored at the
    diagonal whose cut begins at a corner. Distances to be multiplied by slopes, and tables with the mask in them.
How: the tensor itself is looked at, every entry, within the rounding of float32. What was found is a fact about it
    (facts.py); the slope is read off two of its entries whenever the graph runs.
Leaves alone: tables with one entry that is off, or rounded to fewer bits than make lines.
Cost: one look at every entry, once for all layers that read the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx

from grape_compile.encoding import Absolute, Distance, Signed
from grape_compile.passes.addends import AddendReader
from grape_compile.passes.causal import CausalMasks
from grape_compile.passes.elements import Reader, kept_by_mask
from grape_compile.passes.graph import Program, Role, Unreadable, op_name, require_fake
from grape_compile.passes.movement import SINGLE, operand_of
from grape_compile.passes.operands import Axis, Operand
from grape_compile.passes.plans import Miss
from grape_compile.passes.score_terms import NEVER, ScoreTerm, uniform
from grape_compile.passes.scores import BATCH, DEAD, HEAD, KEY, QUERY, Scores

_ROWS = 1024
"""Rows looked at together, in float64."""
_ROUNDING = 2.0**-21
"""Of an entry: eight times the rounding of float32, for the few roundings it is made with."""


@dataclass(frozen=True)
class TablePart:
    """number * prod(slopes) * (last - first) / steps: the rise of a finished table from `first` to `last`, by steps."""

    number: float
    first: Operand
    last: Operand
    steps: int
    slopes: tuple[Operand, ...] = ()
    distance: Distance = field(default_factory=Signed)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What may be a weight."""
        return self.slopes


@dataclass(frozen=True)
class Shape:
    """What all rows of a table are, and two entries of one row, `first` and `last`, that are not dead.

    `hides`: some entries are dead and no part of a line. `deep`: some of a line are low enough to pass for dead.
    """

    distance: Distance
    row: int
    first: int
    last: int
    hides: bool
    deep: bool


@dataclass(frozen=True)
class Table:
    """How a tensor is seen as rows of keys for each head: its axes, the places it is cut at, a number it is times.

    `past`: no query sees a later key.
    """

    heads: int | None
    queries: int | None
    keys: int
    fixed: tuple[tuple[int, int], ...]
    number: float
    past: bool = False

    def shape(self, tensor: Tensor, ends: Shape | None = None) -> Shape | None:
        """The shape of a tensor, with the entries of another's; None where it has none."""
        heads, square = self._heads(tensor), self.has_diagonal(tensor)
        if not heads.numel() or (self.past and not square):
            return None
        for distance in (Signed(), Absolute()) if square and not self.past else (Signed(),):
            found = ends or _ends(heads[0], self.number, distance, self.past)
            if found is None:
                continue
            hides = deep = False
            for rows in heads:  # one at a time: tables may be large
                told = _told(rows, self.number, found, distance, self.past)
                if told is None:
                    break
                hides, deep = hides or told[0], deep or told[1]
            else:
                return replace(found, distance=distance, hides=hides, deep=deep)
        return None

    def place(self, tensor: Tensor, row: int) -> dict[int, int]:
        """Where a row is, by axis."""
        fixed, at = dict(self.fixed), dict[int, int]()
        for axis in reversed(self._others(tensor)):
            size = 1 if axis in fixed else tensor.shape[axis]
            at[axis] = fixed.get(axis, row % size)
            row //= size
        return at

    def _others(self, tensor: Tensor) -> list[int]:
        return [axis for axis in range(tensor.dim()) if axis not in (self.heads, self.keys)]

    def has_diagonal(self, tensor: Tensor) -> bool:
        """Whether rows are those of queries, so that a diagonal is one."""
        left = set(self._others(tensor)) - {self.queries, *dict(self.fixed)}
        return self.queries is not None and all(tensor.shape[axis] == 1 for axis in left)

    def _heads(self, tensor: Tensor) -> Tensor:
        """[heads, rows, keys], where float64 is to be had."""
        for axis, place in self.fixed:
            tensor = tensor.narrow(axis, place, 1)
        order = [*([] if self.heads is None else [self.heads]), *self._others(tensor), self.keys]
        heads = tensor.permute(order) if self.heads is not None else tensor.permute(order)[None]
        heads = heads if heads.device.type in ("cpu", "cuda") else heads.cpu()
        return heads.reshape(heads.shape[0], -1, heads.shape[-1])


def _ends(rows: Tensor, number: float, distance: Distance, past: bool) -> Shape | None:
    """The entries farthest apart in one row, none beyond the diagonal where that tells rows apart."""
    alive = (rows * number > DEAD).to(torch.int8)
    if past or distance == Absolute():
        alive = alive.tril()
    first, last = alive.argmax(-1), rows.shape[-1] - 1 - alive.flip(-1).argmax(-1)
    apart = torch.where(alive.any(-1), last - first, 0)
    best = int(apart.argmax())
    return Shape(distance, best, int(first[best]), int(last[best]), False, False) if apart[best] > 0 else None


def _told(
    rows: Tensor, number: float, ends: Shape, distance: Distance, past: bool
) -> tuple[bool, bool] | None:
    """Whether rows with the rise between the ends hide keys, and reach as low; None where they are no lines."""
    if ends.row >= rows.shape[0] or ends.last >= rows.shape[1]:
        return None
    first, last = (rows[ends.row, end].double() * number for end in (ends.first, ends.last))
    if not (bool(first > DEAD) and bool(last > DEAD)):
        return None
    slope = (last - first) / (ends.last - ends.first)
    keys = torch.arange(rows.shape[1], device=rows.device)
    hides = deep = False
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS].double() * number
        queries = torch.arange(start, start + len(some), device=rows.device)[:, None]
        clock = -(keys - queries).abs() if distance == Absolute() else keys.expand(some.shape)
        seen = keys <= queries if past else torch.ones_like(some, dtype=torch.bool)
        alive = seen & (some > DEAD)
        near = some.abs().masked_fill(~alive, torch.inf).argmin(-1, keepdim=True)
        line = some.gather(-1, near) + slope * (clock - clock.gather(-1, near))
        on = some.isfinite() & ((some - line).abs() <= _ROUNDING * some.abs())
        if bool(((alive & ~on) | (seen & some.isnan())).any()):
            return None
        dead = seen & ~alive
        hides, deep = hides or bool((dead & ~on).any()), deep or bool((dead & on).any())
    return hides, deep


@dataclass(frozen=True)
class Lines:
    """The fact that a tensor has the shape another had, up to its slopes; `hidden`: it may hide keys."""

    table: Table
    wanted: Shape
    hidden: bool

    def __call__(self, tensor: Tensor) -> bool:
        found = self.table.shape(tensor, self.wanted)
        return (
            found is not None
            and found.distance == self.wanted.distance
            and not (found.deep if self.hidden else found.hides)
        )


def finished_table(
    scores: Scores, term: ScoreTerm, masks: list[ScoreTerm], *, stored: bool
) -> TablePart | Miss | None:
    """The bias that lies finished in one tensor, times slopes perhaps; `stored`: in an input of the graph only.

    What the table itself hides is added to the masks. None for what is no such tensor, a Miss for one with other
    numbers.
    """
    read = _factors(scores, term)
    if read is None or scores.layer.sinks is not None:
        return None
    number, view, slopes, frozen, filled = read
    program = scores.program
    is_known, is_stored = program.made_of(view.node) is not None, view.node.op != "call_function"
    if not (is_known or program.roles.get(view.node) is Role.BUFFER) or (stored and not is_stored):
        return None
    held = program.values[view.node] if view.node in program.kept else scores.replay.tensor(view.node)
    table = _seen(view, frozen, 1.0 if slopes else term.factor * number)
    cornered = not frozen and _from_one_corner(scores, view)
    if cornered and table.has_diagonal(held):
        table = replace(table, past=CausalMasks(scores, AddendReader(scores)).hide_the_future(masks))
    shape = scores.replay.once(table, [view.node], partial(table.shape, held))
    hidden = filled or any(mask.node is term.node and mask.finished for mask in masks)
    if shape is None or (shape.hides and slopes) or (shape.deep and (hidden or shape.hides)):
        return _off(view)
    if not is_known:
        return unknown(program, view.node, "biases")
    if shape.distance == Absolute() and not cornered:
        return None
    hidden = hidden or shape.hides
    if hidden and not any(mask.node is term.node and mask.finished for mask in masks):
        masks.append(replace(term, finished=True))
    if view.node in program.kept:
        scores.rely(view.node, Lines(table, shape, hidden))
    else:
        scores.rely_on_numbers([view.node])
    ends = [_entry(view, table.place(held, shape.row), place) for place in (shape.first, shape.last)]
    return TablePart(term.factor * number, ends[0], ends[1], shape.last - shape.first, slopes, shape.distance)


def _off(view: Operand) -> Miss:
    held = require_fake(view.node)
    return Miss(
        "table",
        f"the finished biases, {list(held.shape)} of {str(held.dtype).removeprefix('torch.')}, are not one slope per "
        "head everywhere: an entry is off the line by more than the rounding of float32, or as low as a mask",
        3,
        "ALiBi at every entry of the table",
    )


def unknown(program: Program, node: fx.Node, what: str) -> Miss:
    """Why numbers of a value may not be read."""
    cause = program.unknown_behind(node)
    stored = cause is None or cause is node or program.roles.get(cause) is Role.BUFFER
    if stored:
        told = (
            "they are kept in a tensor that may change unseen (an argument, what the graph writes to, a buffer of an "
            "exported program that a state dict may replace): keep them with persistent=False"
        )
    elif cause in program.roles:
        told = f"the input {cause} is in them, which is another in the next call: add masks by themselves"
    else:
        told = "their size is known in a call alone: keep them in a buffer, all of them, and cut out what a call needs"
    return Miss(
        "buffer",
        f"the finished {what} are read off their numbers, but {told}, or make them from slopes and positions in the "
        "forward pass",
        3,
        "ALiBi computed from its slopes",
    )


def _factors(
    scores: Scores, term: ScoreTerm
) -> tuple[float, Operand, tuple[Operand, ...], bool, bool] | None:
    """A number, a table along the keys, slopes, whether the table is cut where the captured sizes say, and filled."""
    lead, index, rows = scores.samples(term)
    reader = Reader(scores.program, scores.replay, alive=True)
    try:
        terms = reader.position(term.node, index, rows)
    except Unreadable:
        return None
    if len(terms) != 1 or len(terms[0].rows) != len(rows):
        return None
    fills = _fills(scores.program, term.node)
    if len(fills) != len(reader.fills) or any(
        value is None or value * term.factor > NEVER for value in fills
    ):
        return None
    number, views = terms[0].constant(), [scores.view(factor, lead) for factor in terms[0].factors]
    tables = [view for view in views if view is not None and KEY in view.token_axes]
    slopes = tuple(view for view in views if view is not None and set(view.token_axes) <= {BATCH, HEAD})
    if number is None or len(tables) != 1 or len(tables) + len(slopes) != len(views) or (fills and slopes):
        return None
    (table,) = tables
    along = {axis.role: axis for axis in table.axes}
    heads = [axis for view in (table, *slopes) for axis in view.axes if axis.role == HEAD]
    moved = reader.frozen and any((axis.offset, axis.stride) != (0, 1) for axis in heads)
    parts = any(axis.is_part for axis in table.axes)
    if table.part != "value" or BATCH in along or along[KEY].stride != 1 or moved or parts:
        return None
    return number, table, slopes, reader.frozen, bool(fills)


def _fills(program: Program, node: fx.Node) -> list[float | None]:
    """What entries of a value were filled with last, moved about since and not otherwise changed."""
    found: list[float | None] = []
    while (filled := kept_by_mask(node)) is not None or op_name(node) in SINGLE:
        if filled is not None:
            found.append(uniform(filled[1], program))
        node = filled[0] if filled is not None else operand_of(node, 0)
    return found


def _seen(view: Operand, frozen: bool, number: float) -> Table:
    """Places that the captured sizes alone tell are no places: all rows count."""
    roles = [axis.role for axis in view.axes]
    places = {role: roles.index(role) for role in (HEAD, QUERY, KEY) if role in roles}
    fixed = () if frozen else tuple((dim, a.offset) for dim, a in enumerate(view.axes) if a.role == "fixed")
    return Table(places.get(HEAD), places.get(QUERY), places[KEY], fixed, number)


def _from_one_corner(scores: Scores, view: Operand) -> bool:
    """Whether query and key are counted from the same entry on."""
    along = {axis.role: axis for axis in view.axes}
    if QUERY not in along or not scores.is_square:
        return False
    query, key = along[QUERY], along[KEY]
    return (query.offset, query.stride) == (key.offset, key.stride)


def _entry(view: Operand, at: dict[int, int], key: int) -> Operand:
    """One entry of a table for every head."""
    axes = (
        axis if axis.role in (HEAD, KEY) else Axis("fixed", at[dim]) for dim, axis in enumerate(view.axes)
    )
    whole = (replace(axis, offset=0) if axis.role == KEY else axis for axis in axes)
    return at_key(replace(view, axes=tuple(whole)), key)


def at_key(view: Operand, key: int) -> Operand:
    """A view along the keys at one of them."""
    axes = (
        Axis("fixed", axis.offset + axis.stride * key) if axis.role == KEY else axis for axis in view.axes
    )
    return replace(view, axes=tuple(axes))
