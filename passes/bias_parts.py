"""Name what is added to the scores: which biases of the algebra a polynomial of addends is the sum of.

What softmax ignores is ignored here too: an addend without the key is a constant of its row. The others are

    slope_h * clock_j                                            a bias by a clock (GRAPE 4.2, App. C, 5)
    slope_h * gate_t * clock_j                                   the same under a gate of the query (GRAPE 4.6)
    slope_h * gate_j * clock_j  -  slope_h * gate_j * clock_t    the same under a gate of the key
    -slope_h * |clock_j - clock_t|, with or without gates        a mirrored bias

    -slope_h * |place_j - place_t| on several axes               a distance (GRAPE App. G)

path integrals (paths.py) apart, anything else is no bias of the algebra. A clock counts keys, is given, or is a running
sum; a gate is an activation, and no running sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from grape_compile.encoding import Absolute, Distance, Euclidean, Signed
from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.causal import CausalMasks, same_count
from grape_compile.passes.clocks import is_positional, never_falls
from grape_compile.passes.distances import cut_off, places_of
from grape_compile.passes.graph import Program, Role, Taint, Unreadable, op_name
from grape_compile.passes.key_clocks import Clock, KeyClocks
from grape_compile.passes.movement import operand_of
from grape_compile.passes.operands import Operand
from grape_compile.passes.paths import PathPart, Paths
from grape_compile.passes.plans import Miss
from grape_compile.passes.score_terms import ScoreTerm
from grape_compile.passes.scores import HEAD, KEY, Scores, as_key
from grape_compile.passes.terms import Index


@dataclass(frozen=True)
class HeadSlopes:
    """`number` times a product of slopes, in the heads `only`."""

    only: tuple[int, ...]
    number: float
    slopes: tuple[Operand, ...]


@dataclass(frozen=True)
class BiasPart:
    """number * prod(slopes) * gate * distance(clock_j, clock_t).

    `clock` sees the keys; None counts them. Where `inclusive` is not None it is the rate of a running sum. `given`
    marks positions the model is given. `places` are positions on several axes, for a distance between them. `only` are
    the heads this is added in, where not in all; of a bias that is put together head by head each has its own number
    and slopes `by_head`, and heads of which none has are not biased.
    """

    number: float
    slopes: tuple[Operand, ...]
    clock: Operand | None = None
    inclusive: bool | None = None
    gate_query: Operand | None = None
    gate_key: Operand | None = None
    distance: Distance = field(default_factory=Signed)
    given: bool = False
    places: tuple[Operand, ...] = ()
    only: tuple[int, ...] = ()
    by_head: tuple[HeadSlopes, ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything this is made of."""
        apart = (view for each in self.by_head for view in each.slopes)
        views = (*self.slopes, *apart, self.clock, self.gate_query, self.gate_key, *self.places)
        return tuple(view for view in views if view is not None)


