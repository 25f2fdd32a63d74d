"""Prove that a mask is the causal one: exactly the keys behind a query, at every length.

What: triangles of ones, comparisons of the numbers of query and key, buffers that hold a triangle, their negations, and
    what the fused attention is told. At a single length a mask made of constants is looked at as a whole.
Leaves alone: windows, padding, anything that depends on an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.clocks import counted_by
from grape_compile.passes.filled import filled
from grape_compile.passes.graph import Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import IDENTITIES, operand_of
from grape_compile.passes.operands import Axis, Operand
from grape_compile.passes.score_terms import ScoreTerm, constant
from grape_compile.passes.scores import DEAD, KEY, QUERY, Scores, as_key
from grape_compile.passes.terms import Factor, Index, broadcast

_ONES = {"aten::ones", "aten::ones_like", "aten::new_ones"}
_RELATIONS = {"aten::gt": (1, True), "aten::lt": (-1, True), "aten::ge": (-1, False), "aten::le": (1, False)}
"""Which sign of (key - query) and which truth value make a relation say "in the future"."""

_OF_WHOLE_NUMBERS = {
    ("aten::ge", 1): "aten::gt",
    ("aten::lt", 1): "aten::le",
    ("aten::le", -1): "aten::lt",
    ("aten::gt", -1): "aten::ge",
}
"""Comparisons with one and minus one as those with zero."""
_NOT = {"aten::logical_not", "aten::bitwise_not"}
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
        return self.scores.is_square and all(self._says_causal(term, never) for term in masks)

    def _says_causal(self, term: ScoreTerm, never: float) -> bool:
        view = self._view(term)
        if view is None:
            return False
        if term.dead is not None:
            return term.value <= never and self.seen(view) is (not term.dead)
        if view.axes[-2:] != (Axis(QUERY), Axis(KEY)) or not self.scores.is_full(view):
            return False
        filled, diagonal = self._triangle(term)
        if filled <= never and diagonal == 1:
            return True
        node = self._unmoved(view).node
        fact = Future(term.factor, never, term.finished)
        if self.program.made_of(node) is None:
            return False
        if not self.scores.replay.once(fact, [node], lambda: fact(self._numbers(node))):
            return False
        if node in self.program.kept:
            self.scores.rely(node, fact)
        else:
            self.scores.rely_on_numbers([node])
        return True

    def _hides_the_future(self, term: ScoreTerm) -> bool:
        view, dead = self._view(term), term.dead
        if view is not None and dead is not None and term.value <= DEAD and self._says_future(view, dead):
            return True
        filled, diagonal = self._triangle(term)
        if view is not None and filled <= DEAD and diagonal <= 1:
            return view.axes[-2:] == (Axis(QUERY), Axis(KEY))
        if not self.scores.is_static or not self.scores.are_known([term]):
            return False
        alive = self.scores.alive([term])
        if bool(alive.expand(*alive.shape[:-2], *self.scores.shape[QUERY:]).triu(1).any()):
            return False
        self.scores.rely_on_numbers([term.node])
        return True

    def _triangle(self, term: ScoreTerm) -> tuple[float, int]:
        """What an additive mask adds from which diagonal on, and zero elsewhere; zero where it is made otherwise."""
        node = term.node
        if term.dead is not None or op_name(node) != "aten::triu":
            return 0.0, 0
        filled = operand_of(node, 0)
        value = constant(filled.args[1]) if op_name(filled) == "aten::full" else None
        return (value or 0.0) * term.factor, self._diagonal(node)

    def _view(self, term: ScoreTerm) -> Operand | None:
        lead, index, _ = self.scores.samples(term)
        return self.scores.view(Factor(term.node, index), lead)

    def _says_future(self, view: Operand, dead: bool) -> bool:
        """Whether a value is `dead` for all later keys, be it for others as well."""
        seen = self.seen(view)
        if seen is not None:
            return seen is not dead
        if op_name(view.node) in _NOT:
            return self._says_future(replace(view, node=operand_of(view.node, 0)), not dead)
        if op_name(view.node) not in (_ANY if dead else _ALL):
            return False
        lead = self.scores.places()
        index = self.scores.along(view, lead)
        operands = [each for each in view.node.args if isinstance(each, fx.Node)]
        places = [broadcast(index, self.scores.sizes.shape(operand)) for operand in operands]
        views = [self.scores.view(Factor(*each), lead) for each in zip(operands, places, strict=True)]
        return any(each is not None and self._says_future(each, dead) for each in views)

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
        if name in IDENTITIES | _NOT:
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
            return self._relation(view, name)
        if name in _ALL and (other := _beside_ones(node)) is not None:
            return self._seen(replace(view, node=other))
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
            if inner is None or not {QUERY, KEY} <= set(inner.token_axes):
                break
            if any((axis.offset, axis.stride) != (0, 1) for axis in inner.axes if axis.role != "fixed"):
                break
            view = inner
        return view

    def _diagonal(self, node: fx.Node) -> int:
        given = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
        return given if isinstance(given, int) else 1 << 30

    def _relation(self, view: Operand, name: str) -> bool | None:
        """`key > query` and the like, of numbers counted from the same start."""
        node, lead = view.node, self.scores.places()
        bound = node.args[1]
        if (
            isinstance(bound, int)
            and bound in (1, -1)
            and not require_fake(operand_of(node, 0)).is_floating_point()
        ):
            name, bound = (
                _OF_WHOLE_NUMBERS.get((name, bound), name),
                0 if (name, bound) in _OF_WHOLE_NUMBERS else bound,
            )
        sign, future = _RELATIONS[name]
        index = self.scores.along(view, lead)
        try:
            apart = []
            for side, operand in ((1, node.args[0]), (-1, bound)):
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
        """A triangle of constants or in a kept tensor, looked at as a whole."""
        value = fake(node)
        if self.program.made_of(node) is None or value is None or value.dim() < 2:
            return None
        fact = "triangle", exchanged
        try:
            seen = self.scores.replay.once(fact, [node], lambda: _triangle(self._numbers(node), exchanged))
        except Unreadable:
            return None
        if seen is not None:
            self.scores.rely_on_numbers([node])
        return seen

    def _numbers(self, node: fx.Node) -> Tensor:
        held = self.program.values[node] if node in self.program.kept else self.scores.replay.tensor(node)
        assert isinstance(held, Tensor)
        return held


def _beside_ones(node: fx.Node) -> fx.Node | None:
    """What is multiplied by ones alone, or joined to what is true everywhere."""
    left = [
        each
        for each in node.all_input_nodes
        if op_name(each) not in _ONES and filled(each, op_name(each)) != 1
    ]
    if len(left) != 1 or len(node.all_input_nodes) != 2:
        return None
    shapes = [list(map(str, require_fake(each).shape)) for each in (node, left[0])]
    return left[0] if shapes[0] == shapes[1] else None


def _triangle(held: Tensor, exchanged: bool) -> bool | None:
    """True for ones in the lower triangle, False for ones above it, None for anything else."""
    held = (held.mT if exchanged else held).double()
    behind = torch.ones(held.shape[-2:], dtype=torch.float64, device=held.device).tril()
    if bool((held == behind).all()):
        return True
    return False if bool((held == 1 - behind).all()) else None


@dataclass(frozen=True)
class Future:
    """The fact that a tensor, times a factor, is as low as `never` at all later keys and nowhere else.

    There it adds nothing, or (`finished`) a bias.
    """

    factor: float
    never: float
    finished: bool

    def __call__(self, tensor: Tensor) -> bool:
        later = torch.ones(tensor.shape[-2:], dtype=torch.bool, device=tensor.device).triu(1)
        for each in tensor.reshape(-1, *tensor.shape[-2:]):
            hidden = each * self.factor <= self.never
            if not torch.equal(hidden, later) or not (self.finished or bool((each[~later] == 0).all())):
                return False
        return True


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
