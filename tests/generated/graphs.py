"""Edits of an exported graph: its operators taken apart, its nodes in another order of the same meaning."""

from __future__ import annotations

import random

import torch
from torch import fx
from torch.export import ExportedProgram


def decomposed(program: ExportedProgram, how: str) -> ExportedProgram:
    """ "core": the core ATen operators; "functional": without mutation; "": as it was exported."""
    if not how:
        return program
    taken_apart: ExportedProgram = program.run_decompositions(*([{}] if how == "functional" else []))
    return taken_apart


def shuffle(program: ExportedProgram, seed: int) -> None:
    """Put the nodes into a random order that computes the same; a graph that writes into its values stays."""
    graph = program.graph_module.graph
    if any(_writes(node) for node in graph.nodes):
        return
    source, last = random.Random(seed), graph.output_node()
    inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    waiting = {node: {each for each in node.all_input_nodes if each.op != "placeholder"} for node in inner}
    ready = [node for node in inner if not waiting[node]]
    while ready:
        node = ready.pop(source.randrange(len(ready)))
        last.prepend(node)
        for user in node.users:
            if user in waiting and node in waiting[user]:
                waiting[user].discard(node)
                if not waiting[user]:
                    ready.append(user)
    graph.lint()
    program.graph_module.recompile()


def _writes(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return bool(node.target._schema.is_mutable)
