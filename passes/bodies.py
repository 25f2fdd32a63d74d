"""Graphs inside of a graph: what a condition or a loop runs is a program of its own.

A body is a function of its operands, so what is proved of it holds in every turn of a loop and on either branch.
Operands that are the same in every turn keep what is known of them; those that change are inputs, and nothing is known
of them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grape_compile.passes.capture import program_of, retraced
from grape_compile.passes.facts import keep
from grape_compile.passes.graph import Program, Role, Taint, fake, module_path, source_line
from grape_compile.passes.regions import inline_regions, outline_regions
from grape_compile.passes.site import Refusal

_HIGHER = torch.ops.higher_order
_RUNS = (
    _HIGHER.cond, _HIGHER.map_impl, _HIGHER.scan, _HIGHER.while_loop, _HIGHER.associative_scan,
)  # fmt: skip
"""Operators that do nothing with a body but run it; operands that never change are their last argument."""


@dataclass(frozen=True)
class Body:
    """The graph a node of the `outer` program runs, `name` on its module, as a program of its own.

    `given` are the outer nodes that some inputs are in every turn.
    """

    node: fx.Node
    name: str
    outer: Program
    program: Program
    given: Mapping[fx.Node, fx.Node]

    @property
    def may_change(self) -> bool:
        """Whether another graph that computes the same may stand in its place."""
        return self.node.target in _RUNS

    def put_back(self) -> None:
        """Let the node run the program, for as long as what was read of its inputs holds."""
        outline_regions(self.program.module)
        setattr(self.outer.module, self.name, self.program.module)
        for each, facts in self.program.facts.items():
            self.outer.rely(self.given[each], facts)

    def refusal(self, what: str) -> Refusal:
        """That something was found where it has to stay."""
        name = getattr(self.node.target, "__name__", str(self.node.target))
        reason = f"{what} stands inside of {name}, whose graph is left as it was written"
        return Refusal("body", reason, self.node.name, module_path(self.node), source_line(self.node))


def bodies_of(program: Program) -> Iterator[Body]:
    """Every graph that nodes of a program run."""
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        for held in node.all_input_nodes:
            body = getattr(program.module, str(held.target), None) if held.op == "get_attr" else None
            read = _in_the_dialect(body) if isinstance(body, fx.GraphModule) else None
            if read is not None:
                yield _body(program, node, str(held.target), read)


def _in_the_dialect(body: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of a body in ATen operators, which those of custom functions are not yet; None where it cannot be had."""
    if all(_is_read(node) for node in body.graph.nodes):
        module = fx.GraphModule(body, copy.deepcopy(body.graph))
        module.meta.update(body.meta)
        inline_regions(module)
        return module
    inputs = body.graph.find_nodes(op="placeholder")
    try:
        return retraced(body, [node.meta.get("example_value") for node in inputs])
    except Exception:
        return None


def _is_read(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op not in ("call_method", "call_module")
    return isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator) or (
        node.target is operator.getitem
    )


def _body(outer: Program, node: fx.Node, name: str, module: fx.GraphModule) -> Body:
    inputs = module.graph.find_nodes(op="placeholder")
    same = _unchanging(node, inputs)
    given = {
        each: operand
        for each, operand in zip(inputs[len(inputs) - len(same) :], same, strict=True)
        if isinstance(operand, fx.Node)
    }
    roles: dict[fx.Node, Role] = {}
    values: dict[fx.Node, Any] = {}
    for each in inputs:
        operand = given.get(each)
        roles[each] = Role.INPUT if operand is None else _role(outer, operand)
        values[each] = None if operand is None or roles[each] is Role.INPUT else outer.values.get(operand)
    program = program_of(module, roles, values)
    keep(program, (each for each, operand in given.items() if operand in outer.kept))
    return Body(node, name, outer, program, given)


def _unchanging(node: fx.Node, inputs: Sequence[fx.Node]) -> list[Any]:
    """What the last inputs of a body are given in every turn."""
    given = node.args[-1] if node.target in _RUNS else node.args[-len(inputs) :] if inputs else ()
    return list(given) if isinstance(given, list | tuple) and len(given) <= len(inputs) else []


def _role(outer: Program, operand: fx.Node) -> Role:
    """What an operand is to a body: a value computed from positions alone is as good as stored, but not known."""
    if operand in outer.roles:
        return outer.roles[operand]
    value, taint = fake(operand), outer.taints[operand]
    if value is None or not value.is_floating_point() or taint is Taint.DATA:
        return Role.INPUT
    return Role.PARAMETER if taint is Taint.PARAMETER else Role.BUFFER
