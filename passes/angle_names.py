"""Name the angle of a rotation: clock times frequency where every coefficient is followed to it, or the tables used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from grape_compile.encoding import (
    Accumulated,
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
from grape_compile.passes.coefficients import Coefficients, element_values, scaled_turns
from grape_compile.passes.graph import ANGLES, Program, Taint, Unreadable, op_name, require_fake
from grape_compile.passes.movement import SINGLE, is_frozen, move
from grape_compile.passes.operands import Operand, fit
from grape_compile.passes.plans import Miss
from grape_compile.passes.running_sums import RunningSums
from grape_compile.passes.terms import Factor, Index

_TABLE_TOLERANCE = 1e-5
_FREQUENCY_TOLERANCE = 2e-6


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


def name_angle(
    coefficients: Coefficients, cosines: list[tuple[int, int]], sines: list[tuple[int, int]], sign: int
) -> Named | Miss:
    """The angle whose cosines and sines stand at these places of the matrix."""
    namer = _Namer(coefficients)
    named = namer.proved(cosines, sines)
    if named is None:
        return namer.tables(cosines, sines, sign)
    if not any(operand.node in coefficients.program.outside for operand in named.operands):
        return named
    tables = namer.tables(cosines, sines, sign)
    if isinstance(tables, Miss):
        return tables
    return replace(tables, spectrum=named.spectrum, clock=named.clock)


def without_gradient(program: Program, table: fx.Node, leaf: fx.Node) -> bool:
    """Whether the model cuts the gradient between a value and the table made of it."""
    cut, seen, stack, order = program.no_grad, {table}, [(table, False)], program.order
    leaf = program.representative(leaf)
    while stack:
        node, blocked = stack.pop()
        blocked = blocked or node in cut or str(node.target).startswith("aten.detach")
        if program.representative(node) is leaf:
            return blocked
        for operand in node.all_input_nodes:
            if operand not in seen and order[operand] >= order[leaf]:
                seen.add(operand)
                stack.append((operand, blocked))
    return False


class _Namer:
    def __init__(self, coefficients: Coefficients) -> None:
        self.coefficients, self.reading = coefficients, coefficients.reading
        self.program, self.samples = coefficients.program, coefficients.samples

    def proved(self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]]) -> Named | None:
        """Clock times frequency, where every cos and sin is followed back to one product of the two."""
        ends = [self.coefficients.resolve(*at) for at in (*cosines, *sines)]
        scale = ends[0].number
        if scale <= 0 or any(abs(end.number) != scale for end in ends):
            return None
        half = len(cosines)
        if any(end.kind != "cos" or end.number != scale for end in ends[:half]) or any(
            end.kind != "sin" for end in ends[half:]
        ):
            return None
        if not all(
            self.coefficients.same_angle(cos.leaf, sin.leaf)
            for cos, sin in zip(ends[:half], ends[half:], strict=True)
        ):
            return None
        leaves = [end.leaf for end in ends[:half]]
        boundary = self.coefficients.entry(cosines[0]).factors[0].node
        for read in (self.reading.reader.position, self.reading.reader.product):
            named = self._product([self.coefficients.angle(leaf, read) for leaf in leaves], boundary, scale)
            if named is not None:
                return named
        return None

    def _product(
        self, angles: list[tuple[float, tuple[Factor, ...]] | None], boundary: fx.Node, scale: float
    ) -> Named | None:
        """Angles that are a number times a clock, and times a frequency where the planes differ."""
        found = [angle for angle in angles if angle is not None]
        number, leaves = found[0] if found else (0.0, ())
        if len(found) != len(angles) or any(
            (angle[0], len(angle[1])) != (number, len(leaves)) for angle in found
        ):
            return None
        views = [self._view([angle[1][which] for angle in found]) for which in range(len(leaves))]
        seen = [view for view in views if view is not None]
        clocks = [view for view in seen if not view.has_planes]
        if len(seen) != len(views) or len(clocks) != 1 or len(views) > 2:
            return None
        clock = clocks[0]
        told = self._clock(clock)
        if told is None:
            return None
        clock = replace(clock, detach=without_gradient(self.program, boundary, clock.node))
        if len(views) == 1:
            return self._without_frequencies(clock, told, len(found), number, scale)
        spectrum = next(view for view in seen if view.has_planes)
        spectrum = replace(
            spectrum,
            planes=True,
            scale=number,
            detach=without_gradient(self.program, boundary, spectrum.node),
        )
        described = self._spectrum(spectrum, clock, [angle[1] for angle in found], number)
        learned = self.program.taints[spectrum.node] is Taint.PARAMETER
        called = Learned("inv_freq") if learned else Table("inv_freq")
        operator = Rotation(planes_of([(0, 1)], 2), called, Positions("positions"))
        by_slot = {"inv_freq": spectrum, "positions": clock}
        operands = tuple(by_slot[slot] for slot in operator.slots)
        return Named(operands, described, told, called, Positions("positions"), scale, "proved")

    def _without_frequencies(
        self, clock: Operand, told: Clock, planes: int, number: float, scale: float
    ) -> Named | None:
        """Every plane turns alike, by a number written in the code times the clock."""
        spectrum = describe_frequencies([number] * planes, planes, _FREQUENCY_TOLERANCE)
        if spectrum is None:
            return None
        return Named((clock,), spectrum, told, spectrum, Positions("positions"), scale, "proved")

    def _clock(self, clock: Operand) -> Clock | None:
        """What a clock is: the tokens' numbers, given positions, or a running sum of rates; None for anything else."""
        if is_unit_clock(self.program, self.reading.replay, clock):
            steps = is_steps(self.program, self.reading.replay, clock, self.reading.shape)
            return Steps() if steps else Positions("positions")
        for token in clock.token_axes:
            sums = RunningSums(
                self.program, self.reading.reader, self.reading.lead, self.reading.shape[:-1], token
            )
            total = sums.read(clock)
            if total is not None and total.number == 1.0 and sums.is_along_tokens(total):
                return Accumulated("rates", total.inclusive)
        return None

    def _view(self, factors: list[Factor], *, runs: bool = False) -> Operand | None:
        """One value, seen from every plane, as an operand; with `runs` the planes may be channels in a few runs."""
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
        axes = fit(self.program, node, index, lead, plane, self.reading.reader.sizes, counts, runs=runs)
        return None if axes is None else Operand(node, axes, part)

    def _spectrum(
        self, operand: Operand, clock: Operand, leaves: list[tuple[Factor, ...]], number: float
    ) -> Spectrum:
        """The frequencies as a formula where one fits to the precision of the model's own table.

        Those that are chosen or computed by the positions themselves (LongRoPE, dynamic NTK) are others at another
        length: they stay a table.
        """
        if self.program.taints[operand.node] is Taint.PARAMETER:
            return Learned("inv_freq")
        if not self._ancestors(operand.node).isdisjoint(self._ancestors(clock.node)):
            return Table("inv_freq")
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

    def _ancestors(self, node: fx.Node) -> set[fx.Node]:
        """What a value is computed from: values made in the graph, sizes known at run time, given positions."""
        seen, stack = {node}, [node]
        while stack:
            for operand in stack.pop().all_input_nodes:
                stored = operand.op != "call_function" and self.program.taints[operand] is not Taint.POSITION
                if operand not in seen and not stored:
                    seen.add(operand)
                    stack.append(operand)
        return seen

    def tables(self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]], sign: int) -> Named | Miss:
        """The tables themselves as operands: the use of them is a rotation whatever they hold."""
        miss = None if self._of_one_angle(cosines, sines) else self._table_values(cosines, sines)
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

    def _of_one_angle(self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]]) -> bool:
        """Cosine and sine of one angle in every plane, times one number, cos(-a) = cos(a): no values need be seen."""
        resolve, looked_up = self.coefficients.resolve, self.coefficients.looked_up
        ends = [(resolve(*one), resolve(*other)) for one, other in zip(cosines, sines, strict=True)]
        pairs = [looked_up(*pair) or pair for pair in ends]
        return all(
            (cos.kind, sin.kind) == ("cos", "sin")
            and abs(cos.number) == abs(sin.number) == abs(pairs[0][0].number)
            and self.coefficients.same_angle(cos.leaf, sin.leaf, even=True)
            for cos, sin in pairs
        )

    def _of_activations(self, at: tuple[int, int]) -> bool:
        """Whether a coefficient is made of the cosine or sine of an activation."""
        stack = [factor.node for factor in self.coefficients.entry(at).factors]
        seen = set(stack)
        while stack:
            node = stack.pop()
            taints = [self.program.taints[operand] for operand in node.all_input_nodes]
            if op_name(node) in ANGLES and Taint.DATA in taints:
                return True
            for operand, taint in zip(node.all_input_nodes, taints, strict=True):
                if taint is not Taint.DATA and operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return False

    def _by_token(self, operand: Operand) -> bool:
        """A table with an axis of tokens, be it of one token, and not merely one number per channel."""
        return bool(operand.token_axes) or require_fake(operand.node).dim() > 1

    def _table(self, entries: list[tuple[int, int]], orientation: int) -> Operand | None:
        boundary = [self.coefficients.entry(at) for at in entries]
        factors = [(entry.number, entry.factors[0]) for entry in boundary if len(entry.factors) == 1]
        resolved = [self.coefficients.resolve(*at) for at in entries]
        for choice in (
            factors,
            self._before_moves(factors),
            [(end.number, end.leaf) for end in resolved if end.kind == "table" and end.leaf is not None],
            self._before_moves([(end.number, end.leaf) for end in resolved if end.leaf is not None]),
        ):
            if any(factor.node in self.program.outside for _, factor in choice):
                continue
            if len(choice) != len(entries) or len({number for number, _ in choice}) != 1:
                continue
            view = self._view([factor for _, factor in choice], runs=True)
            if view is not None:
                return replace(view, planes=True, scale=orientation * choice[0][0])
        return None

    def _before_moves(self, factors: list[tuple[float, Factor]]) -> list[tuple[float, Factor]]:
        """The same elements in the latest value that all of them come from: tables that were cut apart by axis."""
        paths = [self._path(factor) for _, factor in factors]
        for node in paths[0] if paths else ():
            if node not in self.program.outside and all(node in path for path in paths):
                return [
                    (number, replace(factor, node=node, index=path[node]))
                    for (number, factor), path in zip(factors, paths, strict=True)
                ]
        return []

    def _path(self, factor: Factor) -> dict[fx.Node, Index]:
        """Where an element was before each movement, latest first."""
        node, index, sizes = factor.node, factor.index, self.reading.reader.sizes
        path = {node: index}
        while (
            factor.part in ("value", "cos", "sin")
            and op_name(node) in SINGLE
            and not is_frozen(node, op_name(node))
        ):
            try:
                node, index = move(node, op_name(node), index, sizes)
            except Unreadable:
                break
            path[node] = index
        return path

    def _table_tolerance(self, entries: list[tuple[int, int]]) -> float:
        """Rounding of the model's own tables: cos^2 + sin^2 of values of unit roundoff u is off by up to 4 u."""
        stored = [
            factor
            for at in entries
            for factor in (self.coefficients.resolve(*at).leaf, *self.coefficients.entry(at).factors)
            if factor
        ]
        kinds = [require_fake(factor.node).dtype for factor in stored]
        epsilons = [torch.finfo(kind).eps for kind in kinds if kind.is_floating_point or kind.is_complex]
        return max([_TABLE_TOLERANCE, *(4 * epsilon for epsilon in epsilons)])

    def _table_values(self, cosines: list[tuple[int, int]], sines: list[tuple[int, int]]) -> Miss | None:
        """Whether tables that are the same in every run are cosines and sines of one angle times a number."""
        if any(self._of_activations(at) for at in (*cosines, *sines)):
            return Miss(
                "one angle",
                "cos and sin of activations are not followed to one angle, and their values differ from run to run",
                4,
                "a rotation with these planes",
            )
        cos = torch.stack([self.coefficients.values(at) for at in cosines])
        sin = torch.stack([self.coefficients.values(at) for at in sines])
        # Half of what cos^2 + sin^2 may be off by is left of its root.
        return scaled_turns((cos * cos + sin * sin).sqrt(), self._table_tolerance(cosines + sines) / 2)
