"""Recognise what counts the keys of a layer: steps, given positions, a running sum, a sum that goes on from a cache.

What: values along the keys by what they are made of; a value joined to what was kept of it, and other values made of
    positions, where the same value is taken off at the query: a difference of two places is a bias by their distance.
Leaves alone: activations, and anything that sees the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.clocks import counted_by, counts, is_given
from grape_compile.passes.graph import Role, Taint, op_name
from grape_compile.passes.memory import owner
from grape_compile.passes.movement import join_dim
from grape_compile.passes.operands import Axis, Operand
from grape_compile.passes.running_sums import RunningSums
from grape_compile.passes.scores import BATCH, HEAD, KEY, QUERY, Scores, as_key
from grape_compile.passes.terms import Index


@dataclass(frozen=True)
class Clock:
    """A clock by itself: `number` times the count of the keys (`view` None), given positions or a running sum."""

    number: float
    view: Operand | None
    inclusive: bool | None = None
    given: bool = False


class KeyClocks:
    """Reads the clocks of one layer; `alive` are the entries its masks leave, `rows` what is added without a key."""

    def __init__(
        self,
        scores: Scores,
        reader: AddendReader,
        lead: Index,
        alive: torch.Tensor,
        rows: Sequence[Addend],
    ) -> None:
        self.scores, self.reader, self.lead, self.alive, self.rows = scores, reader, lead, alive, rows
        self.program = scores.program
        self.sums = RunningSums(self.program, reader.reader, lead, scores.shape, KEY)

    def read(self, view: Operand, addend: Addend | None = None) -> Clock | None:
        """A value along the keys as a clock; `addend` is what holds it, where its counterpart is a row constant."""
        if view.part != "value":
            return None
        alone = view.token_axes == (KEY,)
        stride = next(axis.stride for axis in view.axes if axis.role == KEY)
        steps = counted_by(view.node) if alone and stride == 1 else None
        if steps is not None:
            return Clock(float(steps), None)
        if is_given(view.node) or self.is_coordinate(view, addend):
            return Clock(1.0, view, given=True) if HEAD not in view.token_axes else None
        total = self.sums.read(view)
        if total is not None:
            return Clock(total.number, total.rates, total.inclusive)
        if HEAD not in view.token_axes and self._counts(view):
            return Clock(1.0, view)
        if addend is not None and self._goes_on(view, addend):
            return Clock(1.0, view, given=True)
        placed = self.program.taints[view.node] <= Taint.POSITION and addend is not None
        if placed and HEAD not in view.token_axes and self._has_counterpart(view, addend):
            return Clock(1.0, view, given=True)
        return None

    def is_coordinate(self, view: Operand, addend: Addend | None = None) -> bool:
        """Real positions given to the model: used as a difference, so that it is no mask that is added."""
        if view.node.op != "placeholder" or self.program.roles.get(view.node) is not Role.INPUT:
            return False
        return addend is None or self._has_counterpart(view, addend)

    def _has_counterpart(self, view: Operand, addend: Addend | None) -> bool:
        """Whether the same value is taken off at the query: a difference of places."""
        return addend is not None and any(
            row.number == -addend.number
            and (row.heads, row.only) == (addend.heads, addend.only)
            and len(row.queries) == 1 + len(addend.queries)
            and any(as_key(query) == view for query in row.queries)
            for row in self.rows
        )

    def _goes_on(self, view: Operand, addend: Addend) -> bool:
        """A sum that goes on from what was kept of it, joined to that, and taken off at the query."""
        node = view.node
        parts = node.args[0] if op_name(node) == "aten::cat" else ()
        if not isinstance(parts, list | tuple) or len(parts) != 2 or view.axes[join_dim(node)].role != KEY:
            return False
        kept, new = parts
        assert isinstance(kept, fx.Node)
        assert isinstance(new, fx.Node)
        behind, stack = {new}, [new]
        while stack:
            found = [each for each in stack.pop().all_input_nodes if each not in behind]
            behind.update(found)
            stack += found
        at_query = Axis(QUERY) if self.scores.shape[QUERY] > 1 else Axis("fixed")
        axes = tuple(at_query if axis.role == KEY else axis for axis in view.axes)
        last = self.reader.stripped(replace(view, node=new, axes=axes), self.lead)
        return owner(kept) in behind and any(
            (row.number, row.only) == (-addend.number, addend.only)
            and {*row.heads, *row.queries} == {*addend.heads, last}
            for row in self.rows
        )

    def _counts(self, view: Operand) -> bool:
        """A computed clock that counts whatever it is given, and moves by one step from live key to live key."""
        if self.program.taints[view.node] >= Taint.PARAMETER or QUERY in view.token_axes:
            return False
        if not self.program.is_constant(view.node) and not counts(self.program, view):
            return False
        if set(view.token_axes) - {BATCH, KEY}:
            return False
        value = self.scores.aligned(view)
        rises = value[..., 1:] - value[..., :-1]
        alive = self.alive
        both = alive[..., 1:] & alive[..., :-1] if alive.shape[-1] > 1 else alive
        shape = torch.broadcast_shapes(rises.shape, both.shape)
        return bool((rises.abs().expand(shape)[both.expand(shape)] == 1).all())
