"""Name path integrals: biases that sum edges between key and query (GRAPE-AP, GRAPE 5.1-5.2).

What: sums over l = j+1 ... t of slope_h * g(<p_t, r_l> * number), written as the row's total less its cumulative sum,
    as a cumulative sum from the end less the edge at j, or that sum moved on by one. Up to a constant per row, which
    softmax ignores, all are one path; edges behind the query count for nothing where no query sees a later key.
Leaves alone: sums that include the edge at j, run along another axis, or whose edges are masked by something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from grape_compile.encoding import Identity, Link, LogSigmoid, NegativeExp
from grape_compile.passes.addends import Addend, AddendReader, cumsum_dim, log_sigmoid_of
from grape_compile.passes.causal import CausalMasks
from grape_compile.passes.contractions import Contraction
from grape_compile.passes.graph import Unreadable, fake, op_name
from grape_compile.passes.movement import ints, operand_of
from grape_compile.passes.operands import Axis, Operand
from grape_compile.passes.score_terms import ScoreTerm, constant
from grape_compile.passes.scores import KEY, QUERY, Scores
from grape_compile.passes.terms import Index, broadcast


@dataclass(frozen=True)
class PathPart:
    """number * prod(slopes) * sum over l = j+1 ... t of link(<query_t, key_l> / dim), of vectors `dim` long."""

    number: float
    slopes: tuple[Operand, ...]
    link: Link
    dim: int
    query: Operand
    key: Operand
    only: tuple[int, ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything this is made of."""
        return (*self.slopes, self.query, self.key)


@dataclass(frozen=True)
class _Edges:
    """number * prod(heads) * link(`product`), `masked` where it is zero for every edge behind the query."""

    number: float
    heads: tuple[Operand, ...]
    link: Link
    product: Addend
    masked: bool


