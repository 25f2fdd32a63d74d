"""The coefficients of a per-token matrix: what each is made of, and when two of them are equal or opposite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor, fx

from grape_compile.passes.facts import rely_on_numbers
from grape_compile.passes.graph import Taint, Unreadable, frozen, op_name, require_fake
from grape_compile.passes.movement import ints, is_symbolic, operand_of, table_of
from grape_compile.passes.plans import Entry, Miss, Reading
from grape_compile.passes.replay import Replay, exact
from grape_compile.passes.terms import Factor, Index, Term, multiply, unit

Read = Callable[[fx.Node, Index, Tensor], list[Term]]

_EQUAL = 1e-9
_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::index"}


@dataclass(frozen=True)
class Resolved:
    """A coefficient followed to its end: `kind` is cos, sin, table or number; `leaf` is the one element it is.

    A table joined along the tokens (a class token beside the patches) has its parts in `pieces`: the sampled tokens of
    each, its number and its element. A product of several elements (a table times a factor that the model holds) is in
    `product`, with its number.
    """

    kind: str
    number: float
    leaf: Factor | None
    pieces: tuple[Term, ...] = ()
    product: Term | None = None


@dataclass(frozen=True)
class _Lookup:
    """Elements of a table at places that are not known: `element` runs over all its rows, one for each of `rows`."""

    places: Factor
    element: Factor
    rows: Tensor


class Coefficients:
    """Entries of a matrix by output and input channel, followed back to their ends.

    `may_change`: two of them hold equal numbers, in a tensor that may change unseen.
    """

    def __init__(self, reading: Reading, mixed: dict[int, list[Entry]]) -> None:
        self.reading, self.mixed = reading, mixed
        self.program = reading.program
        self.samples = torch.arange(reading.lead[0].numel())
        self.resolved: dict[tuple[int, int], Resolved] = {}
        self.may_change = False

    def values(self, at: tuple[int, int]) -> Tensor:
        entry = self.entry(at)
        values = [element_values(self.reading.replay, factor) for factor in entry.factors]
        return entry.number * torch.stack(values).prod(0)

    def entry(self, at: tuple[int, int]) -> Entry:
        return next(entry for entry in self.mixed[at[0]] if entry.source == at[1])

    def compare(self, one: tuple[int, int], other: tuple[int, int]) -> int:
        """1 if two coefficients are equal, -1 if opposite, 0 otherwise: by what they are, or by all they hold."""
        first, second = self.resolve(*one), self.resolve(*other)
        sign = self._same(first, second)
        if sign == 0 and (behind := self.looked_up(first, second)) is not None:
            first, second = behind
            sign = self._same(first, second)
        if sign != 0:
            return sign
        if first.kind != "table" or second.kind != "table":
            return 0
        if first.pieces and len(first.pieces) == len(second.pieces):
            return self._same_pieces(first, second)
        sign = self._same_product(first.product, second.product) * sign_of(first.number * second.number)
        if sign != 0 and abs(first.number) == abs(second.number):
            return sign
        if first.leaf is None or second.leaf is None:
            return 0
        return self._hold(first.leaf, second.leaf, first.number, second.number)

    def _same(self, one: Resolved, other: Resolved) -> int:
        """1 for the same element times the same number, -1 for opposite numbers, 0 otherwise."""
        same = one.kind == other.kind and abs(one.number) == abs(other.number)
        if not same or not self.same_element(one.leaf, other.leaf):
            return 0
        return 1 if one.number == other.number else -1

    def looked_up(self, one: Resolved, other: Resolved) -> tuple[Resolved, Resolved] | None:
        """What two coefficients are, at every row of the tables that the same rows of both are looked up in."""
        seen = False
        while one.kind == other.kind == "table" and one.leaf is not None and other.leaf is not None:
            first, second = self._lookup(one.leaf), self._lookup(other.leaf)
            if first is None or second is None or not self._same_place(first.places, second.places):
                break
            one, other = (
                self._follow(end.number, (lookup.element,), lookup.rows)
                for end, lookup in ((one, first), (other, second))
            )
            seen = True
        return (one, other) if seen else None

    def _lookup(self, leaf: Factor) -> _Lookup | None:
        """An element looked up by a tensor of places along one axis."""
        node = leaf.node
        if leaf.part != "value" or op_name(node) not in _LOOKUPS or node in self.program.stale:
            return None
        if op_name(node) == "aten::index":
            given = node.args[1]
            assert isinstance(given, list | tuple)
            picked = [(axis, each) for axis, each in enumerate(given) if isinstance(each, fx.Node)]
            if len(picked) != 1:
                return None
            ((axis, places),) = picked
        else:
            picks = op_name(node) == "aten::index_select"
            axis = ints(node.args[1])[0] % require_fake(node).dim() if picks else 0
            places = operand_of(node, 1 if op_name(node) == "aten::embedding" else 2)
        source = operand_of(node, 0)
        if require_fake(places).dtype is torch.bool:
            return None
        shape, end = self.reading.reader.shape(source), axis + require_fake(places).dim()
        count = max(shape[axis], leaf.index[0].numel())
        rows = torch.arange(count)
        index = [at[rows % at.numel()] for at in (*leaf.index[:axis], *leaf.index[end:])]
        index.insert(axis, rows % shape[axis])
        return _Lookup(Factor(places, leaf.index[axis:end]), Factor(source, tuple(index)), rows)

    def _same_pieces(self, one: Resolved, other: Resolved) -> int:
        """1 if two joined tables are equal piece by piece, -1 if opposite, 0 otherwise."""
        signs = set()
        for first, second in zip(one.pieces, other.pieces, strict=True):
            left, right = first.constant(), second.constant()
            if left is None or right is None or not torch.equal(first.rows, second.rows):
                return 0
            if left == 0 or not self.same_element(first.factors[0], second.factors[0]):
                return 0
            signs.add(one.number * left / (other.number * right) if right else 0.0)
        return int(signs.pop()) if signs in ({1.0}, {-1.0}) else 0

    def _same_product(self, one: Term | None, other: Term | None) -> int:
        """1 for the same elements times the same number, in any order, -1 for opposite numbers, 0 otherwise."""
        if one is None or other is None or len(one.factors) != len(other.factors):
            return 0
        left = list(other.factors)
        for factor in one.factors:
            same = next((place for place, each in enumerate(left) if self.same_element(factor, each)), None)
            if same is None:
                return 0
            del left[same]
        first, second = one.constant(), other.constant()
        if first is None or second is None or abs(first) != abs(second):
            return 0
        return 1 if first == second else -1

    def _hold(self, one: Factor, other: Factor, number: float = 1.0, second: float = 1.0) -> int:
        """1 if stored tables hold equal numbers for two channels, at every position they have; -1 for opposite ones.

        A channel is a place on the last axis, or, of tables of matrices, on the last two.
        """
        for axes in (1, 2):
            first, last = self._column(one, axes), self._column(other, axes)
            if first is None or last is None or not self._same_rows(one, other, axes):
                continue
            (left, at), (right, place) = first, last
            values = [self.reading.replay.tensor(node)[_at(where)] for node, where in (first, last)]
            if values[0].shape != values[1].shape:
                continue
            sign = _same_or_opposite(number * values[0], second * values[1])
            if sign != 0 and any(self.program.made_of(node) is None for node in (left, right)):
                self.may_change = True
            elif sign != 0:
                self._rely(left, right, Alike(at, place, number, second, sign))
                return sign
        return 0

    def _column(self, leaf: Factor, axes: int) -> tuple[fx.Node, tuple[int, ...]] | None:
        """The stored table a leaf is an element of, and its channel: what tables are compared by at every position."""
        channels = leaf.index[-axes:]
        if (
            len(leaf.index) < axes
            or leaf.part != "value"
            or any(bool((at != at[0]).any()) for at in channels)
        ):
            return None
        node = table_of(leaf.node, axes) or leaf.node
        if self.program.taints[node] is not Taint.STRUCTURE or any(
            map(is_symbolic, require_fake(node).shape)
        ):
            return None
        return node, tuple(int(at[0]) for at in channels)

    def _same_rows(self, one: Factor, other: Factor, axes: int) -> bool:
        """Whether two elements stand at the same positions of their tables, their channels aside."""
        if not all(map(torch.equal, one.index[:-axes], other.index[:-axes])):
            return False
        numbers, names = self.program.value_numbers, {op_name(one.node), op_name(other.node)}
        if numbers[one.node] == numbers[other.node] or names.isdisjoint(_LOOKUPS):
            return True
        rows = [frozen(leaf.node.args[1:], numbers.__getitem__) for leaf in (one, other)]
        return len(names) == 1 and rows[0] == rows[1]

    def _rely(self, one: fx.Node, other: fx.Node, fact: Alike) -> None:
        """What was found of two columns holds as long as the table does, or the columns of what is kept."""
        program = self.program
        if one is other and one in program.kept:
            program.rely(one, [fact])
            return
        for node in (one, other):
            rely_on_numbers(program, node, self.reading.replay)

    def same_element(self, one: Factor | None, other: Factor | None) -> bool:
        if one is None or other is None:
            return False
        if one.part != other.part:
            return False
        return self._same_place(one, other) or (one.part in ("cos", "sin") and self.same_angle(one, other))

    def _same_place(self, one: Factor, other: Factor) -> bool:
        """The same elements of the same value."""
        numbers = self.program.value_numbers
        return numbers[one.node] == numbers[other.node] and all(
            torch.equal(a, b) for a, b in zip(one.index, other.index, strict=True)
        )

    def same_angle(self, one: Factor | None, other: Factor | None, *, even: bool = False) -> bool:
        """Whether two angles are equal; `even`: or opposite."""
        if one is not None and other is not None and self._same_place(one, other):
            return True
        first, second = self.angle(one), self.angle(other)
        if first is None or second is None or len(first[1]) != len(second[1]):
            return False
        if first[0] != second[0] and not (even and first[0] == -second[0]):
            return False
        pairs = zip(first[1], second[1], strict=True)
        return all(self.same_element(a, b) or self._hold(a, b) == 1 for a, b in pairs)

    def apart(self, one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether two angles are set apart by nothing but which elements of one value they read."""
        ends = self.resolve(*one), self.resolve(*other)
        first, second = (self.angle(end.leaf) if end.kind in ("cos", "sin") else None for end in ends)
        if first is None or second is None or (first[0], len(first[1])) != (second[0], len(second[1])):
            return False
        pairs = [pair for pair in zip(first[1], second[1], strict=True) if not self.same_element(*pair)]
        numbers = self.program.value_numbers
        return bool(pairs) and all(numbers[a.node] == numbers[b.node] and a.part == b.part for a, b in pairs)

    def angle(
        self, factor: Factor | None, read: Read | None = None
    ) -> tuple[float, tuple[Factor, ...]] | None:
        """The angle as number times a product of elements, or None when it is a sum; `read` goes back to the leaves."""
        if factor is None:
            return None
        rows = torch.arange(factor.index[0].numel()) if factor.index else self.samples
        terms = (read or self.reading.reader.position)(factor.node, factor.index, rows)
        if (
            len(terms) != 1
            or len(terms[0].rows) != len(rows)
            or any(leaf.part in ("cos", "sin") for leaf in terms[0].factors)
        ):
            return None
        number = terms[0].constant()
        return None if number is None else (number, terms[0].factors)

    def resolve(self, out: int, source: int) -> Resolved:
        """Follow one coefficient back to a trigonometric function of an angle, or to a table."""
        key = (out, source)
        if key not in self.resolved:
            entry = self.entry(key)
            self.resolved[key] = self._follow(entry.number, entry.factors, self.samples)
        return self.resolved[key]

    def _follow(self, own: float, factors: tuple[Factor, ...], samples: Tensor) -> Resolved:
        table = Resolved("table", own, factors[0] if len(factors) == 1 else None)
        terms = [unit(samples)]
        try:
            for factor in factors:
                terms = multiply(terms, self.reading.reader.element(factor, samples))
        except Unreadable:
            return table
        constant = _constant(terms, samples)
        if constant is not None:
            return Resolved("number", own * constant, None)
        if len(terms) == 1 and len(terms[0].factors) > 1 and len(terms[0].rows) == len(samples):
            return replace(table, product=terms[0])
        if any(len(term.factors) != 1 for term in terms):
            return table
        if len(terms) != 1 or len(terms[0].rows) != len(samples):
            return self._joined(table, terms, samples)
        number, leaf = terms[0].constant(), terms[0].factors[0]
        if number is None:
            return table
        return Resolved(leaf.part if leaf.part in ("cos", "sin") else "table", own * number, leaf)

    def _joined(self, table: Resolved, terms: list[Term], samples: Tensor) -> Resolved:
        """A table with its pieces, where every sampled token belongs to exactly one."""
        if table.leaf is None or len(terms) < 2:
            return table
        rows = torch.cat([term.rows for term in terms])
        if not torch.equal(rows.sort().values, samples):
            return table
        pieces = sorted(terms, key=lambda term: int(term.rows[0]))
        return replace(table, pieces=tuple(pieces))


