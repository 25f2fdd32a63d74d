"""From a rewritten program to one in plain ATen whose weights are inputs like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from grape_compile.export.tvm.decompositions import decompositions

aten = torch.ops.aten


@dataclass(frozen=True)
class Flat:
    """A program without weights of its own: `inputs` and then `weights` are the names of its placeholders."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    weights: Mapping[str, Tensor]


def flatten(program: ExportedProgram, keeps: Callable[..., bool]) -> Flat:
    """Decompose a program into core ATen and make inputs of its weights, each of which is there once.

    Calls of `grape::rotate` and `grape::attend` for which `keeps` holds stay. What nothing reads is left out: weights,
    and assertions about what an exported program holds for sure.
    """
    plain = program.run_decompositions({**default_decompositions(), **decompositions(keeps)})
    graph = plain.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("aten._assert"):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    signature = copy.deepcopy(plain.graph_signature)
    inputs: list[str] = []
    weights: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], fx.Node] = {}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), Tensor):
                inputs.append(node.name)
            continue
        if not node.users:
            continue
        assert spec.target is not None
        held = (
            plain.state_dict[spec.target] if spec.target in plain.state_dict else plain.constants[spec.target]
        )
        same = first.setdefault((held.data_ptr(), held.dtype, held.shape, held.stride()), node)
        if same is not node:
            node.replace_all_uses_with(same)
        else:
            weights[node.name] = held.detach().contiguous()
    _turn_weights(graph, weights)
    signature.input_specs[:] = [
        InputSpec(InputKind.USER_INPUT, TensorArgument(name), None) for name in (*inputs, *weights)
    ]
    _keep_inputs(graph, (*inputs, *weights))
    # Sizes below those that torch assumes are sizes too: no bounds are handed on.
    flat = ExportedProgram(
        plain.graph_module,
        graph,
        signature,
        {},
        {},
        plain.module_call_graph,
        None,
        {},
        verifiers=plain.verifiers,
    )
    return Flat(flat, tuple(inputs), weights)


def _turn_weights(graph: fx.Graph, weights: dict[str, Tensor]) -> None:
    """Keep a weight that only products take, by its columns, transposed: each sum then reads one row."""
    products = {aten.mm.default: 1, aten.addmm.default: 2}
    for node in [each for each in graph.nodes if each.name in weights]:
        places = [(products.get(user.target), user.args) for user in node.users]
        if all(at is not None and args.index(node) == at for at, args in places):
            weights[node.name] = weights[node.name].t().contiguous()
            node.meta["val"], given = node.meta["val"].t(), node.meta["val"]
            with graph.inserting_after(node):
                turned = graph.call_function(aten.permute.default, (node, [1, 0]))
            turned.meta["val"] = given
            node.replace_all_uses_with(turned, delete_user_cb=lambda user, turned=turned: user is not turned)


def _keep_inputs(graph: fx.Graph, names: tuple[str, ...]) -> None:
    """Take out the other placeholders and put these in order."""
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for name, node in placeholders.items():
        if name not in names:
            graph.erase_node(node)
    front = next(node for node in graph.nodes if node.op != "placeholder")
    for name in names:
        front.prepend(placeholders[name])
