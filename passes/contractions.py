"""Products of tensors as sums over one axis: `matmul`, `bmm` and `einsum`, by the indices they pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from grape_compile.passes.graph import Sizes, Unreadable, op_name
from grape_compile.passes.movement import operand_of
from grape_compile.passes.terms import Index, broadcast

Pick = Callable[[Index, Tensor], Index]
"""From the index of the result and of the summed axis to the index of an operand."""


@dataclass(frozen=True)
class Contraction:
    """result[i] = sum over c < size of left[left_at(i, c)] * right[right_at(i, c)]."""

    left: fx.Node
    right: fx.Node
    size: int
    left_at: Pick
    right_at: Pick


def contraction(node: fx.Node, sizes: Sizes) -> Contraction | None:
    """The product of two tensors that a node is; None for other nodes and for sums over several axes."""
    name = op_name(node)
    try:
        if name in ("aten::matmul", "aten::bmm", "aten::mm"):
            return _product(node, sizes)
        return _einsum(node, sizes) if name == "aten::einsum" else None
    except Unreadable:
        return None


def _product(node: fx.Node, sizes: Sizes) -> Contraction | None:
    left, right = operand_of(node, 0), operand_of(node, 1)
    left_shape, right_shape = sizes.shape(left), sizes.shape(right)
    if len(left_shape) < 2 or len(right_shape) < 2:
        return None
    return Contraction(
        left,
        right,
        left_shape[-1],
        lambda index, c: broadcast((*index[:-1], c), left_shape),
        lambda index, c: broadcast((*index[:-2], c, index[-1]), right_shape),
    )


def _einsum(node: fx.Node, sizes: Sizes) -> Contraction | None:
    inputs, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    names, operands = inputs.split(","), node.args[1]
    if (
        not arrow
        or "." in inputs
        or not isinstance(operands, list | tuple)
        or len(names) != 2
        or len(operands) != 2
    ):
        return None
    left, right = operands
    summed = set(names[0] + names[1]) - set(out)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or len(summed) != 1:
        return None
    (letter,) = summed
    if any(letter not in name or len(set(name)) != len(name) for name in names):
        return None
    size = sizes.shape(left)[names[0].index(letter)]

    def pick(name: str) -> Pick:
        return lambda index, c: tuple(c if each == letter else index[out.index(each)] for each in name)

    return Contraction(left, right, size, pick(names[0]), pick(names[1]))


def renamed(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """An einsum of one operand that only reorders its axes: the operand, and where its elements come from."""
    if op_name(node) != "aten::einsum":
        return None
    inputs, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    operands = node.args[1]
    if (
        not arrow
        or sorted(inputs) != sorted(out)
        or len(set(out)) != len(out)
        or "." in inputs
        or "," in inputs
    ):
        return None
    if not isinstance(operands, list | tuple) or not isinstance(operands[0], fx.Node):
        return None
    return operands[0], tuple(index[out.index(letter)] for letter in inputs)
