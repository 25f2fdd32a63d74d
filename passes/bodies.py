"""Graphs inside of a graph: what a condition or a loop runs is a program of its own.

A body is a function of its operands, so what is proved of it holds in every turn of a loop and on either branch.
Operands that are the same in every turn keep what is known of them; those that change are inputs, and nothing is known
of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grape_compile.passes.capture import program_of
from grape_compile.passes.graph import Program, Role, module_path, source_line
from grape_compile.passes.regions import inline_regions, outline_regions
from grape_compile.passes.site import Refusal

_HIGHER = torch.ops.higher_order
_RUNS = (
    _HIGHER.cond, _HIGHER.map_impl, _HIGHER.scan, _HIGHER.while_loop, _HIGHER.associative_scan,
)  # fmt: skip
"""Operators that do nothing with a body but run it; operands that never change are their last argument."""


@dataclass(frozen=True)
class Body:
    """The graph a node runs, `name` on the module that holds it, as a program of its own."""

    node: fx.Node
    name: str
    owner: fx.GraphModule
    program: Program

    @property
    def may_change(self) -> bool:
        """Whether another graph that computes the same may stand in its place."""
        return self.node.target in _RUNS

    def put_back(self) -> None:
        """Let the node run the program."""
        outline_regions(self.program.module)
        setattr(self.owner, self.name, self.program.module)

    def refusal(self, what: str) -> Refusal:
        """That something was found where it has to stay."""
        operator = getattr(self.node.target, "__name__", str(self.node.target))
        reason = f"{what} stands inside of {operator}, whose graph is left as it was written"
        return Refusal("body", reason, self.node.name, module_path(self.node), source_line(self.node))


def bodies_of(program: Program) -> Iterator[Body]:
    """Every graph that nodes of a program run."""
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        for held in node.all_input_nodes:
            body = getattr(program.module, str(held.target), None) if held.op == "get_attr" else None
            if isinstance(body, fx.GraphModule):
                yield Body(node, str(held.target), program.module, _program(program, node, body))


def _program(outer: Program, node: fx.Node, body: fx.GraphModule) -> Program:
    module = fx.GraphModule(body, copy.deepcopy(body.graph))
    module.meta.update(body.meta)
    inline_regions(module)
    inputs = module.graph.find_nodes(op="placeholder")
    given = node.args[-1] if node.target in _RUNS else ()
    same = list(given) if isinstance(given, list | tuple) else []
    known: Mapping[fx.Node, Any] = dict(zip(inputs[len(inputs) - len(same) :], same, strict=False))
    roles, values = {}, {}
    for each in inputs:
        operand = known.get(each)
        role = outer.roles.get(operand, Role.INPUT) if isinstance(operand, fx.Node) else Role.INPUT
        roles[each] = role
        known_value = outer.values.get(operand) if isinstance(operand, fx.Node) else None
        values[each] = None if role is Role.INPUT else known_value
    return program_of(module, roles, values)
