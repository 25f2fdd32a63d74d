"""Prove that a mask is the causal one: exactly the keys behind a query, at every length.

What: triangles of ones, comparisons of the numbers of query and key, buffers that hold a triangle, their negations, and
    what the fused attention is told. At a single length a mask made of constants is looked at as a whole.
Leaves alone: windows, padding, anything that depends on an input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.clocks import counted_by
from grape_compile.passes.graph import Taint, Unreadable, fake, op_name
from grape_compile.passes.movement import CUTS, EXPANDS, IDENTITIES, RESHAPES, operand_of
from grape_compile.passes.score_terms import ScoreTerm, constant
from grape_compile.passes.scores import DEAD, KEY, QUERY, Scores, as_key
from grape_compile.passes.terms import broadcast

_ONES = {"aten::ones", "aten::ones_like", "aten::new_ones"}
_RELATIONS = {"aten::gt": (1, True), "aten::lt": (-1, True), "aten::ge": (-1, False), "aten::le": (1, False)}
"""Which sign of (key - query) and which truth value make a relation say "in the future"."""


class CausalMasks:
    """Looks at the masks of one layer."""

    def __init__(self, scores: Scores, reader: AddendReader) -> None:
        self.scores, self.reader, self.program = scores, reader, scores.program

    def hide_the_future(self, masks: Sequence[ScoreTerm]) -> bool:
        """Whether no query sees a later key, because of one mask at least."""
        if not self.scores.is_square:
            return False
        return self.scores.layer.is_causal or any(map(self._hides_the_future, masks))

    def say_causal(self, masks: Sequence[ScoreTerm], never: float) -> bool:
        """Whether the masks are causal and nothing else, at every length; `never` is what removes an entry for good."""
        return self.scores.is_square and all(
            term.dead is not None and term.value <= never and self.seen(term.node) is (not term.dead)
            for term in masks
        )

    def _hides_the_future(self, term: ScoreTerm) -> bool:
        if term.dead is not None and term.value <= DEAD:
            seen = self.seen(term.node)
            if seen is not None:
                return seen is not term.dead
        if term.dead is None and op_name(term.node) == "aten::triu" and self._diagonal(term.node) <= 1:
            filled = operand_of(term.node, 0)
            value = constant(filled.args[1]) if op_name(filled) == "aten::full" else None
            if value is not None and value * term.factor <= DEAD:
                return True
        if not self.scores.is_static or self.program.taints[term.node] is not Taint.STRUCTURE:
            return False
        alive = self.scores.alive([term])
        return not bool(alive.expand(*alive.shape[:-2], *self.scores.shape[QUERY:]).triu(1).any())

    def seen(self, node: fx.Node) -> bool | None:
        """True where a value is true exactly for keys not after the query, False for the opposite, None for neither."""
        value = fake(node)
        sizes = [str(size) for size in self.scores.symbolic[QUERY:]]
        if value is None or [str(size) for size in value.shape[-2:]] != sizes:
            return None
        return self._seen(node)

    def _seen(self, node: fx.Node) -> bool | None:
        while True:
            name = op_name(node)
            if name not in IDENTITIES | EXPANDS | RESHAPES | CUTS or not self._keeps_triangles(node, name):
                break
            node = operand_of(node, 0)
        if name in ("aten::logical_not", "aten::bitwise_not"):
            return _opposite(self._seen(operand_of(node, 0)))
        if (
            name in ("aten::eq", "aten::ne")
            and not isinstance(node.args[1], fx.Node)
            and node.args[1] in (0, 1)
        ):
            inner = self._seen(operand_of(node, 0))
            return inner if (name == "aten::eq") == (node.args[1] == 1) else _opposite(inner)
        if name in ("aten::tril", "aten::triu") and op_name(operand_of(node, 0)) in _ONES:
            wanted = 0 if name == "aten::tril" else 1
            return name == "aten::tril" if self._diagonal(node) == wanted else None
        if name in _RELATIONS:
            return self._relation(node, *_RELATIONS[name])
        return self._by_value(node)

    def _keeps_triangles(self, node: fx.Node, name: str) -> bool:
        """A movement that leaves the last two axes, or cuts them from their start on."""
        value, inner = fake(node), fake(operand_of(node, 0))
        if value is None or inner is None or inner.dim() < 2:
            return False
        if name == "aten::slice":
            return (node.args[2] if len(node.args) > 2 else 0) in (0, None) and len(node.args) < 5
        if name in CUTS:
            return False
        return list(map(str, value.shape[-2:])) == list(map(str, inner.shape[-2:]))

    def _diagonal(self, node: fx.Node) -> int:
        given = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
        return given if isinstance(given, int) else 1 << 30

    def _relation(self, node: fx.Node, sign: int, future: bool) -> bool | None:
        """`key > query` and the like, of numbers counted from the same start."""
        lead, index, _ = self.scores.samples(ScoreTerm(node))
        try:
            apart = []
            for side, operand in ((1, node.args[0]), (-1, node.args[1])):
                if isinstance(operand, fx.Node):
                    at = broadcast(index, self.scores.sizes.shape(operand))
                    apart += [(side, addend) for addend in self.reader.elements(operand, at, lead)]
                elif operand != 0:
                    return None
        except Unreadable:
            return None
        key = [side * addend.number for side, addend in apart if self._is_count(addend, KEY)]
        query = [side * addend.number for side, addend in apart if self._is_count(addend, QUERY)]
        if len(apart) != 2 or len(key) != 1 or query != [-key[0]]:
            return None
        views = [view for _, addend in apart for view in (*addend.keys, *map(as_key, addend.queries))]
        if not same_count(views[0].node, views[1].node):
            return None
        # (key - query) * number, compared with zero: `sign` is the one of key - query for which it tells the future.
        return (not future) if key[0] * sign > 0 else None

    def _is_count(self, addend: Addend, role: int) -> bool:
        views = addend.keys if role == KEY else addend.queries
        others = addend.queries if role == KEY else addend.keys
        if len(views) != 1 or others or addend.heads or addend.pairs:
            return False
        axis = next(axis for axis in views[0].axes if axis.role == role)
        return views[0].token_axes == (role,) and axis.stride == 1 and counted_by(views[0].node) == 1

    def _by_value(self, node: fx.Node) -> bool | None:
        """A constant triangle, looked at as a whole."""
        if self.program.taints[node] is not Taint.STRUCTURE:
            return None
        value = fake(node)
        if value is None or value.dim() < 2 or any(not isinstance(size, int) for size in value.shape):
            return None
        try:
            held = self.scores.replay.tensor(node).bool()
        except Unreadable:
            return None
        behind = torch.ones(held.shape[-2:], dtype=torch.bool).tril()
        if bool((held == behind).all()):
            return True
        return False if bool((held == ~behind).all()) else None


def _opposite(truth: bool | None) -> bool | None:
    return None if truth is None else not truth


def same_count(one: fx.Node, other: fx.Node) -> bool:
    """Two values that count from the same number on."""
    return one is other or (counts_from_zero(one) and counts_from_zero(other))


def counts_from_zero(node: fx.Node) -> bool:
    """A plain `arange` from zero on, whatever shape and type it was given."""
    while op_name(node) in IDENTITIES | {"aten::unsqueeze"}:
        node = operand_of(node, 0)
    if op_name(node) != "aten::arange":
        return False
    bounds = [each for each in node.args if not isinstance(each, bool)]
    return len(bounds) == 1 or bounds[0] in (0, 0.0)