class Paths:
    """Looks for path integrals among the addends of one layer."""

    def __init__(
        self,
        scores: Scores,
        reader: AddendReader,
        lead: Index,
        masks: Sequence[ScoreTerm],
        causal: CausalMasks,
    ) -> None:
        self.scores, self.reader, self.lead = scores, reader, lead
        self.masks, self.causal = masks, causal

    def find(self, rest: list[Addend]) -> tuple[PathPart, list[Addend]] | None:
        """One path integral, and the addends it is made of."""
        for addend in rest:
            if len(addend.pairs) != 1 or addend.keys or addend.queries or not self.scores.is_square:
                continue
            try:
                found = self._from_the_start(addend, rest) or self._from_the_end(addend, rest)
            except Unreadable:
                continue
            if found is not None:
                return found
        return None

    def _from_the_start(self, addend: Addend, rest: list[Addend]) -> tuple[PathPart, list[Addend]] | None:
        """-sum over l <= j: the path, less the total of the row."""
        (pair,) = addend.pairs
        if not self._runs_along_keys(pair, pair.node):
            return None
        edges = operand_of(pair.node, 0)
        part = self._part(addend, replace(pair, node=edges), -addend.number)
        return None if part is None else (part, [addend])

    def _from_the_end(self, addend: Addend, rest: list[Addend]) -> tuple[PathPart, list[Addend]] | None:
        """The sum over l >= j, less the edge at j; or read at j + 1."""
        (pair,) = addend.pairs
        moved = _moved_on(pair.node)
        outer = pair.node if moved is None else moved
        edges = self._summed_from_the_end(pair, outer)
        if edges is None:
            return None
        view = replace(pair, node=edges)
        part = self._part(addend, view, addend.number)
        if part is None or moved is not None:
            return None if part is None else (part, [addend])
        own = self.reader.elements(edges, self.scores.along(view, self.lead), self.lead)
        partner = self.reader.product(replace(addend, number=-addend.number, pairs=()), own[0])
        return (part, [addend, partner]) if len(own) == 1 and partner in rest else None

    def _summed_from_the_end(self, pair: Operand, outer: fx.Node) -> fx.Node | None:
        """The edges of flip(cumsum(flip(edges)))."""
        if op_name(outer) != "aten::flip":
            return None
        total = operand_of(outer, 0)
        if not self._runs_along_keys(pair, total):
            return None
        inner = operand_of(total, 0)
        dim = cumsum_dim(total)
        if op_name(inner) != "aten::flip" or any(
            [each % len(pair.axes) for each in ints(node.args[1])] != [dim] for node in (outer, inner)
        ):
            return None
        return operand_of(inner, 0)

    def _runs_along_keys(self, pair: Operand, total: fx.Node) -> bool:
        dim = cumsum_dim(total)
        return dim is not None and pair.part == "value" and pair.axes[dim] == Axis(KEY)

    def _part(self, addend: Addend, view: Operand, number: float) -> PathPart | None:
        edges = self._edges(view.node, self.scores.along(view, self.lead))
        if edges is None or not (edges.masked or self.causal.hide_the_future(self.masks)):
            return None
        product = edges.product
        if len(product.pairs) != 1 or product.heads or product.keys or product.queries:
            return None
        pair = product.pairs[0]
        behind = self.reader.contraction_behind(pair.node, self.scores.along(pair, self.lead))
        views = None if behind is None else self._sides(*behind)
        if behind is None or views is None:
            return None
        found, (query, key) = behind[0], views
        query = replace(query, scale=product.number * found.size)
        heads = self.reader.product(replace(addend, pairs=()), Addend(1.0, edges.heads)).heads
        return PathPart(number * edges.number, heads, edges.link, found.size, query, key, addend.only)

    # -- edges ---------------------------------------------------------------------------------------------------------

    def _edges(self, node: fx.Node, index: Index, masked: bool = False) -> _Edges | None:
        """What is summed up, freed of its masks."""
        addends = self.reader.elements(node, index, self.lead)
        if len(addends) != 1 or addends[0].keys or addends[0].queries:
            return None
        addend = addends[0]
        held = [pair for pair in addend.pairs if self.causal.seen(pair) is not True]
        masked = masked or len(held) < len(addend.pairs)
        if len(held) != 1:
            return None
        (pair,) = held
        at = self.scores.along(pair, self.lead)
        inner = self._unmasked(pair, at)
        if inner is None:
            return self._linked(addend, pair, at, masked)
        found = self._edges(inner, broadcast(at, self.scores.sizes.shape(inner)), True)
        if found is None:
            return None
        joined = self.reader.product(replace(addend, pairs=()), Addend(found.number, found.heads))
        return replace(found, number=joined.number, heads=joined.heads)

    def _unmasked(self, pair: Operand, at: Index) -> fx.Node | None:
        """What a value is for seen keys, where it is zero for later ones."""
        kept, filled = self.causal.kept(pair, at, self.lead)
        return kept if constant(filled) == 0 else None

    def _linked(self, addend: Addend, pair: Operand, at: Index, masked: bool) -> _Edges | None:
        """The link of an edge, with its sign: log sigmoid(x) = -softplus(-x)."""
        node, name = pair.node, op_name(pair.node)
        link: Link = LogSigmoid()
        sign, inside = 1.0, 1.0
        operand = log_sigmoid_of(node)
        if (
            operand is None
            and name == "aten::softplus"
            and not node.kwargs
            and list(node.args[1:]) in ([], [1], [1.0])
        ):
            operand, sign, inside = operand_of(node, 0), -1.0, -1.0
        elif operand is None and name == "aten::exp":
            operand, sign, link = operand_of(node, 0), -1.0, NegativeExp()
        elif operand is None:
            return _Edges(addend.number, addend.heads, Identity(), Addend(1.0, pairs=(pair,)), masked)
        products = self.reader.elements(operand, broadcast(at, self.scores.sizes.shape(operand)), self.lead)
        if len(products) != 1:
            return None
        product = replace(products[0], number=inside * products[0].number)
        return _Edges(sign * addend.number, addend.heads, link, product, masked)

    def _sides(self, found: Contraction, index: Index) -> tuple[Operand, Operand] | None:
        """The vectors of query and key that a product of both contracts, with their last axis as planes."""
        samples = self.lead[0].numel()
        lead = tuple(axis.repeat(found.size) for axis in self.lead)
        index = tuple(axis.repeat(found.size) for axis in index)
        plane = torch.arange(found.size).repeat_interleave(samples)
        views = []
        for node, pick in ((found.left, found.left_at), (found.right, found.right_at)):
            view = self.reader.seen_in(node, pick(index, plane), lead, plane, found.size)
            if view is None or not view.has_planes:
                return None
            views.append(self.reader.stripped(view, lead, plane, found.size))
        roles = [set(view.token_axes) & {QUERY, KEY} for view in views]
        if roles == [{QUERY}, {KEY}]:
            return views[0], views[1]
        return (views[1], views[0]) if roles == [{KEY}, {QUERY}] else None


def _moved_on(node: fx.Node) -> fx.Node | None:
    """The value of which a node holds the next element along its last axis, and a zero at the end."""
    if op_name(node) not in ("aten::pad", "aten::constant_pad_nd") or list(ints(node.args[1])) != [0, 1]:
        return None
    if any(value not in (None, 0, 0.0, "constant") for value in (*node.args[2:], *node.kwargs.values())):
        return None
    cut = operand_of(node, 0)
    value = fake(cut)
    if op_name(cut) != "aten::slice" or value is None or len(cut.args) < 3 or len(cut.args) > 4:
        return None
    dim, start = cut.args[1], cut.args[2]
    whole = len(cut.args) < 4 or (isinstance(cut.args[3], int) and cut.args[3] >= 1 << 62)
    return operand_of(cut, 0) if dim in (-1, value.dim() - 1) and start == 1 and whole else None
