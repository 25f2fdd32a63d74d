"""Regions of a graph that run in a mode of their own: gradients off, autocast, recomputed in the backward pass.

Both doors hand such a region over as one call of a higher-order operator with a graph of its own. The dialect is flat:
the body is copied into the graph between two marks, so that a table made outside is known inside, and taken out again
when the passes are done. Nodes between two marks in graph order can always be taken out: no path leaves and returns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.amp import autocast_mode

_HIGHER = torch.ops.higher_order

_BODY_AT: dict[Any, int] = {
    _HIGHER.wrap_with_set_grad_enabled: 1,
    _HIGHER.wrap_with_autocast: 4,
    _HIGHER.tag_activation_checkpoint: 0,
    _HIGHER.invoke_subgraph: 0,
}
"""Operators that run a body exactly once, and the place of the body among their arguments."""


@dataclass(frozen=True)
class Region:
    """How a region is called: the operator, what stands before the body, named arguments, what the body's graph tells.

    What stands behind the body are its operands.
    """

    target: Any
    before: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, node: fx.Node, body: fx.GraphModule) -> Region:
        """The region a call of a higher-order operator makes of a body."""
        return cls(node.target, node.args[: _BODY_AT[node.target]], dict(node.kwargs), dict(body.meta))

    @property
    def switches_gradients_off(self) -> bool:
        return self.target is _HIGHER.wrap_with_set_grad_enabled and not self.before[0]


def enter_region() -> None:
    """Mark where a region begins; its node keeps the `Region` in `meta["region"]`. Run, it does nothing."""


def leave_region() -> None:
    """Mark where the innermost region ends. Run, it does nothing."""


_SWITCHES = (torch._C._set_grad_enabled, autocast_mode._enter_autocast, autocast_mode._exit_autocast)


def is_mark(node: fx.Node) -> bool:
    """Whether the mode changes at this node."""
    return node.op == "call_function" and node.target in (enter_region, leave_region, *_SWITCHES)


def may_differentiate(graph: fx.Graph) -> bool:
    """Whether gradients are on around a flat graph that is being compiled, or anywhere in it."""
    return torch.is_grad_enabled() or any(map(_switches_gradients_on, graph.nodes))


def _switches_gradients_on(node: fx.Node) -> bool:
    if not is_mark(node):
        return False
    if node.target is torch._C._set_grad_enabled:
        return bool(node.args[0])
    region = node.meta.get("region")
    return (
        isinstance(region, Region)
        and region.target is _HIGHER.wrap_with_set_grad_enabled
        and bool(region.before[0])
    )


def body_of(node: fx.Node, module: torch.nn.Module) -> fx.GraphModule | None:
    """The graph a node runs exactly once, or None for any other node."""
    if node.op != "call_function" or node.target not in _BODY_AT:
        return None
    body = node.args[_BODY_AT[node.target]]
    assert isinstance(body, fx.Node)
    found = module.get_submodule(str(body.target))
    assert isinstance(found, fx.GraphModule)
    return found


def operands_of(node: fx.Node, arguments: Sequence[Any]) -> Sequence[Any]:
    """Of the arguments of such a node those its body is given."""
    named = node.target is _HIGHER.invoke_subgraph
    return arguments[_BODY_AT[node.target] + 1 + named :]


@contextmanager
def marked(graph: fx.Graph, node: fx.Node, body: fx.GraphModule) -> Iterator[None]:
    """Put marks before and behind what is added to the graph; a body that many nodes share has no mode of its own."""
    if node.target is _HIGHER.invoke_subgraph:
        yield
        return
    graph.call_function(enter_region).meta.update(val=None, region=Region.of(node, body))
    yield
    graph.call_function(leave_region).meta.update(val=None)


def without_gradient(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes computed while gradients are switched off inside the graph."""
    enabled, around = True, []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.op == "call_function" and node.target is enter_region:
            around.append(enabled)
            enabled = enabled and not node.meta["region"].switches_gradients_off
        elif node.op == "call_function" and node.target is leave_region:
            enabled = around.pop()
        elif not enabled:
            yield node


# -- into the graph ---------------------------------------------------------------------------------------


