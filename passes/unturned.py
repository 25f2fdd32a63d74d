"""Queries and keys as they would be, had they not turned: what gates read (GRAPE 4.6).

What: what stands between a rotation and the attention (norms, orders of axes, coordinates that do not turn beside those
    that do) is done once more to what the rotation is given; behind a cache it is that of the new tokens.
Leaves alone: everything that is there.
Cost: a few nodes per layer; what nothing reads is not left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from grape_compile.passes.graph import Unreadable, op_name, require_fake
from grape_compile.passes.marks import Made
from grape_compile.passes.memory import is_pure
from grape_compile.passes.operands import Emitter

RESHAPING = {
    f"aten::{name}"
    for name in ("slice", "expand", "reshape", "view", "unsqueeze", "clone", "contiguous", "to")
}
"""What may stand between the keys of a cache and the attention."""


class Unturned:
    """What is made of the results of some rotations, made of their operands: `rotations` by call, with its results."""

    def __init__(self, emitter: Emitter, rotations: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        self.emitter = emitter
        self.known: dict[fx.Node, fx.Node] = {}
        for call, values in rotations.items():
            tensors: Any = call.args[0]
            self.known |= {value: tensors[value.args[1]] for value in values}
        self.made = Made(emitter.program.graph, set(self.known))

    def of(self, node: fx.Node) -> fx.Node:
        """The value that a node would have."""
        if node not in self.known:
            self.known[node] = self._again(node) if self.made.of(node) else node
        return self.known[node]

    def new(self, key: fx.Node) -> fx.Node:
        """The keys of new tokens, where a cache puts them beside those it has; keys as they are elsewhere."""
        node: Any = key
        while op_name(node) in RESHAPING:
            node = node.args[0]
        made = [operand for operand in node.all_input_nodes if self.made.of(operand)]
        return made[0] if _joins_tokens(node) and len(made) == 1 else key

    def _again(self, node: fx.Node) -> fx.Node:
        # What writes would do so twice.
        if not is_pure(node) or _joins_tokens(node):
            raise Unreadable(
                f"queries or keys pass {node.name} between their rotation and a gate that reads them"
            )
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.of)
        return self.emitter.call(node, node.target, args, kwargs)


def put_behind(graph: fx.Graph, node: fx.Node) -> None:
    """Move what reads a node, and stands before it, behind it."""
    reached, late = {node}, []
    for each in graph.nodes:
        if each is node:
            break
        if not reached.isdisjoint(each.all_input_nodes):
            reached.add(each)
            late.append(each)
    for each in reversed(late):
        node.append(each)


def _joins_tokens(node: fx.Node) -> bool:
    """Whether a node puts tokens beside others, [B, H, T, D]: behind them, or into room of a cache of fixed size."""
    if op_name(node) in ("aten::index_put", "aten::index_put_"):
        places: Any = node.args[1]
        return require_fake(node).dim() == 4 and len(places) == 3 and places[0] is None and places[1] is None
    if op_name(node) not in ("aten::cat", "aten::index_copy", "aten::index_copy_"):
        return False
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return require_fake(node).dim() == 4 and dim in (2, -2)