@dataclass(frozen=True)
class Alike:
    """The fact that two columns of a table, each times a number, are equal, or (`sign` -1) opposite."""

    one: tuple[int, ...]
    other: tuple[int, ...]
    number: float
    second: float
    sign: int

    def __call__(self, tensor: Tensor) -> bool:
        left, right = (
            exact(tensor[_at(at)]) * number
            for at, number in ((self.one, self.number), (self.other, self.second))
        )
        return _same_or_opposite(left, right) == self.sign


def _constant(terms: list[Term], samples: Tensor) -> float | None:
    """The number a coefficient is at every token, as the model's code has it (zeros and ones beside a table)."""
    if not terms:
        return 0.0
    alone = len(terms) == 1 and not terms[0].factors and len(terms[0].rows) == len(samples)
    return terms[0].constant() if alone else None


def sign_of(number: float) -> int:
    """1 for a positive number, -1 for any other."""
    return 1 if number > 0 else -1


def _same_or_opposite(left: Tensor, right: Tensor) -> int:
    """1 if equal, -1 if opposite, 0 if neither or nothing but zeros."""
    bound = _EQUAL * max(float(left.abs().max()), 1e-30)
    if not bool((left.abs() > bound).any()):
        return 0
    if float((left - right).abs().max()) <= bound:
        return 1
    return -1 if float((left + right).abs().max()) <= bound else 0


