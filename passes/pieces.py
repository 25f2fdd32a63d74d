"""Values put together of pieces: which piece an element comes from, by its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from grape_compile.passes.graph import op_name
from grape_compile.passes.movement import ints, is_symbolic, join_dim, join_parts, operand_of
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Index, Term, raise_if

Back = Callable[[fx.Node, Index, Tensor], list[Term]]
"""How reading goes on at an operand."""

SCATTERS = {"aten::slice_scatter", "aten::select_scatter"}
PADS = {"aten::pad", "aten::constant_pad_nd"}


def joined(node: fx.Node, index: Index, rows: Tensor, back: Back, sizes: Sizes) -> list[Term]:
    """Elements of a concatenation or a stack come from the part that holds them."""
    dim, offset = join_dim(node), 0
    terms: list[Term] = []
    for part in join_parts(node):
        size = 1 if op_name(node) == "aten::stack" else sizes.shape(part)[dim]
        keep = ((index[dim] >= offset) & (index[dim] < offset + size)).nonzero().flatten()
        if keep.numel():
            axes = [axis[keep] for axis in index]
            if op_name(node) == "aten::stack":
                del axes[dim]
            else:
                axes[dim] = axes[dim] - offset
            terms += back(part, tuple(axes), rows[keep])
        offset += size
    return terms


def padded(node: fx.Node, index: Index, rows: Tensor, back: Back, sizes: Sizes) -> list[Term]:
    """Elements inside come from the operand, the others are zero: no term at all."""
    operand, rest = operand_of(node, 0), [*node.args[2:], *node.kwargs.values()]
    raise_if(any(value not in (None, 0, 0.0, "constant") for value in rest), "padding by more than zeros")
    amounts = node.args[1]
    raise_if(
        not isinstance(amounts, list | tuple) or any(map(is_symbolic, amounts)),
        "padding of symbolic width",
    )
    shape, axes, inside = sizes.shape(operand), list(index), torch.ones_like(rows, dtype=torch.bool)
    for number, before in enumerate(ints(amounts)[::2]):
        dim = len(shape) - 1 - number
        axes[dim] = axes[dim] - before
        inside = inside & (axes[dim] >= 0) & (axes[dim] < shape[dim])
    keep = inside.nonzero().flatten()
    return back(operand, tuple(axis[keep] for axis in axes), rows[keep]) if keep.numel() else []


def scattered(node: fx.Node, index: Index, rows: Tensor, back: Back, sizes: Sizes) -> list[Term]:
    """Elements inside of the slice come from what was written, the others from the tensor written to."""
    base, written = operand_of(node, 0), operand_of(node, 1)
    size = sizes.shape(base)
    dim, start, stop, step = _range(node, size, sizes)
    inside = (index[dim] >= start) & (index[dim] < stop) & ((index[dim] - start) % step == 0)
    terms: list[Term] = []
    keep = inside.nonzero().flatten()
    if keep.numel():
        axes = [axis[keep] for axis in index]
        if op_name(node) == "aten::select_scatter":
            del axes[dim]
        else:
            axes[dim] = (axes[dim] - start) // step
        terms += back(written, tuple(axes), rows[keep])
    rest = (~inside).nonzero().flatten()
    if rest.numel():
        terms += back(base, tuple(axis[rest] for axis in index), rows[rest])
    return terms


def _range(node: fx.Node, size: tuple[int, ...], sizes: Sizes) -> tuple[int, int, int, int]:
    """Dimension, start, stop and step of what a scatter writes."""
    args = list(node.args[2:])
    raise_if(any(is_symbolic(argument) for argument in args), f"{op_name(node)} at a symbolic offset")
    dim = (sizes(args[0]) if args else 0) % len(size)
    if op_name(node) == "aten::select_scatter":
        place = sizes(args[1]) % size[dim]
        return dim, place, place + 1, 1
    bounds = [None if bound is None else sizes(bound) for bound in args[1:3]]
    start, stop, _ = slice(*bounds).indices(size[dim]) if len(bounds) == 2 else slice(None).indices(size[dim])
    return dim, start, stop, sizes(args[3]) if len(args) > 3 else 1
