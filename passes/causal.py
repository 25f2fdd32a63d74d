"""Prove that a mask is the causal one: exactly the keys behind a query, at every length.

What: triangles of ones, comparisons of the numbers of query and key, buffers that hold a triangle, their negations, and
    what the fused attention is told. At a single length a mask made of constants is looked at as a whole.
Leaves alone: windows, padding, anything that depends on an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.clocks import counted_by
from grape_compile.passes.graph import Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import CUTS, EXPANDS, IDENTITIES, REPEATS, RESHAPES, operand_of
from grape_compile.passes.score_terms import ScoreTerm, constant
from grape_compile.passes.scores import DEAD, KEY, QUERY, Scores, as_key
from grape_compile.passes.terms import broadcast

_ONES = {"aten::ones", "aten::ones_like", "aten::new_ones"}
_MOVED = IDENTITIES | EXPANDS | RESHAPES | CUTS | REPEATS
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
        return self.scores.is_square and all(self._says_causal(term, never) for term in masks)

    def _says_causal(self, term: ScoreTerm, never: float) -> bool:
        if term.dead is not None:
            return term.value <= never and self.seen(term.node) is (not term.dead)
        if not self._is_of_the_scores(term.node):
            return False
        filled, diagonal = self._triangle(term)
        if filled <= never and diagonal == 1:
            return True
        node = self._cut_from(term.node)
        fact = Future(term.factor, never, term.finished)
        if self.program.made_of(node) is None or require_fake(node).dim() < 2:
            return False
        if not self.scores.replay.once(fact, [node], lambda: fact(self._numbers(node))):
            return False
        if node in self.program.kept:
            self.scores.rely(node, fact)
        else:
            self.scores.rely_on_numbers([node])
        return True

    def _hides_the_future(self, term: ScoreTerm) -> bool:
        if term.dead is not None and term.value <= DEAD:
            seen = self.seen(term.node)
            if seen is not None:
                return seen is not term.dead
        filled, diagonal = self._triangle(term)
        if filled <= DEAD and diagonal <= 1:
            return True
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

    def seen(self, node: fx.Node) -> bool | None:
        """True where a value is true exactly for keys not after the query, False for the opposite, None for neither."""
        return self._seen(node) if self._is_of_the_scores(node) else None

    def _is_of_the_scores(self, node: fx.Node) -> bool:
        """Whether the last axes of a value are queries and keys."""
        value, sizes = fake(node), list(map(str, self.scores.symbolic[QUERY:]))
        return value is not None and list(map(str, value.shape[-2:])) == sizes

    def _cut_from(self, node: fx.Node) -> fx.Node:
        """The earliest value whose triangles are those of this one."""
        while (name := op_name(node)) in _MOVED and self._keeps_triangles(node, name):
            node = operand_of(node, 0)
        return node

    def _numbers(self, node: fx.Node) -> Tensor:
        held = self.program.values[node] if node in self.program.kept else self.scores.replay.tensor(node)
        assert isinstance(held, Tensor)
        return held

    def _seen(self, node: fx.Node) -> bool | None:
        node = self._cut_from(node)
        name = op_name(node)
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
        """A triangle of constants or in a kept tensor, looked at as a whole."""
        value = fake(node)
        if self.program.made_of(node) is None or value is None or value.dim() < 2:
            return None
        try:
            seen = self.scores.replay.once("triangle", [node], lambda: _triangle(self._numbers(node).bool()))
        except Unreadable:
            return None
        if seen is not None:
            self.scores.rely_on_numbers([node])
        return seen


def _triangle(held: Tensor) -> bool | None:
    """True for the lower triangle, False for what lies above it, None for anything else."""
    behind = torch.ones(held.shape[-2:], dtype=torch.bool, device=held.device).tril()
    if bool((held == behind).all()):
        return True
    return False if bool((held == ~behind).all()) else None


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