def element_values(replay: Replay, factor: Factor) -> Tensor:
    """Values of the elements a factor addresses, in fp64."""
    value = replay.tensor(factor.node)
    element = value[factor.index] if factor.index else value.reshape(1)
    if factor.part in ("cos", "sin"):
        return torch.cos(element) if factor.part == "cos" else torch.sin(element)
    if factor.part in ("real", "imag"):
        return element.real if factor.part == "real" else element.imag
    return 1 / element if factor.part == "reciprocal" else element


def _at(channel: tuple[int, ...]) -> tuple[EllipsisType | int, ...]:
    return (..., *channel)


def scaled_turns(lengths: Tensor, tolerance: float) -> Miss | None:
    """A miss where planes are turned and scaled as well, `lengths` [planes, tokens] telling by how much."""
    low, high = float(lengths.min()), float(lengths.max())
    if high - low <= tolerance * high:
        return None
    by_token = bool(((lengths.amax(1) - lengths.amin(1)) > tolerance * high).any())
    which = "the token, as xPos does" if by_token else "the plane"
    return Miss(
        "orthogonal",
        f"channels are turned and also scaled, by {low:.3g} to {high:.3g} depending on {which}: cos^2 + sin^2 of the "
        "tables is not constant, so this is not orthogonal and no rotation times a constant",
        4,
        "a rotation of these planes, times a scale of its own for each token" if by_token else "a rotation",
    )