class Namer:
    """Names the addends of one layer. `alive` are the entries its masks leave."""

    def __init__(
        self,
        scores: Scores,
        reader: AddendReader,
        lead: Index,
        alive: torch.Tensor,
        masks: Sequence[ScoreTerm],
    ) -> None:
        self.scores, self.reader, self.lead, self.alive, self.masks = scores, reader, lead, alive, masks
        self.program, self.causal = scores.program, CausalMasks(scores, reader)
        self.paths = Paths(scores, reader, lead, masks, self.causal)

    def parts(self, addends: list[Addend]) -> list[BiasPart | PathPart] | Miss:
        """The biases whose sum the addends are, up to a constant per row."""
        rest = [addend for addend in addends if addend.keys or addend.pairs]
        self.rows = [addend for addend in addends if not addend.keys and not addend.pairs]
        self.clocks = KeyClocks(self.scores, self.reader, self.lead, self.alive, self.rows)
        self.used: list[Addend] = []
        parts: list[BiasPart | PathPart] = []
        while rest:
            found: tuple[BiasPart | PathPart, list[Addend]] | None = (
                self._mirrored(rest)
                or self._apart_in_space(rest)
                or self._key_gate(rest)
                or self._plain(rest)
                or self.paths.find(rest)
            )
            if found is None:
                return self._miss(rest)
            part, used = found
            parts.append(part)
            self.used += used
            rest = [addend for addend in rest if addend not in used]
        return self._untouched() or _by_head(_merged(parts))

    def _untouched(self) -> Miss | None:
        """A constant per row made of weights that nothing else in the layer depends on: they would lose their gradient.

        It is zero, but an optimiser and a parallel trainer tell a zero gradient from none.
        """
        program, layer = self.program, self.scores.layer
        known = {
            view.node
            for addend in self.used
            for view in (*addend.heads, *addend.queries, *addend.keys, *addend.pairs)
        }
        rows = {view.node for addend in self.rows for view in (*addend.heads, *addend.queries)}
        left = {node for node in rows - known if program.taints[node] >= Taint.PARAMETER}
        if not left:
            return None
        kept = _weights(program, {*known, layer.query, layer.key, layer.value})
        if _weights(program, left) <= kept:
            return None
        return Miss(
            "gradient",
            "what is added to a row as a whole is made of weights that no other part of the layer reads: without it "
            "they would have no gradient",
            3,
            "a bias of one clock, at the key and at the query",
        )

    # -- one part at a time --------------------------------------------------------------------------------------------

    def _plain(self, rest: list[Addend]) -> tuple[BiasPart, list[Addend]] | None:
        """slope * clock_j, or slope * gate_t * clock_j."""
        for addend in rest:
            if addend.pairs or len(addend.keys) != 1 or len(addend.queries) > 1:
                continue
            clock = self.clocks.read(addend.keys[0], addend)
            if clock is None:
                continue
            gate = addend.queries[0] if addend.queries else None
            if gate is not None and (not self._is_gate(gate) or not self.scores.is_square):
                continue
            return self._part(addend, clock, gate_query=gate), [addend]
        return None

    def _key_gate(self, rest: list[Addend]) -> tuple[BiasPart, list[Addend]] | None:
        """slope * gate_j * clock_j and its counterpart with the clock of the query."""
        for addend in rest:
            if addend.pairs or len(addend.keys) != 2 or addend.queries or not self.scores.is_square:
                continue
            for view, gate in (addend.keys, addend.keys[::-1]):
                partner = next((each for each in rest if self._is_partner(addend, each, view, gate)), None)
                clock = self.clocks.read(view) if partner is not None and self._is_gate(gate) else None
                if clock is not None and partner is not None:
                    return self._part(addend, clock, gate_key=gate), [addend, partner]
        return None

    def _is_partner(self, addend: Addend, other: Addend, clock: Operand, gate: Operand) -> bool:
        return (
            other.number == -addend.number
            and (other.heads, other.only) == (addend.heads, addend.only)
            and other.keys == (gate,)
            and not other.pairs
            and len(other.queries) == 1
            and as_key(other.queries[0]) == clock
        )

    def _mirrored(self, rest: list[Addend]) -> tuple[BiasPart, list[Addend]] | None:
        """-slope * |clock_j - clock_t|, times a gate; or the part of it a causal mask leaves."""
        for addend in rest:
            if (
                len(addend.pairs) != 1
                or len(addend.queries) + len(addend.keys) > 1
                or not self.scores.is_square
            ):
                continue
            gates = (*addend.queries, *addend.keys)
            found = self._apart(addend.pairs[0])
            if found is None or not all(map(self._is_gate, gates)):
                continue
            clock, distance = found
            part = self._part(
                addend,
                clock,
                gate_query=addend.queries[0] if addend.queries else None,
                gate_key=addend.keys[0] if addend.keys else None,
            )
            return replace(part, distance=distance), [addend]
        return None

    def _apart(self, pair: Operand) -> tuple[Clock, Distance] | None:
        """The clock of |clock_j - clock_t|, or of a difference cut off at zero that is whole for every key seen."""
        name = op_name(pair.node)
        try:
            sign = cut_off(pair.node)
            cut = name == "aten::abs" or sign
            inside = self.reader.operand(pair, self.lead, operand_of(pair.node, 0)) if cut else []
        except Unreadable:
            return None
        keys = [addend for addend in inside if len(addend.keys) == 1 and not addend.queries]
        queries = [addend for addend in inside if len(addend.queries) == 1 and not addend.keys]
        if len(inside) != 2 or len(keys) != 1 or len(queries) != 1 or keys[0].number != -queries[0].number:
            return None
        (key,), (query,) = keys, queries
        same = as_key(query.queries[0]) == key.keys[0]
        clock = self.clocks.read(key.keys[0])
        if clock is None and same and self._is_place(key.keys[0]):
            clock = Clock(1.0, key.keys[0], given=True)
        if clock is None or key.heads or query.heads or key.pairs or query.pairs:
            return None
        if not same and not (clock.view is None and same_count(query.queries[0].node, key.keys[0].node)):
            return None
        number = clock.number * key.number
        rises = clock.view is None or _never_falls(clock.view)
        past = rises and self.causal.hide_the_future(self.masks)
        if name == "aten::abs":
            return replace(clock, number=-abs(number)), Signed() if past else Absolute()
        return (replace(clock, number=number), Signed()) if past and number * sign < 0 else None

    def _apart_in_space(self, rest: list[Addend]) -> tuple[BiasPart, list[Addend]] | None:
        """-slope * |place_j - place_t|, on several axes."""
        for addend in rest:
            if len(addend.pairs) != 1 or addend.queries or addend.keys or not self.scores.is_square:
                continue
            try:
                places = places_of(self.reader, addend.pairs[0], self.lead)
            except Unreadable:
                continue
            if places and all(map(self._is_place, places)) and len({view.token_axes for view in places}) == 1:
                part = BiasPart(
                    -addend.number,
                    addend.heads,
                    distance=Euclidean(),
                    given=True,
                    places=places,
                    only=addend.only,
                )
                return part, [addend]
        return None

    def _is_place(self, view: Operand) -> bool:
        if view.part != "value" or HEAD in view.token_axes:
            return False
        return self.program.taints[view.node] <= Taint.POSITION or self.clocks.is_coordinate(view)

    def _part(self, addend: Addend, clock: Clock, **gates: Operand | None) -> BiasPart:
        return BiasPart(
            addend.number * clock.number,
            addend.heads,
            clock.view,
            clock.inclusive,
            gates.get("gate_query"),
            gates.get("gate_key"),
            given=clock.given,
            only=addend.only,
        )

    def _is_gate(self, view: Operand) -> bool:
        if self.program.taints[view.node] is not Taint.DATA or view.part != "value":
            return False
        return self.clocks.sums.read(as_key(view)) is None

    # -- why not -------------------------------------------------------------------------------------------------------

    def _miss(self, rest: list[Addend]) -> Miss:
        """The sentence for addends that are no bias; depth 0 where nothing about them speaks of positions."""
        nodes = [view.node for addend in rest for view in (*addend.queries, *addend.keys, *addend.pairs)]
        near = any(map(is_positional, nodes))
        names = ", ".join(sorted({_said(node) for node in nodes}))
        return Miss(
            "terms",
            "what is added to the scores is not a slope per head times a clock, with or without gates: "
            f"it holds {names}",
            3 if near else 0,
            "a bias by steps, by given positions or by a running sum",
        )


