"""Tensors that hold one number, as they were made."""

from __future__ import annotations

from typing import Any

from torch import fx

from grape_compile.passes.graph import op_name
from grape_compile.passes.movement import SINGLE


def filled(node: fx.Node, name: str) -> float | None:
    """The number a tensor is made of alone, if it is not zero."""
    if name in ("aten::ones_like", "aten::ones", "aten::new_ones"):
        return 1.0
    number = node.args[-1] if name in ("aten::full", "aten::full_like", "aten::new_full") else None
    return float(number) if isinstance(number, int | float) and number else None


def holds_zeros(node: fx.Node) -> bool:
    """A tensor of zeros, or a part of one."""
    while op_name(node) in SINGLE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return is_zero_tensor(node)


def is_zero_tensor(node: fx.Node) -> bool:
    """A tensor of zeros."""
    name = op_name(node)
    if name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
        return True
    return name in ("aten::full", "aten::full_like", "aten::new_full") and is_zero(node.args[-1])


def is_zero(operand: Any) -> bool:
    """The number zero: a sum with it is no sum."""
    return isinstance(operand, int | float) and operand == 0
