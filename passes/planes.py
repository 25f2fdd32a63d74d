"""Pair the rows of a per-token matrix into planes, decide whether each plane turns, and name the angle it turns by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from grape_compile.encoding import (
    Clock,
    Learned,
    Positions,
    Rotation,
    Spectrum,
    Steps,
    Table,
    Tables,
    describe_frequencies,
    planes_of,
)
from grape_compile.passes.clocks import is_steps, is_unit_clock
from grape_compile.passes.graph import Taint, Unreadable, op_name, require_fake
from grape_compile.passes.movement import is_symbolic, operand_of
from grape_compile.passes.operands import Operand, fit
from grape_compile.passes.plans import Entry, Miss, Reading, RotationPlan
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Factor, multiply, unit

_TABLE_TOLERANCE = 1e-5
_EQUAL = 1e-9
_FREQUENCY_TOLERANCE = 2e-6
_LOOKUPS = {"aten::embedding": 0, "aten::index_select": 0, "aten::index": 0}


def name_rotation(
    reading: Reading, mixed: dict[int, list[Entry]], through: dict[int, int]
) -> RotationPlan | Miss:
    """The rotation that rows mixing two channels each (`mixed`) and rows passing one (`through`) make, or a miss."""
    return _Planes(reading, mixed, through).plan()


@dataclass(frozen=True)
class Resolved:
    """A coefficient followed to its end: `kind` is cos, sin or table; no `leaf` where it is a product of several."""

    kind: str
    number: float
    leaf: Factor | None


@dataclass(frozen=True)
class Named:
    """The angle of a rotation: operands for the slots, and the spectrum and clock as described and as called."""

    operands: tuple[Operand, ...]
    spectrum: Spectrum | None
    clock: Clock
    operator_spectrum: Spectrum | None
    operator_clock: Clock
    scale: float
    evidence: str


class _Planes:
    """Pairs rows into planes, decides whether each is a rotation, and names the angle."""

    def __init__(self, reading: Reading, mixed: dict[int, list[Entry]], through: dict[int, int]) -> None:
        self.reading, self.mixed, self.through = reading, mixed, through
        self.program = reading.program
        self.samples = torch.arange(reading.lead[0].numel())
        self.resolved: dict[tuple[int, int], Resolved] = {}

    def plan(self) -> RotationPlan | Miss:
        planes = self._pairs()
        if isinstance(planes, Miss):
            return planes
        ordered = self._turns(planes)
        if isinstance(ordered, Miss):
            return ordered
        pairs_in, pairs_out, cosines, sines, sign = ordered
        width = self.reading.shape[-1]
        miss = self._passing()
        if miss is not None:
            return miss
        named = self._proved(cosines, sines) or self._tables(cosines, sines, sign)
        if isinstance(named, Miss):
            return named
        planes_in, planes_out = planes_of(pairs_in, width), planes_of(pairs_out, width)
        out = None if planes_in == planes_out else planes_out
        encoding = Rotation(
            planes_in, named.spectrum, named.clock, orientation=sign, out=out, scale=named.scale
        )
        operator = Rotation(
            planes_in,
            named.operator_spectrum,
            named.operator_clock,
            orientation=sign,
            out=out,
            scale=named.scale,
        )
        reading = self.reading
        return RotationPlan(
            reading.source, reading.output, encoding, operator, named.operands, named.evidence, reading.region
        )

    def _pairs(self) -> list[tuple[int, int]] | Miss:
        """Rows that combine the same two input channels, as pairs ordered by their first input channel."""
        rows: dict[tuple[int, int], list[int]] = {}
        for out, (first, second) in self.mixed.items():
            rows.setdefault((first.source, second.source), []).append(out)
        if any(len(outs) != 2 for outs in rows.values()):
            return Miss("planes", "the mixed channels do not form 2 x 2 planes", 2)
        sources = [channel for key in rows for channel in key] + list(self.through.values())
        if len(set(sources)) != len(sources):
            return Miss("planes", "an input channel appears in more than one plane", 2)
        return [(min(rows[key]), max(rows[key])) for key in sorted(rows)]

    def _passing(self) -> Miss | None:
        """Coordinates outside the planes must keep their order (the convention of `Rotation`)."""
        sources = [self.through[out] for out in sorted(self.through)]
        if sources != sorted(sources):
            return Miss("planes", "channels outside the planes are permuted", 2)
        return None

    def _turns(
        self, planes: list[tuple[int, int]]
    ) -> (
        tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], int]
        | Miss
    ):
        """Input and output coordinates per plane, the entries holding cos and sin, and the common orientation."""
        pairs_in, pairs_out, cosines, sines, signs = [], [], [], [], []
        for first, second in planes:
            left, right = self.mixed[first][0].source, self.mixed[first][1].source
            for o0, o1 in ((first, second), (second, first)):
                diagonal = self._compare((o0, left), (o1, right))
                across = self._compare((o0, right), (o1, left))
                if diagonal == 1 and across == -1:
                    break
            else:
                return self._near_miss(first, second, left, right)
            pairs_in.append((left, right))
            pairs_out.append((o0, o1))
            cosines.append((o0, left))
            sines.append((o1, left))
            signs.append(
                1 if self.resolve(o1, left).number * _sign(self.resolve(o0, left).number) > 0 else -1
            )
        if len(set(signs)) == 1:
            return pairs_in, pairs_out, cosines, sines, signs[0]
        for plane, sign in enumerate(signs):
            if sign != signs[0]:
                (left, right), (o0, o1) = pairs_in[plane], pairs_out[plane]
                pairs_in[plane], pairs_out[plane] = (right, left), (o1, o0)
                cosines[plane], sines[plane] = (o1, right), (o0, right)
        return pairs_in, pairs_out, cosines, sines, signs[0]

    def _near_miss(self, first: int, second: int, left: int, right: int) -> Miss:
        a, d = self._values((first, left)), self._values((second, right))
        b, c = self._values((first, right)), self._values((second, left))
        if torch.allclose(a, -d, atol=_TABLE_TOLERANCE) and torch.allclose(b, c, atol=_TABLE_TOLERANCE):
            return Miss(
                "reflection",
                f"channels {left} and {right} are reflected (determinant -1), not rotated",
                4,
                "a rotation of the same planes",
            )
        grams = ((a * a + c * c) - (b * b + d * d)).abs().max(), (a * b + c * d).abs().max()
        return Miss(
            "orthogonal",
            f"the map of channels {left} and {right} is not a rotation times a constant: its columns differ in length "
            f"by {float(grams[0]):.2g} and their product is {float(grams[1]):.2g} where both should vanish",
            4,
            "a rotation of the same planes",
        )

    def _values(self, at: tuple[int, int]) -> Tensor:
        entry = self._entry(at)
        values = [element_values(self.reading.replay, factor) for factor in entry.factors]
        return entry.number * torch.stack(values).prod(0)

    def _entry(self, at: tuple[int, int]) -> Entry:
        return next(entry for entry in self.mixed[at[0]] if entry.source == at[1])

    def _compare(self, one: tuple[int, int], other: tuple[int, int]) -> int:
        """1 if two coefficients are equal, -1 if opposite, 0 otherwise: by what they are, or by all they hold."""
        first, second = self.resolve(*one), self.resolve(*other)
        if (
            first.kind == second.kind
            and abs(first.number) == abs(second.number)
            and self._same_element(first.leaf, second.leaf)
        ):
            return 1 if first.number == second.number else -1
        if first.kind != "table" or second.kind != "table":
            return 0
        if first.leaf is None or second.leaf is None:
            return 0
        left, right = self._column(first.leaf), self._column(second.leaf)
        if left is None or right is None or left.shape != right.shape:
            return 0
        return _same_or_opposite(first.number * left, second.number * right)

    def _column(self, leaf: Factor) -> Tensor | None:
        """Everything a table holds for one channel, at every position it has: what stored tables are compared by."""
        channel = leaf.index[-1] if leaf.index else None
        if channel is None or leaf.part != "value" or bool((channel != channel[0]).any()):
            return None
        node = leaf.node
        if (
            op_name(node) in _LOOKUPS
            and require_fake(node).shape[-1]
            == require_fake(operand_of(node, _LOOKUPS[op_name(node)])).shape[-1]
        ):
            node = operand_of(node, _LOOKUPS[op_name(node)])
        if self.program.taints[node] is not Taint.STRUCTURE or any(
            map(is_symbolic, require_fake(node).shape)
        ):
            return None
        return self.reading.replay.tensor(node)[..., int(channel[0])]

    def _same_element(self, one: Factor | None, other: Factor | None) -> bool:
        if one is None or other is None:
            return False
        numbers = self.program.value_numbers
        if one.part != other.part or numbers[one.node] != numbers[other.node]:
            return False
        if all(torch.equal(a, b) for a, b in zip(one.index, other.index, strict=True)):
            return True
        if one.part not in ("cos", "sin"):
            return False
        return self._same_angle(one, other)

    def _same_angle(self, one: Factor | None, other: Factor | None) -> bool:
        first, second = self.angle(one), self.angle(other)
        if first is None or second is None or first[0] != second[0] or len(first[1]) != len(second[1]):
            return False
        return all(self._same_element(a, b) for a, b in zip(first[1], second[1], strict=True))

    def angle(self, factor: Factor | None) -> tuple[float, tuple[Factor, ...]] | None:
        """The angle as number times a product of elements, or None when it is a sum."""
        if factor is None:
            return None
        terms = self.reading.reader.position(factor.node, factor.index, self.samples)
        if (
            len(terms) != 1
            or len(terms[0].rows) != len(self.samples)
            or any(leaf.part in ("cos", "sin") for leaf in terms[0].factors)
        ):
            return None
        number = terms[0].constant()
        return None if number is None else (number, terms[0].factors)

    def resolve(self, out: int, source: int) -> Resolved:
        """Follow one coefficient back to a trigonometric function of an angle, or to a table."""
        key = (out, source)
        if key not in self.resolved:
            self.resolved[key] = self._resolve(self._entry(key))
        return self.resolved[key]

    def _resolve(self, entry: Entry) -> Resolved:
        table = Resolved("table", entry.number, entry.factors[0] if len(entry.factors) == 1 else None)
        terms = [unit(self.samples)]
        try:
            for factor in entry.factors:
                terms = multiply(terms, self.reading.reader.element(factor, self.samples))
        except Unreadable:
            return table
        if len(terms) != 1 or len(terms[0].factors) != 1 or len(terms[0].rows) != len(self.samples):
            return table
        number, leaf = terms[0].constant(), terms[0].factors[0]
        if number is None:
            return table
        return Resolved(leaf.part if leaf.part in ("cos", "sin") else "table", entry.number * number, leaf)

    # -- naming ------------------------------------------------------------------------------------------------------

    def _proved(self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]]) -> Named | None:
        """Clock times frequency, where every cos and sin is followed back to one product of the two."""
        ends = [self.resolve(*at) for at in (*cosines, *sines)]
        scale = ends[0].number
        if scale <= 0 or any(abs(end.number) != scale for end in ends):
            return None
        half = len(cosines)
        if any(end.kind != "cos" or end.number != scale for end in ends[:half]) or any(
            end.kind != "sin" for end in ends[half:]
        ):
            return None
        if not all(
            self._same_angle(cos.leaf, sin.leaf) for cos, sin in zip(ends[:half], ends[half:], strict=True)
        ):
            return None
        angles = [self.angle(end.leaf) for end in ends[:half]]
        number, leaves = angles[0] or (0.0, ())
        if any(angle is None or angle[0] != number or len(angle[1]) != 2 for angle in angles):
            return None
        views = [
            self._view([angle[1][which] for angle in angles if angle is not None])
            for which in range(len(leaves))
        ]
        if (
            len(views) != 2
            or views[0] is None
            or views[1] is None
            or views[0].has_planes == views[1].has_planes
        ):
            return None
        spectrum, clock = (views[0], views[1]) if views[0].has_planes else (views[1], views[0])
        if not is_unit_clock(self.program, self.reading.replay, clock):
            return None
        boundary = self._entry(cosines[0]).factors[0]
        spectrum = replace(
            spectrum, planes=True, scale=number, detach=self._without_gradient(boundary.node, spectrum.node)
        )
        clock = replace(clock, detach=self._without_gradient(boundary.node, clock.node))
        described = self._spectrum(spectrum, [angle[1] for angle in angles if angle is not None], number)
        steps = (
            Steps()
            if is_steps(self.program, self.reading.replay, clock, self.reading.shape)
            else Positions("positions")
        )
        learned = self.program.taints[spectrum.node] is Taint.PARAMETER
        called = Learned("inv_freq") if learned else Table("inv_freq")
        operator = Rotation(planes_of([(0, 1)], 2), called, Positions("positions"))
        by_slot = {"inv_freq": spectrum, "positions": clock}
        operands = tuple(by_slot[slot] for slot in operator.slots)
        return Named(operands, described, steps, called, Positions("positions"), scale, "proved")

    def _view(self, factors: list[Factor]) -> Operand | None:
        """One value, seen from every plane, as an operand."""
        numbers = self.program.value_numbers
        node, part = self.program.representative(factors[0].node), factors[0].part
        if any(numbers[factor.node] != numbers[node] or factor.part != part for factor in factors):
            return None
        samples, planes = len(self.samples), len(factors)
        index = tuple(
            torch.cat([factor.index[axis] for factor in factors]) for axis in range(len(factors[0].index))
        )
        lead = tuple(axis.repeat(planes) for axis in self.reading.lead)
        plane = torch.arange(planes).repeat_interleave(samples)
        counts = (*self.reading.shape[:-1], planes)
        axes = fit(self.program, node, index, lead, plane, self.reading.reader.sizes, counts)
        return None if axes is None else Operand(node, axes, part)

    def _spectrum(self, operand: Operand, leaves: list[tuple[Factor, ...]], number: float) -> Spectrum:
        """The frequencies as a formula where one fits to the precision of the model's own table."""
        if self.program.taints[operand.node] is Taint.PARAMETER:
            return Learned("inv_freq")
        numbers = self.program.value_numbers
        try:
            values = [
                number * element_values(self.reading.replay, leaf)
                for pair in leaves
                for leaf in pair
                if numbers[leaf.node] == numbers[operand.node] and leaf.part == operand.part
            ]
        except Unreadable:
            return Table("inv_freq")
        if any(float(value.max()) != float(value.min()) for value in values):
            return Table("inv_freq")
        return describe_frequencies(
            [float(value[0]) for value in values], len(values), _FREQUENCY_TOLERANCE
        ) or Table("inv_freq")

    def _without_gradient(self, table: fx.Node, leaf: fx.Node) -> bool:
        """Whether the model cuts the gradient between the frequencies and the table made of them."""
        cut, seen, stack = self.program.no_grad, {table}, [(table, False)]
        while stack:
            node, blocked = stack.pop()
            blocked = blocked or node in cut or str(node.target).startswith("aten.detach")
            if self.program.representative(node) is self.program.representative(leaf):
                return blocked
            for operand in node.all_input_nodes:
                if operand not in seen and self.program.taints[operand] < Taint.DATA:
                    seen.add(operand)
                    stack.append((operand, blocked))
        return False

    def _tables(
        self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]], sign: int
    ) -> Named | Miss:
        """The tables themselves as operands: the use of them is a rotation whatever they hold."""
        miss = self._table_values(cosines, sines)
        if miss is not None:
            return miss
        operands = []
        for entries, orientation in ((cosines, 1), (sines, sign)):
            found = self._table(entries, orientation)
            if found is None:
                return Miss(
                    "operands",
                    "the tables of cos and sin are not regular enough to be handed to an operator",
                    3,
                )
            operands.append(found)
        if not any(self._by_token(operand) for operand in operands):
            return Miss("position", "the map is the same for every token", 0)
        return Named(tuple(operands), None, Tables(), None, Tables(), 1.0, "tables")

    def _by_token(self, operand: Operand) -> bool:
        """A table with an axis of tokens, be it of one token, and not merely one number per channel."""
        return bool(operand.token_axes) or require_fake(operand.node).dim() > 1

    def _table(self, entries: list[tuple[int, int]], orientation: int) -> Operand | None:
        boundary = [self._entry(at) for at in entries]
        factors = [(entry.number, entry.factors[0]) for entry in boundary if len(entry.factors) == 1]
        resolved = [self.resolve(*at) for at in entries]
        for choice in (
            factors,
            [(end.number, end.leaf) for end in resolved if end.kind == "table" and end.leaf is not None],
        ):
            if len(choice) != len(entries) or len({number for number, _ in choice}) != 1:
                continue
            view = self._view([factor for _, factor in choice])
            if view is not None:
                return replace(view, planes=True, scale=orientation * choice[0][0])
        return None

    def _table_tolerance(self, entries: list[tuple[int, int]]) -> float:
        """Rounding of the model's own tables: cos^2 + sin^2 of values of unit roundoff u is off by up to 4 u."""
        stored = [
            factor
            for at in entries
            for factor in (self.resolve(*at).leaf, *self._entry(at).factors)
            if factor
        ]
        kinds = [require_fake(factor.node).dtype for factor in stored]
        epsilons = [torch.finfo(kind).eps for kind in kinds if kind.is_floating_point or kind.is_complex]
        return max([_TABLE_TOLERANCE, *(4 * epsilon for epsilon in epsilons)])

    def _table_values(self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]]) -> Miss | None:
        cos = torch.stack([self._values(at) for at in cosines])
        sin = torch.stack([self._values(at) for at in sines])
        length = cos * cos + sin * sin
        spread = float((length.max() - length.min()) / length.max().clamp_min(1e-300))
        if spread > self._table_tolerance(cosines + sines):
            return Miss(
                "orthogonal",
                f"cos^2 + sin^2 of the tables varies by {spread:.2g} of its size: this is no rotation times a constant",
                4,
                "a rotation with these planes",
            )
        return None


def _same_or_opposite(left: Tensor, right: Tensor) -> int:
    """1 if equal, -1 if opposite, 0 if neither or nothing but zeros."""
    bound = _EQUAL * max(float(left.abs().max()), 1e-30)
    if not bool((left.abs() > bound).any()):
        return 0
    if float((left - right).abs().max()) <= bound:
        return 1
    return -1 if float((left + right).abs().max()) <= bound else 0


def _sign(number: float) -> int:
    return 1 if number > 0 else -1


def element_values(replay: Replay, factor: Factor) -> Tensor:
    """Values of the elements a factor addresses, in fp64."""
    value = replay.tensor(factor.node)
    element = value[factor.index] if factor.index else value.reshape(1)
    if factor.part in ("cos", "sin"):
        return torch.cos(element) if factor.part == "cos" else torch.sin(element)
    if factor.part in ("real", "imag"):
        return element.real if factor.part == "real" else element.imag
    return 1 / element if factor.part == "reciprocal" else element
