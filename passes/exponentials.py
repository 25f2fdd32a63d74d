"""Find turns by exponentials of matrices, exp(clock * L) with L skew: planes of any directions (GRAPE 2.1, App. D).

What: activations multiplied, token by token, by `matrix_exp(clock * L)` or its transpose, in whatever order of axes,
    by one L, or one for each head or block of channels. L is the opposite of its transpose by what it is made of
    (`A - A.mT`), or by the numbers it is known to hold.
Leaves alone: exponents that are sums over several clocks, whose matrices need not commute; an L of which nothing shows
    that it is skew; clocks that do not count positions.
Cost: one reading for each product with such a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.encoding import NonCommuting, Positions, Steps
from grape_compile.passes.angle_names import without_gradient
from grape_compile.passes.clocks import is_positional, is_steps, is_unit_clock
from grape_compile.passes.contractions import CONTRACTIONS, Contraction, contraction
from grape_compile.passes.elements import Reader
from grape_compile.passes.facts import Skew, rely_on
from grape_compile.passes.filled import is_zero_tensor
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import IDENTITIES, PERMUTES, RESHAPES, SINGLE, is_frozen, is_symbolic, move
from grape_compile.passes.operands import Axis, Emitter, Operand, fit
from grape_compile.passes.plans import Miss, RotationPlan
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Factor, Index, Term, unit

EXPONENTIALS = {"aten::matrix_exp", "aten::linalg_matrix_exp"}
_FAR = 64
_MOST_PLACES = 512
_LARGEST_GENERATOR = 1 << 20


@dataclass(frozen=True)
class GeneratorPlan(RotationPlan):
    """A turn by exp(clock * L): `operands` are the clock and L, whose last two axes are `row` and `row + 1`."""

    row: int = 0

    def emit(self, emitter: Emitter, source: fx.Node) -> tuple[fx.Node, ...]:
        """Clock, basis and generator for `source`, its tokens on the axis before the channels."""
        clock, generator = self.operands
        shape = require_fake(source).shape
        size = self.operator.head_dim
        wanted = [*range(len(shape) - 2), self.row, self.row + 1]
        counts: dict[str | int, Any] = {**dict(enumerate(shape)), self.row: size, self.row + 1: size}
        matrix = emitter.operand(generator, wanted, counts)
        held = require_fake(matrix)
        options = {"dtype": held.dtype, "device": held.device}
        basis = emitter.call(matrix, torch.ops.aten.eye.default, (size,), options)
        return emitter.rotated(clock, source, 1), basis, matrix


def exponential_behind(node: fx.Node) -> fx.Node | None:
    """The exponential of matrices that a value was moved from."""
    while op_name(node) in SINGLE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if op_name(node) in EXPONENTIALS else None


def is_made_of_positions(program: Program, node: fx.Node) -> bool:
    """Whether a value is the same whatever the activations are, and another at other positions."""
    return program.taints[node] is not Taint.DATA and is_positional(node, _FAR)


def turned_by_exponentials(
    program: Program, replay: Replay
) -> tuple[list[GeneratorPlan], list[tuple[fx.Node, Miss]]]:
    """All turns by exponentials of a clock times a matrix, and the products with others that positions reach."""
    plans: list[GeneratorPlan] = []
    misses: list[tuple[fx.Node, Miss]] = []
    for node in program.graph.nodes:
        if op_name(node) not in CONTRACTIONS or program.taints[node] is not Taint.DATA:
            continue
        found = _Product(program, replay, node).read()
        if isinstance(found, GeneratorPlan):
            plans.append(found)
        elif found is not None:
            misses.append((node, found))
    return plans, misses


class _Product:
    """A product of an activation and the exponentials of matrices."""

    def __init__(self, program: Program, replay: Replay, node: fx.Node) -> None:
        self.program, self.replay, self.node = program, replay, node
        self.reader = Reader(program, replay)
        self.sizes = self.reader.sizes

    def read(self) -> GeneratorPlan | Miss | None:
        """None for other products, and for matrices that no position is in."""
        product = contraction(self.node, self.sizes)
        if product is None or self.node in self.program.stale:
            return None
        for data, matrix in ((product.right, product.left), (product.left, product.right)):
            exponential = exponential_behind(matrix)
            if exponential is None or not is_made_of_positions(self.program, exponential):
                continue
            nearest: Miss | None = None
            for source, output in self._ends(data):
                try:
                    found = _Turn(self, product, matrix, exponential, source, output).plan()
                except Unreadable as reason:
                    found = _unread(str(reason))
                if isinstance(found, GeneratorPlan):
                    return found
                if nearest is None or found.depth > nearest.depth:
                    nearest = found
            return nearest
        return None

    def _ends(self, data: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Where a turn may begin and end: of one shape, with nothing but movement to the product; fewest axes first."""
        sources, outputs = [data], [self.node]
        while (
            op_name(sources[-1]) in RESHAPES | PERMUTES | IDENTITIES
            and fake(sources[-1].all_input_nodes[0]) is not None
        ):
            sources.append(sources[-1].all_input_nodes[0])
        while len(users := list(outputs[-1].users)) == 1 and (
            op_name(users[0]) in RESHAPES | PERMUTES | IDENTITIES and users[0].args[0] is outputs[-1]
        ):
            outputs.append(users[0])
        pairs = [(source, output) for source in sources for output in outputs if _alike(source, output)]
        yield from sorted(pairs, key=lambda pair: require_fake(pair[0]).dim())


