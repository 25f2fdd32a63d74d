"""Prove that a mask is the causal one: exactly the keys behind a query, at every length.

What: triangles of ones, comparisons of the numbers of query and key, buffers that hold a triangle, their negations, and
    what the fused attention is told. At a single length a mask made of constants is looked at as a whole.
Leaves alone: windows, padding, anything that depends on an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.clocks import counted_by
from grape_compile.passes.graph import Taint, Unreadable, fake, op_name
from grape_compile.passes.movement import IDENTITIES, operand_of
from grape_compile.passes.operands import Axis, Operand
from grape_compile.passes.score_terms import ScoreTerm, constant
from grape_compile.passes.scores import DEAD, KEY, QUERY, Scores, as_key
from grape_compile.passes.terms import Factor, Index, broadcast

_ONES = {"aten::ones", "aten::ones_like", "aten::new_ones"}
_RELATIONS = {"aten::gt": (1, True), "aten::lt": (-1, True), "aten::ge": (-1, False), "aten::le": (1, False)}
"""Which sign of (key - query) and which truth value make a relation say "in the future"."""

_ALL = {"aten::__and__", "aten::bitwise_and", "aten::logical_and", "aten::mul"}
_ANY = {"aten::__or__", "aten::bitwise_or", "aten::logical_or", "aten::add"}


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
            term.dead is not None and term.value <= never and self._shown(term) is (not term.dead)
            for term in masks
        )

    def _hides_the_future(self, term: ScoreTerm) -> bool:
        if term.dead is not None and term.value <= DEAD:
            view = self._view(term)
            if view is not None and self._says_future(view, term.dead):
                return True
        if term.dead is None and op_name(term.node) == "aten::triu" and self._diagonal(term.node) <= 1:
            filled, view = operand_of(term.node, 0), self._view(term)
            value = constant(filled.args[1]) if op_name(filled) == "aten::full" else None
            if value is not None and value * term.factor <= DEAD and view is not None:
                return view.axes[-2:] == (Axis(QUERY), Axis(KEY))
        if not self.scores.is_static or self.program.taints[term.node] is not Taint.STRUCTURE:
            return False
        alive = self.scores.alive([term])
        return not bool(alive.expand(*alive.shape[:-2], *self.scores.shape[QUERY:]).triu(1).any())

    def _view(self, term: ScoreTerm) -> Operand | None:
        lead, index, _ = self.scores.samples(term)
        return self.scores.view(Factor(term.node, index), lead)

    def _says_future(self, view: Operand, dead: bool) -> bool:
        """Whether a value is `dead` for all later keys, be it for others as well."""
        seen = self.seen(view)
        if seen is not None:
            return seen is not dead
        if op_name(view.node) not in (_ANY if dead else _ALL):
            return False
        lead = self.scores.places()
        index = self.scores.along(view, lead)
        operands = [each for each in view.node.args if isinstance(each, fx.Node)]
        places = [broadcast(index, self.scores.sizes.shape(operand)) for operand in operands]
        views = [self.scores.view(Factor(*each), lead) for each in zip(operands, places, strict=True)]
        return any(each is not None and self._says_future(each, dead) for each in views)

    def _shown(self, term: ScoreTerm) -> bool | None:
        view = self._view(term)
        return None if view is None else self.seen(view)

    def seen(self, view: Operand) -> bool | None:
        """True where a value is true exactly for keys not after the query, False for the opposite, None for neither."""
        if view.part != "value" or set(view.token_axes) != {QUERY, KEY} or not self.scores.is_full(view):
            return None
        return self._seen(view)

    def for_seen(self, pair: Operand, at: Index, lead: Index) -> fx.Node | float | None:
        """What a value is for seen keys: a triangle is a number, what one is cut out of is whole."""
        if self.program.taints[pair.node] is Taint.STRUCTURE and self.scores.is_full(pair):
            seen = self.seen(pair)
            if seen is not None:
                return float(seen)
        return self.kept(pair, at, lead)[0]

    def kept(self, pair: Operand, at: Index, lead: Index) -> tuple[fx.Node | None, object]:
        """What a value is for seen keys, where a triangle is cut out of it, and what it is for later ones.

        `at` are the elements of the value that the view `pair` reads for the places `lead`.
        """
        node, name, args = pair.node, op_name(pair.node), pair.node.args
        if name == "aten::tril" and _exchanged(pair) is False:
            return (operand_of(node, 0), 0.0) if self._diagonal(node) == 0 else (None, None)
        if name not in ("aten::masked_fill", "aten::where") or pair.part != "value":
            return None, None
        mask, one, other = (args[1], args[2], args[0]) if name == "aten::masked_fill" else args
        if not isinstance(mask, fx.Node):
            return None, None
        view = self.scores.view(Factor(mask, broadcast(at, self.scores.sizes.shape(mask))), lead)
        seen = None if view is None else self.seen(view)
        kept, filled = (one, other) if seen else (other, one)
        return (kept, filled) if seen is not None and isinstance(kept, fx.Node) else (None, None)

    def _seen(self, view: Operand) -> bool | None:
        view = self._unmoved(view)
        node, name = view.node, op_name(view.node)
        if name in IDENTITIES | {"aten::logical_not", "aten::bitwise_not"}:
            inner = self._seen(replace(view, node=operand_of(node, 0)))
            return inner if name in IDENTITIES else _opposite(inner)
        if (
            name in ("aten::eq", "aten::ne")
            and not isinstance(node.args[1], fx.Node)
            and node.args[1] in (0, 1)
        ):
            inner = self._seen(replace(view, node=operand_of(node, 0)))
            return inner if (name == "aten::eq") == (node.args[1] == 1) else _opposite(inner)
        if name in _RELATIONS:
            return self._relation(view, *_RELATIONS[name])
        exchanged = _exchanged(view)
        if exchanged is None:
            return None
        if name in ("aten::tril", "aten::triu") and op_name(operand_of(node, 0)) in _ONES:
            # With the axes exchanged, what is below the diagonal is above it.
            lower = (name == "aten::tril") is not exchanged
            diagonal = -self._diagonal(node) if exchanged else self._diagonal(node)
            return lower if diagonal == (0 if lower else 1) else None
        return self._by_value(node, exchanged)

    def _unmoved(self, view: Operand) -> Operand:
        """The same truth before it was moved about, as long as both axes are seen from their start on."""
        lead = self.scores.places()
        while (moved := self.reader.moved(view.node, self.scores.along(view, lead))) is not None:
            inner = self.scores.view(Factor(*moved), lead)
            if inner is None or set(inner.token_axes) != {QUERY, KEY}:
                break
            if any((axis.offset, axis.stride) != (0, 1) for axis in inner.axes if axis.role != "fixed"):
                break
            view = inner
        return view

    def _diagonal(self, node: fx.Node) -> int:
        given = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
        return given if isinstance(given, int) else 1 << 30

    def _relation(self, view: Operand, sign: int, future: bool) -> bool | None:
        """`key > query` and the like, of numbers counted from the same start."""
        node, lead = view.node, self.scores.places()
        index = self.scores.along(view, lead)
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

    def _by_value(self, node: fx.Node, exchanged: bool) -> bool | None:
        """A constant triangle, looked at as a whole."""
        if self.program.taints[node] is not Taint.STRUCTURE:
            return None
        value = fake(node)
        if value is None or value.dim() < 2 or any(not isinstance(size, int) for size in value.shape):
            return None
        try:
            held = self.scores.replay.tensor(node).double()
        except Unreadable:
            return None
        held = held.mT if exchanged else held
        behind = torch.ones(held.shape[-2:], dtype=torch.float64).tril()
        if bool((held == behind).all()):
            return True
        return False if bool((held == 1 - behind).all()) else None


def _exchanged(view: Operand) -> bool | None:
    """Whether the last two axes are key and query; None where they are not query and key either."""
    roles = [axis.role for axis in view.axes[-2:]]
    return None if set(roles) != {QUERY, KEY} else roles[0] == KEY


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
