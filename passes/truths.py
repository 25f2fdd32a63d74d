"""Recognise values that are one or zero whatever is given: masks that scores are multiplied by.

What: truth values that were cast, triangles of them, moved about or multiplied with one another; and what a tensor that
    is kept holds, which is relied on as a fact about it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from grape_compile.passes.facts import rely_on
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import SINGLE, keeps_numbers
from grape_compile.passes.replay import Replay

_ONES = {"aten::ones", "aten::ones_like", "aten::new_ones"}
_PARTS = {
    "aten::tril",
    "aten::triu",
    "aten::mul",
    "aten::logical_and",
    "aten::logical_or",
    "aten::logical_not",
}


def only_ones_and_zeros(tensor: Tensor) -> bool:
    """The fact that a tensor holds nothing else."""
    return bool(((tensor == 0) | (tensor == 1)).all())


def is_truth(program: Program, node: fx.Node, replay: Replay) -> bool:
    """Whether a value is one or zero everywhere, in every call."""
    if program.taints[node] is Taint.DATA or node in program.stale:
        return False
    if require_fake(node).dtype is torch.bool or op_name(node) in _ONES:
        return True
    name = op_name(node)
    if name in _PARTS or (name in SINGLE and keeps_numbers(node)):
        inner = [each for each in node.all_input_nodes if fake(each) is not None]
        numbers = name == "aten::mul" and len(inner) != 2
        return bool(inner) and not numbers and all(is_truth(program, each, replay) for each in inner)
    if program.made_of(node) is None:
        return False
    try:
        known = only_ones_and_zeros(replay.tensor(node))
    except Unreadable:
        return False
    if known:
        rely_on(program, node, only_ones_and_zeros, replay)
    return known
