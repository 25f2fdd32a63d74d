"""Write `torch.vmap` inside of a graph as the operators on whole batches that it runs.

Both doors keep the switches of vmap in the graph: a batch axis is hidden from the code between them, and the values
there cannot be read like others. What runs in the end has the axis in its operands; a trace below vmap shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import make_fx

from grape_compile.passes.regions import is_mark, splice


def has_batches(module: fx.GraphModule) -> bool:
    """Whether vmap is switched on somewhere in the graph."""
    return any(node.target is predispatch._vmap_increment_nesting for node in module.graph.nodes)


def flatten_batches(module: fx.GraphModule) -> None:
    """Replace every stretch of the graph under vmap, from the outermost switch on to its switch off."""
    depth = 0
    inside: list[fx.Node] = []
    for node in list(module.graph.nodes):
        depth += node.target is predispatch._vmap_increment_nesting
        if depth and node.op == "get_attr":
            inside[0].prepend(node)
        elif depth:
            inside.append(node)
        elif node.target is predispatch.lazy_load_decompositions:
            predispatch.lazy_load_decompositions()
            module.graph.erase_node(node)
        if node.target is predispatch._vmap_decrement_nesting:
            depth -= 1
            if not depth:
                _flatten(module, inside)
                inside = []
    module.graph.lint()
    module.recompile()


def _flatten(module: fx.GraphModule, inside: Sequence[fx.Node]) -> None:
    members = set(inside)
    if any(is_mark(node) for node in inside):
        raise NotImplementedError("gradients or autocast are switched inside of vmap")
    operands = list(
        dict.fromkeys(each for node in inside for each in node.all_input_nodes if each not in members)
    )
    results = [node for node in inside if any(user not in members for user in node.users)]
    graph = fx.Graph()
    placed = {operand: graph.placeholder(operand.name) for operand in operands}
    for node in inside:
        placed[node] = graph.node_copy(node, placed.__getitem__)
    graph.output([placed[result] for result in results])
    batched = _traced(fx.GraphModule(module, graph), [_value(module, operand) for operand in operands])
    with module.graph.inserting_after(inside[-1]):
        anchor = module.graph.call_function(torch._assert, (True,))
    with module.graph.inserting_before(anchor):
        whole = splice(module, batched, operands)
    for result, value in zip(results, whole, strict=True):
        result.replace_all_uses_with(value, delete_user_cb=lambda user: user not in members)
    for node in (anchor, *reversed(inside)):
        module.graph.erase_node(node)


def _value(module: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def _traced(stretch: fx.GraphModule, values: list[Any]) -> fx.GraphModule:
    """The operators below vmap, one placeholder per operand."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    interpreter = fx.Interpreter(stretch)
    try:
        with fx.traceback.preserve_node_meta():
            traced = make_fx(lambda *operands: interpreter.run(*operands), tracing_mode="symbolic")(*values)
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
    assert isinstance(traced, fx.GraphModule)
    traced.graph.eliminate_dead_code()  # what autograd would keep of a softmax
    return traced
