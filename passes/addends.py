"""Read what is added to the scores as a sum of products of values that see one of query and key each.

An added value b[b, h, t, j] is followed back through sums, products and movement until every part depends on the
query or on the key alone, or cannot be followed further. What results is a polynomial

    sum of number * product of atoms,

an atom being a value seen through the axes batch, head and one of query and key (or both, where reading stopped).
ALiBi, gated slopes, forgetting and sums of them are different shapes of this one reading. Indices are read, never data,
so what is found holds for activations as for constants, and at every length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from grape_compile.passes.contractions import Contraction, contraction, renamed
from grape_compile.passes.elements import PRODUCTS, Reader
from grape_compile.passes.filled import is_zero_tensor
from grape_compile.passes.graph import Taint, Unreadable, fake, op_name
from grape_compile.passes.movement import (
    JOINS,
    SINGLE,
    SPLITS,
    is_frozen,
    join_dim,
    keeps_numbers,
    move,
    operand_of,
)
from grape_compile.passes.operands import Operand
from grape_compile.passes.pieces import PADS
from grape_compile.passes.score_terms import ScoreTerm
from grape_compile.passes.scores import HEAD, KEY, QUERY, Scores
from grape_compile.passes.terms import Factor, Index, Term, broadcast, unit


@dataclass(frozen=True)
class Addend:
    """`number` times a product of views: per head, along the query, along the key, and along both.

    `only` are the heads it is added in, where not in all of them.
    """

    number: float
    heads: tuple[Operand, ...] = ()
    queries: tuple[Operand, ...] = ()
    keys: tuple[Operand, ...] = ()
    pairs: tuple[Operand, ...] = ()
    only: tuple[int, ...] = ()


Kept = Callable[[Operand, Index, Index], fx.Node | float | None]
"""What a value that sees query and key, through a view and at the elements it reads for places, is for keys seen."""


class AddendReader:
    """Reads the terms of one layer; with `kept`, as what they are for the keys that a query sees."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.kept: Kept | None = None
        self.program = scores.program
        self.reader = Reader(scores.program, scores.replay)

    def read(self, terms: Sequence[ScoreTerm]) -> list[Addend]:
        """The polynomial of the sum of all terms, equal products merged; Unreadable where an element is of no view."""
        total: dict[Addend, float] = {}
        for term in terms:
            lead, index, rows = self.scores.samples(term)
            for addend in self._read(term.node, index, rows, lead):
                key = replace(addend, number=1.0)
                total[key] = total.get(key, 0.0) + addend.number * term.factor
        if any(addend.only for addend in total) and not self.scores.every_head:
            self.scores.every_head = True
            return self.read(terms)
        return [replace(key, number=number) for key, number in total.items() if number != 0.0]

    def operand(self, view: Operand, lead: Index, node: fx.Node) -> list[Addend]:
        """The polynomial of another value, seen as `view` sees its own (the operand of an elementwise operation)."""
        return self.elements(node, self.scores.along(view, lead), lead)

    def elements(self, node: fx.Node, index: Index, lead: Index) -> list[Addend]:
        """The polynomial of chosen elements of a value."""
        return self._read(node, index, torch.arange(lead[0].numel()), lead)

    def _read(self, node: fx.Node, index: Index, rows: Tensor, lead: Index) -> list[Addend]:
        def back(operand: fx.Node, at: Index, who: Tensor) -> list[Term]:
            return self._back(operand, at, who, lead)

        return [self._addend(term, len(rows), lead) for term in back(node, index, rows)]

    def _back(self, node: fx.Node, index: Index, rows: Tensor, lead: Index) -> list[Term]:
        places = tuple(axis[rows] for axis in lead)
        view = self.scores.view(Factor(node, index), places)
        if self.kept is not None and view is not None and {QUERY, KEY} <= set(view.token_axes):
            inner = self.kept(view, index, places)
            if isinstance(inner, float):
                return [unit(rows).scaled(inner)] if inner else []
            if inner is not None:
                return self._back(inner, broadcast(index, self.scores.sizes.shape(inner)), rows, lead)
        if is_zero_tensor(node):
            return []
        if view is not None and log_sigmoid_of(node) is not None:
            return [unit(rows, Factor(node, index))]
        leaf = None if view is None else [unit(rows, Factor(node, index))]
        if leaf is not None and view is not None and not self._opens(node, view):
            return leaf
        try:
            return self._pull(node, index, rows, lead)
        except Unreadable:
            if leaf is None:
                raise
            return leaf

    def _pull(self, node: fx.Node, index: Index, rows: Tensor, lead: Index) -> list[Term]:
        """One step back; products of two activations over an axis stay whole."""
        product = contraction(node, self.scores.sizes)
        if product is not None and product.size > 1 and self._data((product.left, product.right)) > 1:
            raise Unreadable("a product of two activations over an axis")
        return self.reader.pull(
            node, index, rows, lambda operand, at, who: self._back(operand, at, who, lead)
        )

    def _data(self, operands: Sequence[object]) -> int:
        """How many of these are activations."""
        return sum(isinstance(each, fx.Node) and self.program.taints[each] is Taint.DATA for each in operands)

    def _opens(self, node: fx.Node, view: Operand) -> bool:
        """Whether reading goes on behind a value: where it mixes query and key, or multiplies slope and clock."""
        if op_name(node).startswith("aten::detach"):
            return False
        roles = set(view.token_axes)
        if self._joins_heads(node, view):
            return True
        if {QUERY, KEY} <= roles:
            return op_name(node) not in PADS
        if not roles & {QUERY, KEY} or op_name(node) in JOINS | PADS:
            return False
        return self._scales(node)

    def seen_in(
        self, node: fx.Node, index: Index, lead: Index, plane: Tensor | None = None, planes: int = 1
    ) -> Operand | None:
        """Elements as a view of the value, or of what it was moved from: the latest they lie along the axes of."""
        while True:
            view = self.scores.view(Factor(node, index), lead, plane, planes)
            moved = self.moved(node, index) if view is None else None
            if moved is None:
                return None if view is None else replace(view, node=node)
            node, index = moved

    def contraction_behind(self, node: fx.Node, index: Index) -> tuple[Contraction, Index] | None:
        """The product that a value was moved from, and which elements of it these are."""
        while True:
            found = contraction(node, self.scores.sizes)
            if found is not None:
                return found, index
            moved = self.moved(node, index)
            if moved is None:
                return None
            node, index = moved

    def _joins_heads(self, node: fx.Node, view: Operand) -> bool:
        """Whether biases of several heads are put side by side, or zeros beside them."""
        if self.program.taints[node] is Taint.DATA:
            return False
        if op_name(node) in JOINS:
            return view.axes[join_dim(node)].role == HEAD
        if op_name(node) not in PADS or not isinstance(node.args[1], list | tuple):
            return False
        pairs = zip(node.args[1][::2], node.args[1][1::2], strict=True)
        padded = [axis for axis, amounts in zip(view.axes[::-1], pairs, strict=False) if amounts != (0, 0)]
        return all(axis.role == HEAD for axis in padded)

    def _scales(self, node: fx.Node) -> bool:
        """A product in which an activation has one part at most, or a join, whatever moves it about afterwards."""
        while op_name(node) in SINGLE and fake(node) is not None:
            operand = node.all_input_nodes[0]
            if fake(operand) is None:
                return False
            node = operand
        if op_name(node) == "aten::neg":
            return True
        if op_name(node) in JOINS | PADS:
            return self.program.taints[node] is not Taint.DATA
        return op_name(node) in PRODUCTS and self._data(node.args[:2]) < 2

    def _addend(self, term: Term, samples: int, lead: Index) -> Addend:
        number = term.constant()
        only: tuple[int, ...] = ()
        if len(term.rows) != samples:
            only, lead = self._heads_of(term, lead)
        if number is None:
            raise Unreadable("some entries of the bias are made otherwise than others")
        kinds: dict[str, list[Operand]] = {"heads": [], "queries": [], "keys": [], "pairs": []}
        for factor in term.factors:
            view = self.scores.view(factor, lead)
            if view is None:
                raise Unreadable(f"{factor.node.name} is not read along the axes of the scores")
            view = self.stripped(view, lead)
            roles = set(view.token_axes) & {QUERY, KEY}
            kind = (
                "pairs" if len(roles) == 2 else "queries" if QUERY in roles else "keys" if roles else "heads"
            )
            kinds[kind].append(view)
        heads, queries, keys, pairs = map(self._sorted, kinds.values())
        return Addend(number, heads, queries, keys, pairs, only)

    def _heads_of(self, term: Term, lead: Index) -> tuple[tuple[int, ...], Index]:
        """The heads a term is added in, and its places; Unreadable where it is not added in all of a head."""
        heads = lead[HEAD][term.rows].unique()
        if not torch.equal(term.rows, torch.isin(lead[HEAD], heads).nonzero().flatten()):
            raise Unreadable("some entries of the bias are made otherwise than others")
        return tuple(heads.tolist()), tuple(axis[term.rows] for axis in lead)

    def product(self, one: Addend, other: Addend) -> Addend:
        """The product of two addends."""
        return Addend(
            one.number * other.number,
            self._sorted(one.heads + other.heads),
            self._sorted(one.queries + other.queries),
            self._sorted(one.keys + other.keys),
            self._sorted(one.pairs + other.pairs),
            one.only or other.only,
        )

    def _sorted(self, views: Sequence[Operand]) -> tuple[Operand, ...]:
        order = self.program.order
        return tuple(sorted(views, key=lambda view: (order.get(view.node, -1), str(view.axes), view.part)))

    def stripped(self, view: Operand, lead: Index, plane: Tensor | None = None, planes: int = 1) -> Operand:
        """The same elements seen in the earliest value that holds them and nothing beside them: what it is known by."""
        while True:
            moved = self.moved(view.node, self.scores.along(view, lead, plane))
            if moved is None:
                return view
            operand, index = moved
            earlier = self.scores.view(Factor(operand, index, view.part), lead, plane, planes)
            if earlier is None or not self.scores.is_full(earlier, planes):
                return view
            view = earlier

    def moved(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """One movement back, at any size."""
        name = op_name(node)
        if name not in SINGLE:
            return renamed(node, index)
        if name == "getitem" and op_name(node.all_input_nodes[0]) not in SPLITS:
            return None
        try:
            if is_frozen(node, name) or not keeps_numbers(node):
                return None
            operand, moved = move(node, name, index, self.scores.sizes)
        except Unreadable:
            return None
        return None if fake(operand) is None else (operand, moved)


def cumsum_dim(node: fx.Node) -> int | None:
    """The dimension a cumulative sum runs along; None for anything else."""
    if op_name(node) != "aten::cumsum" or not isinstance(node.args[1], int):
        return None
    value = fake(operand_of(node, 0))
    return None if value is None or value.dim() == 0 else node.args[1] % value.dim()


def log_sigmoid_of(node: fx.Node) -> fx.Node | None:
    """What a value is the log sigmoid of, be it taken apart: min(x, 0) - log1p(exp(-|x|))."""
    if op_name(node) == "aten::log_sigmoid":
        return operand_of(node, 0)
    if op_name(node) == "aten::log" and op_name(operand_of(node, 0)) == "aten::sigmoid":
        return operand_of(operand_of(node, 0), 0)
    if (
        op_name(node) != "aten::sub"
        or node.kwargs
        or not all(isinstance(each, fx.Node) for each in node.args)
    ):
        return None
    least, rest = operand_of(node, 0), operand_of(node, 1)
    for name in ("aten::log1p", "aten::exp", "aten::neg", "aten::abs"):
        if op_name(rest) != name:
            return None
        rest = operand_of(rest, 0)
    operands = [each for each in least.args if each is not rest] if op_name(least) == "aten::minimum" else []
    zero = len(operands) == 1 and isinstance(operands[0], fx.Node) and is_zero_tensor(operands[0])
    return rest if zero else None