class _Turn:
    """The map from one value to another, through one product with exponentials."""

    def __init__(
        self,
        product: _Product,
        parts: Contraction,
        matrix: fx.Node,
        exponential: fx.Node,
        source: fx.Node,
        output: fx.Node,
    ) -> None:
        self.program, self.replay, self.reader = product.program, product.replay, product.reader
        self.sizes, self.node, self.parts = product.sizes, product.node, parts
        self.matrix, self.exponential, self.source, self.output = matrix, exponential, source, output
        self.shape = self.sizes.shape(output)

    def plan(self) -> GeneratorPlan | Miss:
        """The turn, where one axis is mixed by a clock times a skew matrix."""
        if self.exponential in self.program.stale:
            return _unread("what it is made of was written into in place")
        found: GeneratorPlan | Miss = _unread("its channels are no axis of one size with the matrices")
        for axis in reversed(range(len(self.shape))):
            if self.shape[axis] == self.parts.size and not is_symbolic(require_fake(self.output).shape[axis]):
                mixed = self._mixed(axis)
                if mixed is not None:
                    found = self._named(axis, *mixed)
                    break
        return found

    def _mixed(self, axis: int) -> tuple[Index, Index, int] | None:
        """Places of the output, the elements of the exponentials that channels there are mixed by, and which way.

        None where the channels of this axis are not made of all channels of the same token, each by its entry.
        """
        size = self.parts.size
        lead, rows = self._places(), torch.arange(size)
        count = lead[0].numel()
        wide = tuple(at.repeat_interleave(size) for at in lead)
        summed = rows.repeat(count)
        at = self._behind(self.output, self.node, wide)
        left, right = self.parts.left_at(at, summed), self.parts.right_at(at, summed)
        data, held = (right, left) if self.matrix is self.parts.left else (left, right)
        operand = self.parts.right if self.matrix is self.parts.left else self.parts.left
        read = self._behind(operand, self.source, data)
        same = all(
            torch.equal(one, other)
            for place, (one, other) in enumerate(zip(read, wide, strict=True))
            if place != axis
        )
        entries = self._behind(self.matrix, self.exponential, held)
        if not same or not torch.equal(
            read[axis].view(count, size).sort(-1).values, rows.expand(count, size)
        ):
            return None
        for sign, pair in ((1, (wide[axis], read[axis])), (-1, (read[axis], wide[axis]))):
            if all(map(torch.equal, entries[-2:], pair)):
                return wide, entries, sign
        return None

    def _places(self) -> Index:
        """Sampled places of the output."""
        choices = [
            torch.tensor(sorted({0, 1, size // 2, size - 1} & set(range(size)))) for size in self.shape
        ]
        grid = torch.cartesian_prod(*choices).reshape(-1, len(choices))
        if len(grid) > _MOST_PLACES:
            inner = (
                torch.randperm(len(grid) - 2, generator=torch.Generator().manual_seed(0))[: _MOST_PLACES - 2]
                + 1
            )
            grid = torch.cat([grid[:1], grid[inner.sort().values], grid[-1:]])
        return tuple(grid[:, axis] for axis in range(len(choices)))

    def _behind(self, node: fx.Node, stop: fx.Node, index: Index) -> Index:
        """The elements of an earlier value that those of a later one are, moved about."""
        while node is not stop:
            name = op_name(node)
            if name not in SINGLE or is_frozen(node, name) or node in self.program.stale:
                raise Unreadable(f"{name} stands between")
            node, index = move(node, name, index, self.sizes)
        return index

    def _named(self, axis: int, lead: Index, entries: Index, sign: int) -> GeneratorPlan | Miss:
        rank = len(self.shape)
        read = self._product_of(lead, entries, rank, axis)
        if read is None:
            return _unread(
                "the exponent is not one position times one matrix; matrices of several positions need not commute, so "
                "that the sum of them is no turn by one clock"
            )
        number, clock, generator = read
        tokens = [role for role in clock.token_axes if role not in generator.token_axes]
        if not tokens:
            return _unread("each of several matrices has a position of its own")
        order = (*(at for at in range(rank) if at not in (tokens[-1], axis)), tokens[-1], axis)
        clock = _reordered(clock, order)
        shape = tuple(self.shape[at] for at in order)
        if not is_unit_clock(self.program, self.replay, clock):
            return _unread("what the matrix is multiplied by does not count positions one by one")
        self._require_skew(generator, rank)
        steps = is_steps(self.program, self.replay, clock, shape)
        size = self.parts.size
        cut = partial(without_gradient, self.program, self.matrix)
        operands = (
            replace(clock, detach=cut(clock.node)),
            replace(_reordered(generator, order), scale=number, detach=cut(generator.node)),
        )
        return GeneratorPlan(
            self.source,
            self.output,
            NonCommuting(size, Steps() if steps else Positions("positions"), orientation=sign),
            NonCommuting(size, Positions("positions"), orientation=sign),
            operands,
            "proved",
            self._region(),
            order,
            self.program.signature((self.output,), (self.source,)),
            rank,
        )

    def _product_of(
        self, lead: Index, entries: Index, rank: int, axis: int
    ) -> tuple[float, Operand, Operand] | None:
        """The exponent as a number times a clock times a matrix, whose axes are `rank` and `rank + 1`."""
        rows = torch.arange(lead[0].numel())
        exponent = self.exponential.all_input_nodes[0]
        counts = (*self.shape, self.parts.size, self.parts.size, 1)
        # The channels are no axis that clock and matrix lie along: those of the matrix are.
        places = (
            *(torch.zeros_like(at) if role == axis else at for role, at in enumerate(lead)),
            *entries[-2:],
        )
        for read in (self.reader.position, self.reader.product):
            terms = read(exponent, entries, rows)
            if len(terms) != 1 or len(terms[0].rows) != len(rows) or len(terms[0].factors) != 2:
                continue
            number, views = (
                terms[0].constant(),
                [self._view(factor, places, counts) for factor in terms[0].factors],
            )
            clocks = [view for view in views if view is not None and set(view.token_axes) <= set(range(rank))]
            matrices = [
                view for view in views if view is not None and {rank, rank + 1} <= set(view.token_axes)
            ]
            if number and len(clocks) == len(matrices) == 1:
                return number, clocks[0], matrices[0]
        return None

    def _view(self, factor: Factor, places: Index, counts: Sequence[int]) -> Operand | None:
        if factor.part != "value":
            return None
        node = self.program.representative(factor.node)
        axes = fit(self.program, node, factor.index, places, torch.zeros_like(places[0]), self.sizes, counts)
        return None if axes is None else Operand(node, axes)

    def _require_skew(self, generator: Operand, rank: int) -> None:
        """Raise Unreadable unless a matrix is the opposite of its transpose in every call."""
        node = generator.node
        roles = [axis.role for axis in generator.axes]
        one, other = roles.index(rank), roles.index(rank + 1)
        if self.program.made_of(node) is not None:
            fact = Skew((one, other))
            if fact(self.replay.tensor(node)):
                rely_on(self.program, node, fact, self.replay)
                return
        shape = self.sizes.shape(node)
        if torch.Size(shape).numel() > _LARGEST_GENERATOR:
            raise Unreadable("the matrix is too large to be read")
        grid = torch.cartesian_prod(*map(torch.arange, shape))
        index = tuple(grid[:, axis] for axis in range(len(shape)))
        exchanged = list(index)
        exchanged[one], exchanged[other] = index[other], index[one]
        rows = torch.arange(len(grid))
        terms, opposites = (self._parts(node, at, rows) for at in (index, tuple(exchanged)))
        for term in terms:
            match = next((each for each in opposites if self._is_opposite(term, each)), None)
            if match is None:
                raise Unreadable(
                    "nothing shows that the matrix is the opposite of its transpose, without which this is no "
                    "rotation: make it as A - A.mT"
                )
            opposites = [each for each in opposites if each is not match]
        if opposites:
            raise Unreadable("the matrix and its transpose are made of different values")

    def _parts(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements followed back as far as anything is known of them."""
        if is_zero_tensor(node):
            return []
        try:
            return self.reader.pull(node, index, rows, self._parts)
        except Unreadable:
            return [unit(rows, Factor(node, index))]

    def _is_opposite(self, one: Term, other: Term) -> bool:
        """Whether two terms are of the same elements, in any order, with opposite numbers."""
        left = list(other.factors)
        if not torch.equal(one.rows, other.rows) or not torch.equal(one.coefficient, -other.coefficient):
            return False
        for factor in one.factors:
            same = next((each for each in left if self._is_same(factor, each)), None)
            if same is None:
                return False
            left = [each for each in left if each is not same]
        return not left

    def _is_same(self, one: Factor, other: Factor) -> bool:
        numbers = self.program.value_numbers
        return (numbers[one.node], one.part) == (numbers[other.node], other.part) and all(
            map(torch.equal, one.index, other.index)
        )

    def _region(self) -> tuple[fx.Node, ...]:
        """The activations from the source to the output."""
        nodes = [self.output]
        while nodes[-1] is not self.node:
            nodes.append(nodes[-1].all_input_nodes[0])
        nodes.append(self.parts.right if self.matrix is self.parts.left else self.parts.left)
        while nodes[-1] is not self.source:
            nodes.append(nodes[-1].all_input_nodes[0])
        return tuple(reversed(nodes))


def _alike(one: fx.Node, other: fx.Node) -> bool:
    first, second = require_fake(one), require_fake(other)
    return first.dim() > 1 and list(map(str, first.shape)) == list(map(str, second.shape))


def _reordered(view: Operand, order: Sequence[int]) -> Operand:
    """The same view of a value whose axes stand in another order; further ones stay."""
    axes = (
        replace(axis, role=order.index(axis.role))
        if isinstance(axis.role, int) and axis.role < len(order)
        else axis
        for axis in view.axes
    )
    return replace(view, axes=tuple[Axis, ...](axes))


def _unread(why: str) -> Miss:
    return Miss(
        "generator",
        "activations are multiplied by the exponential of a matrix made of positions, which is no turn that is known: "
        f"{why}",
        3,
        "a rotation by the exponential of one position times one skew matrix",
    )
