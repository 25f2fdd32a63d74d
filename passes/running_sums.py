"""Recognise a running sum: a clock that accumulates a rate along the tokens, from the first token or from the second.

What: `cumsum(x)`, `cumsum(x) - x`, `cumsum(x)` moved on by one token behind a zero, `cumsum` of `x` moved on by one
    token, each times a number. The proof is in the indices: it holds for every length and whatever the rates are.
Leaves alone: sums along another axis, and any other function of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from grape_compile.passes.addends import cumsum_dim
from grape_compile.passes.elements import Reader
from grape_compile.passes.filled import is_zero_tensor
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name
from grape_compile.passes.movement import SINGLE, is_frozen, move
from grape_compile.passes.operands import Axis, Operand, fit
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Factor, Index, Term, unit

_PROJECTIONS = {"aten::linear", "aten::addmm", "aten::mm", "aten::matmul"}


@dataclass(frozen=True)
class RunningSum:
    """`number` times the running sum of `rates`, a view with the token axis at its full length."""

    number: float
    rates: Operand
    inclusive: bool


@dataclass(frozen=True)
class _Leaf:
    """A value read at the token itself (`behind` 0) or at the one before it (1)."""

    view: Operand
    behind: int


class RunningSums:
    """Reads clocks along the axis number `token` of a target whose places are `lead`, of sizes `counts`."""

    def __init__(
        self, program: Program, reader: Reader, lead: Index, counts: tuple[int, ...], token: int
    ) -> None:
        self.program, self.reader = program, reader
        self.lead, self.counts, self.token = lead, counts, token

    def read(self, clock: Operand) -> RunningSum | None:
        """The running sum that a clock is, or None."""
        leaves = self._leaves(clock)
        sums = [leaf for leaf in leaves or {} if cumsum_dim(leaf.view.node) is not None]
        if leaves is None or len(sums) != 1:
            return None
        (total,) = sums
        number = leaves.pop(total)
        inner = self._rates(total)
        if inner is None:
            return None
        rates = self._leaves(inner)
        if total.behind == 1:
            return None if leaves else RunningSum(number, inner, False)
        if leaves:
            same = rates is not None and leaves == {leaf: -number * part for leaf, part in rates.items()}
            return RunningSum(number, inner, False) if same else None
        if rates is not None and len(rates) == 1:
            ((leaf, part),) = rates.items()
            if leaf.behind == 1:
                return RunningSum(number * part, leaf.view, False)
        return RunningSum(number, inner, True)

    def is_along_tokens(self, total: RunningSum) -> bool:
        """Whether a sum runs over tokens and not over the channels of a projection, such as heads.

        Followed back, the rates come from a projection, whose last axis holds channels. Where no projection is met,
        only the axis next to the target's last one is sure to hold tokens.
        """
        node, index = total.rates.node, self._index(total.rates)
        while True:
            name = op_name(node)
            data = [each for each in node.all_input_nodes if self.program.taints[each] is Taint.DATA]
            if name in _PROJECTIONS or len(data) != 1:
                break
            if name in SINGLE and name != "getitem" and not is_frozen(node, name):
                node, index = move(node, name, index, self.reader.sizes)
            elif op_name(node) in SINGLE or not _same_shape(node, data[0]):
                break
            else:
                node = data[0]
        if op_name(node) not in _PROJECTIONS:
            return self.token == len(self.lead) - 1
        # A channel that follows the token: the axis summed over is one of heads.
        axes = fit(
            self.program, node, index, self.lead, torch.zeros_like(self.lead[0]), Sizes(), (*self.counts, 1)
        )
        return (
            axes is not None
            and axes[-1].role != self.token
            and any(axis.role == self.token for axis in axes[:-1])
        )

    def _rates(self, total: _Leaf) -> Operand | None:
        """What a cumulative sum along the tokens sums up, seen as the sum is seen."""
        node, view = total.view.node, total.view
        dim = cumsum_dim(node)
        if dim is None or view.part != "value" or view.axes[dim] != Axis(self.token):
            return None
        operand = node.args[0]
        return replace(view, node=operand) if isinstance(operand, fx.Node) else None

    def _leaves(self, clock: Operand) -> dict[_Leaf, float] | None:
        """A clock as a sum of numbers times values at the token or the one before; None where it is more than that."""
        if clock.part != "value":
            return None
        rows = torch.arange(self.lead[0].numel())
        try:
            terms = self._back(clock.node, self._index(clock), rows)
        except Unreadable:
            return None
        leaves: dict[_Leaf, float] = {}
        for term in terms:
            leaf, number = self._leaf(term), term.constant()
            if leaf is None or number is None:
                return None
            leaves[leaf] = leaves.get(leaf, 0.0) + number
        return leaves

    def _index(self, view: Operand) -> Index:
        """The elements a view reads for the places of the target."""
        where = dict(enumerate(self.lead))
        return tuple(
            torch.full_like(self.lead[0], axis.offset)
            if axis.role == "fixed"
            else axis.at(where[int(axis.role)])
            for axis in view.axes
        )

    def _back(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        leaf = [unit(rows, Factor(node, index))]
        if is_zero_tensor(node):
            return []
        if cumsum_dim(node) is not None or op_name(node).startswith("aten::detach"):
            return leaf
        try:
            return self.reader.pull(node, index, rows, self._back)
        except Unreadable:
            return leaf

    def _leaf(self, term: Term) -> _Leaf | None:
        """A term that is one element, read for every token, or for every token but the first."""
        if len(term.factors) != 1 or term.factors[0].part != "value":
            return None
        factor, lead = term.factors[0], tuple(axis[term.rows] for axis in self.lead)
        axes = fit(
            self.program,
            factor.node,
            factor.index,
            lead,
            torch.zeros_like(lead[0]),
            Sizes(),
            (*self.counts, 1),
        )
        if axes is None:
            return None
        along = [axis for axis in axes if axis.role == self.token]
        if len(along) != 1 or along[0].stride != 1 or along[0].offset not in (0, -1):
            return None
        behind = -along[0].offset
        seen = self.lead[self.token] >= behind
        if not torch.equal(term.rows, seen.nonzero().flatten()):
            return None
        whole = tuple(replace(axis, offset=0) if axis.role == self.token else axis for axis in axes)
        return _Leaf(Operand(factor.node, whole), behind)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    first, second = fake(one), fake(other)
    if first is None or second is None:
        return False
    return list(map(str, first.shape)) == list(map(str, second.shape))