def _weights(program: Program, nodes: set[fx.Node]) -> set[fx.Node]:
    """The parameters some values are made of."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        new = [operand for operand in stack.pop().all_input_nodes if operand not in seen]
        seen.update(new)
        stack += new
    return {node for node in seen if program.roles.get(node) is Role.PARAMETER}


def _never_falls(view: Operand) -> bool:
    """Whether later keys are at no smaller place."""
    along = next(dim for dim, axis in enumerate(view.axes) if axis.role == KEY)
    return view.part == "value" and never_falls(view.node, along)


def _said(node: fx.Node) -> str:
    return op_name(node).removeprefix("aten::") or f"the input {node.name}"


def _merged(parts: list[BiasPart | PathPart]) -> list[BiasPart | PathPart]:
    """The two halves of a gate of query and key as one part."""
    merged: list[BiasPart | PathPart] = []
    for part in parts:
        for place, held in enumerate(merged):
            both = _both(held, part) or _both(part, held)
            if both is not None:
                merged[place] = both
                break
        else:
            merged.append(part)
    return merged


def _by_head(parts: list[BiasPart | PathPart]) -> list[BiasPart | PathPart] | Miss:
    """Biases of single heads that differ in their slopes alone as one; heads without one have no slope."""
    whole: list[BiasPart | PathPart] = []
    apart: dict[BiasPart, list[HeadSlopes]] = {}
    for part in parts:
        if not part.only:
            whole.append(part)
            continue
        if isinstance(part, PathPart):
            return Miss(
                "terms", "a path integral is added in some of the heads alone", 3, "a bias of all heads"
            )
        own = HeadSlopes(part.only, part.number, part.slopes)
        apart.setdefault(replace(part, number=1.0, slopes=(), only=()), []).append(own)
    for part, slopes in apart.items():
        heads = [head for each in slopes for head in each.only]
        if len(set(heads)) < len(heads):
            return Miss("terms", "several biases are added in one head", 2)
        whole.append(replace(part, by_head=tuple(sorted(slopes, key=lambda each: each.only))))
    return whole


def _both(one: BiasPart | PathPart, other: BiasPart | PathPart) -> BiasPart | None:
    """One part gated by the query, the other by the key, and nothing else between them."""
    if not isinstance(one, BiasPart) or not isinstance(other, BiasPart):
        return None
    if (
        one.gate_query is None
        or one.gate_key is not None
        or other.gate_key is None
        or other.gate_query is not None
    ):
        return None
    joined = replace(one, gate_key=other.gate_key)
    return joined if joined == replace(other, gate_query=one.gate_query) else None
