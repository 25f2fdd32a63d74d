"""Read the marks of upgraded layers, and what of a graph is made of which marked value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from grape_compile.encoding import Bias, Encoding, Multiplicative, PathBias
from grape_compile.operators.operands import parse_encoding
from grape_compile.operators.prepare import parts
from grape_compile.passes.graph import Program, Unreadable, module_path, op_name, require_fake

_ATTENDING = {
    "aten::softmax",
    "aten::_softmax",
    "aten::special_softmax",
    "aten::scaled_dot_product_attention",
    "grape::attend",
}


@dataclass(frozen=True, eq=False)
class Mark:
    """A call of `grape::upgraded`: a layer's hidden states, and what its positions become."""

    node: fx.Node
    hidden: fx.Node
    slots: Mapping[str, fx.Node]
    encoding: Encoding
    module: str
    frequencies: tuple[float, ...]
    turned: int
    attended: int
    grows: bool
    unbiased: bool

    @cached_property
    def rotations(self) -> tuple[Multiplicative, ...]:
        return tuple(part for part in parts(self.encoding) if isinstance(part, Multiplicative))

    @cached_property
    def biases(self) -> tuple[Bias | PathBias, ...]:
        return tuple(part for part in parts(self.encoding) if isinstance(part, Bias | PathBias))

    def holds(self, node: fx.Node) -> bool:
        """Whether code of the marked layer made a node, as far as the graph says.

        Paths begin at the module whose code the graph is of, which may be inside of the model, or around it.
        """
        path, module = module_path(node), self.module
        if not path or not module or f".{module}." in f".{path}.":
            return True
        names = module.split(".")
        return any(f"{path}.".startswith(f"{'.'.join(names[start:])}.") for start in range(1, len(names)))


def marks_of(graph: fx.Graph) -> list[Mark]:
    """Every mark of a graph, in its order."""
    return [_read(node) for node in graph.find_nodes(op="call_function", target=_TARGET)]


def is_marked(module: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo, or one inside of it, has a mark."""
    graphs = (each.graph for each in module.modules() if isinstance(each, fx.GraphModule))
    return any(
        node.op == "call_function" and node.target in (_TARGET, torch.ops.grape.upgraded)
        for graph in graphs
        for node in graph.nodes
    )


def tokens_last(tensor: fx.Node, positions: Sequence[Any]) -> bool:
    """Whether a tensor that turns is [B, H, T, D], not [B, T, H, D], by the sizes of its positions; or give up."""
    shape = [str(size) for size in require_fake(tensor).shape]
    if len(shape) != 4:
        raise Unreadable(f"a tensor of {len(shape)} axes turns, where heads and tokens cannot be told apart")
    places = [str(size) for size in positions]
    if len(places) < 2:
        return True
    return places[-1] != "1" or (places[-2] == "1" and shape[-2] == "1")


class Made:
    """Which marked values, or which of some other values, a value is made of.

    What attention gives is made of none: behind it the next layer begins.
    """

    def __init__(self, graph: fx.Graph, of: set[fx.Node]) -> None:
        self._reach: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            if node in of:
                self._reach[node] = frozenset({node})
            elif op_name(node) in _ATTENDING:
                self._reach[node] = frozenset()
            else:
                self._reach[node] = frozenset().union(
                    *(self._reach[operand] for operand in node.all_input_nodes)
                )

    def of(self, node: fx.Node) -> frozenset[fx.Node]:
        """The values that a value is made of."""
        return self._reach.get(node, frozenset())


class Marked:
    """The marks of a program, by what is made of them."""

    def __init__(self, program: Program) -> None:
        self.marks = {mark.node: mark for mark in marks_of(program.graph)}
        self._made = Made(program.graph, set(self.marks)) if self.marks else None

    def mark(self, place: fx.Node, *values: fx.Node) -> Mark | None:
        """The one mark of the layer that a place, made of some values, belongs to; None where it has none."""
        if self._made is None:
            return None
        nodes = frozenset[fx.Node]().union(*(self._made.of(value) for value in values))
        found = [self.marks[node] for node in nodes if self.marks[node].holds(place)]
        return found[0] if len(found) == 1 else None


def _read(node: fx.Node) -> Mark:
    arguments: tuple[Any, ...] = node.args
    hidden, slots, names, text, module, frequencies, *counts = arguments
    carried = dict(zip(names, slots, strict=True))
    return Mark(node, hidden, carried, parse_encoding(text), module, tuple(frequencies), *counts)


_TARGET = torch.ops.grape.upgraded.default
