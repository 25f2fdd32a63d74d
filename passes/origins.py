"""Tables that one graph makes and a later graph is given: behind a graph break, what they are made of is still known.

torch.compile cuts a model where it cannot look inside; the tables of cosines and sines of the first graph are then
plain inputs of the others, and inputs may hold anything. Every table a compiled graph returns is therefore marked with
its origin, a copy of the operators that made it. A graph that is given marked tensors is read as if it had made them
itself; what is found holds for tensors with the same marks, which is looked at in every call. A tensor that was
written into since, or made by anything else, has no origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.passes.graph import Program, Role, Sizes, Taint, Unreadable, fake, is_pure, op_name
from grape_compile.passes.operands import fake_value
from grape_compile.passes.verify import PHASES

_MARK = "_grape_compile_mark"
_CALLS = count()


@dataclass(frozen=True, eq=False)
class Origin:
    """The tables one graph returns: a graph that returns them alone, and what is known of its inputs.

    `tables` are their numbers among the results of the first.
    """

    module: fx.GraphModule
    tables: tuple[int, ...]
    roles: Sequence[Role]
    values: Sequence[Any]


@dataclass(frozen=True)
class Mark:
    """On a tensor: it is table number `table` of what a graph returned in a call, and has not been written into."""

    origin: Origin
    table: int
    call: int
    version: int


def origin_of(program: Program) -> Origin | None:
    """What the tables among a program's results are made of, here and in the graphs whose tables it was given."""
    results = program.graph.output_node().args[0]
    assert isinstance(results, list | tuple)
    tables = [number for number, node in enumerate(results) if _is_table(program, node)]
    made = [node for node in results if isinstance(node, fx.Node) and _is_table(program, node)]
    try:
        return _origin(program, made, _needed(program, made), tuple(tables)) if tables else None
    except Unreadable:
        return None


def _is_table(program: Program, node: Any) -> bool:
    """A computed number per element that no activation and no weight has a part in."""
    value = fake(node) if isinstance(node, fx.Node) else None
    if value is None or node.op != "call_function" or not (value.is_floating_point() or value.is_complex()):
        return False
    return program.taints[node] < Taint.PARAMETER


def _is_given(program: Program, node: fx.Node) -> bool:
    """Where the copy ends: at inputs, and at activations behind what angles are made with."""
    return node.op != "call_function" or (program.taints[node] is Taint.DATA and op_name(node) not in PHASES)


def _needed(program: Program, results: Sequence[fx.Node]) -> set[fx.Node]:
    needed, stack = set(results), list(results)
    while stack:
        node = stack.pop()
        if _is_given(program, node):
            continue
        if not is_pure(node):
            raise Unreadable("a table that is drawn or written into")
        for operand in node.all_input_nodes:
            if operand not in needed and not isinstance(operand.meta.get("val"), torch.SymInt):
                needed.add(operand)
                stack.append(operand)
    return needed


def _origin(
    program: Program, results: Sequence[fx.Node], needed: set[fx.Node], tables: tuple[int, ...]
) -> Origin:
    graph, sizes = fx.Graph(), Sizes()
    copies: dict[fx.Node, fx.Node] = {}

    def copied(item: Any) -> Any:
        return copies[item] if item in needed else sizes(item) if _is_size(item) else item

    inputs = [node for node in program.graph.nodes if node in needed and _is_given(program, node)]
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in program.graph.nodes:
        if node in needed and node not in copies:
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), copied)
            copies[node] = graph.call_function(node.target, args, kwargs)
            copies[node].meta = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
    graph.output(tuple(copies[result] for result in results))
    known = [program.values.get(node) if node.op != "call_function" else None for node in inputs]
    values = [fake(node) if value is None else value for node, value in zip(inputs, known, strict=True)]
    roles = [program.roles.get(node, Role.INPUT) for node in inputs]
    return Origin(fx.GraphModule(torch.nn.Module(), graph), tables, roles, values)


_PROVENANCE = ("stack_trace", "nn_module_stack")


def _is_size(item: Any) -> bool:
    return isinstance(item, torch.SymInt) or (
        isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.SymInt)
    )


# -- marks ------------------------------------------------------------------------------------------------


