"""Products of tensors as sums over one axis, or none: `matmul`, `bmm`, `outer`, `einsum`, by the indices they pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from grape_compile.passes.graph import Unreadable, op_name, require_fake
from grape_compile.passes.movement import is_symbolic, operand_of
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Index, broadcast

CONTRACTIONS = {"aten::matmul", "aten::bmm", "aten::mm", "aten::outer", "aten::ger", "aten::einsum"}

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
    """The product of two tensors that a node is; None for other nodes and for sums over several or open-ended axes."""
    name = op_name(node)
    try:
        if name in ("aten::matmul", "aten::bmm", "aten::mm"):
            return _product(node, sizes)
        if name in ("aten::outer", "aten::ger"):
            left, right = operand_of(node, 0), operand_of(node, 1)
            return Contraction(left, right, 1, lambda index, _: index[:1], lambda index, _: index[1:])
        return _einsum(node, sizes) if name == "aten::einsum" else None
    except Unreadable:
        return None


def _product(node: fx.Node, sizes: Sizes) -> Contraction | None:
    left, right = operand_of(node, 0), operand_of(node, 1)
    left_shape, right_shape = sizes.shape(left), sizes.shape(right)
    if len(left_shape) < 2 or len(right_shape) < 2 or is_symbolic(require_fake(left).shape[-1]):
        return None
    return Contraction(
        left,
        right,
        left_shape[-1],
        lambda index, c: broadcast((*index[:-1], c), left_shape),
        lambda index, c: broadcast((*index[:-2], c, index[-1]), right_shape),
    )


def _einsum(node: fx.Node, sizes: Sizes) -> Contraction | None:
    operands = node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    shapes = sizes.shape(left), sizes.shape(right)
    letters = letters_of(str(node.args[0]), tuple(map(len, shapes)))
    if letters is None or any(len(set(name)) != len(name) for name in letters):
        return None
    *names, out = letters
    summed = set(names[0] + names[1]) - set(out)
    if len(summed) > 1 or any(not summed <= set(name) for name in names):
        return None
    size = 1
    for letter in summed:
        size = shapes[0][names[0].index(letter)]
        if is_symbolic(require_fake(left).shape[names[0].index(letter)]):
            return None

    def pick(name: str, shape: tuple[int, ...]) -> Pick:
        return lambda index, c: broadcast(
            tuple(c if each in summed else index[out.index(each)] for each in name), shape
        )

    return Contraction(left, right, size, *map(pick, names, shapes))


def letters_of(equation: str, ranks: tuple[int, ...]) -> tuple[str, ...] | None:
    """A letter for every axis of the two operands and of the result; "..." are axes counted from the last."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != len(ranks):
        return None
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    counts = [
        rank - len(name.replace("...", "")) if "..." in name else 0
        for name, rank in zip(names, ranks, strict=True)
    ]
    hidden = "".join(free[: max(counts)])
    filled = [
        name.replace("...", hidden[len(hidden) - count :]) for name, count in zip(names, counts, strict=True)
    ]
    return (*filled, out.replace("...", hidden))


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