def inline_regions(module: fx.GraphModule) -> None:
    """Copy the body of every region into the graph, between marks; regions inside of regions as well."""
    nodes: Iterable[fx.Node] = module.graph.nodes
    while regions := [node for node in nodes if body_of(node, module) is not None]:
        for node in regions:
            _inline(module, node)
    module.recompile()


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Copy one body; regions inside of it are regions of the graph from then on."""
    body = body_of(node, module)
    assert body is not None
    graph, held = module.graph, node.args[_BODY_AT[node.target]]
    with graph.inserting_before(node), marked(graph, node, body):
        results = splice(module, body, operands_of(node, node.args))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if isinstance(held, fx.Node) and not held.users:
        graph.erase_node(held)


def splice(module: fx.GraphModule, body: fx.GraphModule, operands: Sequence[Any]) -> Any:
    """Copy the nodes of a body to where the graph is being extended; what the body returns."""
    graph = module.graph
    placed = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    for step in body.graph.nodes:
        if step.op == "get_attr":
            placed[step] = _adopted(module, body, step)
        elif step.op not in ("placeholder", "output"):
            placed[step] = graph.node_copy(step, placed.__getitem__)
    return fx.node.map_arg(body.graph.output_node().args[0], placed.__getitem__)


def _adopted(module: fx.GraphModule, body: fx.GraphModule, step: fx.Node) -> fx.Node:
    """An attribute of a body as one of the whole."""
    value: Any = body
    for part in str(step.target).split("."):
        value = getattr(value, part)
    node = module.graph.create_node("get_attr", _keep(module, str(step.target), value))
    node.meta = dict(step.meta)
    return node


def _keep(module: fx.GraphModule, name: str, value: Any) -> str:
    """The free name under which a value was put on the module."""
    base, number = name.replace(".", "_"), 0
    while hasattr(module, name := f"{base}_{number}"):
        number += 1
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value, persistent=False)
    else:
        setattr(module, name, value)
    return name


# -- out of the graph -------------------------------------------------------------------------------------


def outline_regions(module: fx.GraphModule) -> None:
    """Make every pair of marks one call of its operator again, the nodes between them its body."""
    graph = module.graph
    open_marks: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is enter_region:
            open_marks.append(node)
        elif node.target is leave_region:
            _outline(module, open_marks.pop(), node)
    graph.lint()
    module.recompile()


def _outline(module: fx.GraphModule, first: fx.Node, last: fx.Node) -> None:
    graph, inside, node = module.graph, [], first.next
    while node is not last:
        following = node.next
        if node.op == "get_attr":
            first.prepend(node)
        else:
            inside.append(node)
        node = following
    members = set(inside)
    if any(_acts(node) or not members.issuperset(node.users) for node in inside):
        _call(module, first.meta["region"], inside, last)
    for node in (last, *reversed(inside), first):
        graph.erase_node(node)


def _call(module: fx.GraphModule, region: Region, inside: Sequence[fx.Node], last: fx.Node) -> None:
    """Call the operator with the nodes as its body, behind the last of them."""
    graph, members = module.graph, set(inside)
    needed = dict.fromkeys(each for node in inside for each in node.all_input_nodes if each not in members)
    bodies = [node for node in needed if _is_body(module, node)]
    operands = [node for node in needed if node not in bodies]
    results = [node for node in inside if any(user not in members for user in node.users)]
    body = fx.Graph()
    placed: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        placed[operand] = body.placeholder(operand.name)
        placed[operand].meta = dict(operand.meta)
    placed |= {node: body.get_attr(str(node.target)) for node in bodies}
    for node in inside:
        placed[node] = body.node_copy(node, placed.__getitem__)
    body.output(tuple(placed[result] for result in results))
    held = fx.GraphModule(module, body)
    held.meta = dict(region.told)
    with graph.inserting_before(last):
        attribute = graph.get_attr(_keep(module, "body", held))
        call = graph.call_function(region.target, (*region.before, attribute, *operands), region.named)
        call.meta = {key: inside[-1].meta[key] for key in _PROVENANCE if key in inside[-1].meta}
        call.meta["val"] = tuple(result.meta.get("val") for result in results)
        for number, result in enumerate(results):
            value = graph.call_function(operator.getitem, (call, number))
            value.meta = dict(result.meta)
            result.replace_all_uses_with(value, delete_user_cb=lambda user: user not in members)


def _acts(node: fx.Node) -> bool:
    """Whether a node does more than give a value; a check of the type of a value that nobody needs is no such thing."""
    return node.is_impure() and node.target is not torch.ops.aten._assert_tensor_metadata.default


def _is_body(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)


_PROVENANCE = ("stack_trace", "nn_module_stack")