def mark_on(value: object) -> Mark | None:
    """The mark on a tensor that was not written into since."""
    mark = getattr(value, _MARK, None)
    return mark if isinstance(value, Tensor) and mark is not None and mark.version == value._version else None


def marking(compiled: Callable[..., Any], origin: Origin) -> Callable[..., Any]:
    """A compiled graph whose tables carry marks."""

    def call(*args: Any) -> Any:
        results, number = compiled(*args), next(_CALLS)
        for table, place in enumerate(origin.tables):
            tensor = results[place]
            if not tensor.is_inference():  # such tensors do not tell whether they were written into
                setattr(tensor, _MARK, Mark(origin, table, number, tensor._version))
        return results

    return call


def guarded(
    compiled: Callable[..., Any], original: Callable[..., Any], examples: Sequence[Any]
) -> Callable[..., Any]:
    """A compiled graph for inputs with the marks of its examples, and the original for any others.

    Tables that came from one call have to come from one call again.
    """
    marks = [(place, mark) for place, example in enumerate(examples) if (mark := mark_on(example))]
    expected = _without_calls(marks)

    def call(*args: Any) -> Any:
        given = [(place, mark) for place, _ in marks if (mark := mark_on(args[place]))]
        return compiled(*args) if _without_calls(given) == expected else original(*args)

    return call


def _without_calls(marks: Iterable[tuple[int, Mark]]) -> list[tuple[int, Origin, int, int]]:
    """Place, origin and number of every table, and the first place of its call."""
    calls: dict[int, int] = {}
    return [(place, mark.origin, mark.table, calls.setdefault(mark.call, place)) for place, mark in marks]


# -- in the graph that is given them ----------------------------------------------------------------------


def graft(program: Program, marks: Mapping[fx.Node, Mark]) -> Program:
    """A program that seems to make its tables itself; `settle` has to follow when all is rewritten."""
    graph, mode = program.graph, torch._guards.detect_fake_mode([node.meta.get("val") for node in marks])
    roles, values = dict(program.roles), dict(program.values)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    stands: dict[fx.Node, fx.Node] = {}
    outside: set[fx.Node] = set()
    made: dict[int, Sequence[fx.Node]] = {}
    for given, mark in marks.items():
        if mark.call not in made:
            copies = _copied(graph, first, mark.origin, mode)
            inputs = mark.origin.module.graph.find_nodes(op="placeholder")
            roles |= {copies[node]: role for node, role in zip(inputs, mark.origin.roles, strict=True)}
            values |= {copies[node]: value for node, value in zip(inputs, mark.origin.values, strict=True)}
            outside |= set(copies.values())
            (results,) = mark.origin.module.graph.output_node().args
            made[mark.call] = [copies[node] for node in results]  # type: ignore[union-attr, index]
        end = made[mark.call][mark.table]
        if list(end.meta["val"].shape) == [Sizes()(size) for size in given.meta["val"].shape]:
            stands[end] = given
            given.replace_all_uses_with(end, delete_user_cb=lambda user: user.op != "output")
    outside -= stands.keys()
    return Program(program.module, roles, values, program.no_grad, outside=frozenset(outside), stands=stands)


def _copied(graph: fx.Graph, first: fx.Node, origin: Origin, mode: Any) -> dict[fx.Node, fx.Node]:
    """The operators of an origin before `first`, with fakes of the sizes they had in the call."""
    copies: dict[fx.Node, fx.Node] = {}
    values = iter(origin.values)
    for step in origin.module.graph.nodes:
        if step.op == "output":
            continue
        with graph.inserting_before(first):
            node = copies[step] = graph.node_copy(step, copies.__getitem__)
        with mode:
            if step.op == "placeholder":
                value = next(values)
                shape = [Sizes()(size) for size in value.shape]
                node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
            else:
                node.meta["val"] = fake_value(node)
    return copies


def settle(program: Program) -> None:
    """Take the given tables again, and nothing else of what made them."""
    for end, given in program.stands.items():
        end.replace_all_uses_with(given, delete_user_cb=lambda user: user not in program.outside)
    for node in reversed(list(program.graph.nodes)):
        if node in program.outside or node in program.stands:
            program.graph.erase_node(node)
    program.forget()
    program.graph.lint()
    program.module.recompile()
