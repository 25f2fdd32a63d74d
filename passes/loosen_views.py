"""Let views follow a layout that changed: an operator may lay its result out otherwise than the code it replaces.

What: every `view` to a size becomes a `reshape`, which is a view wherever a view is possible.
Why: tracing drops a `contiguous` that did nothing for the original layout, and a view of the new one would fail.
Leaves alone: graphs without `grape::` operators, views that reinterpret a type, views that something is written through
    (a copy would not pass the write on).
Cost: one pass over the graph; none at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, op_name
from grape_compile.passes.memory import aliases, owner, written

aten = torch.ops.aten


@dataclass(frozen=True)
class LoosenViews(Pass):
    """Views become reshapes in a rewritten graph."""

    def run(self, program: Program) -> Outcome:
        if any(op_name(node).startswith("grape::") for node in program.graph.nodes):
            kept = _written(program)
            for node in program.graph.find_nodes(op="call_function", target=aten.view.default):
                if node not in kept:
                    node.target = aten.reshape.default
        return Outcome()


def _written(program: Program) -> set[fx.Node]:
    """What shares memory with a tensor that something is written into."""
    roots = {owner(operand) for write in program.mutations for operand in written(write)}
    return {alias for root in roots for alias in aliases(root)}
