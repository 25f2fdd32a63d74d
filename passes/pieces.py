"""Values put together of pieces: which piece an element comes from, by its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from grape_compile.passes.graph import op_name, require_fake
from grape_compile.passes.movement import ints, is_symbolic, join_dim, join_parts, operand_of
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Index, Term, broadcast, raise_if, ravel, unravel

Back = Callable[[fx.Node, Index, Tensor], list[Term]]
"""How reading goes on at an operand."""

Held = Callable[[fx.Node, Index], Tensor]
"""The integers that a list of places holds there."""

PUTS = {"aten::index_put", "aten::index_copy", "aten::index_add"}
SCATTERS = {"aten::slice_scatter", "aten::select_scatter"} | PUTS
BLOCKS = {"aten::diag_embed", "aten::block_diag"}
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


def put(node: fx.Node, index: Index, rows: Tensor, back: Back, sizes: Sizes, held: Held) -> list[Term]:
    """Elements at listed places come from what was put there, or have it added, the others from the base."""
    base, values, lists, adds = _put(node)
    dims, size = sorted(lists), sizes.shape(base)
    shape = tuple(size[dim] for dim in dims)
    common = torch.broadcast_shapes(*(sizes.shape(each) for each in lists.values()))
    every = unravel(torch.arange(torch.Size(common).numel()), common)
    listed = (held(lists[dim], broadcast(every, sizes.shape(lists[dim]))) % size[dim] for dim in dims)
    places = ravel(tuple(listed), shape)
    raise_if(places.unique().numel() != places.numel(), "elements put twice at one place")
    number = torch.full((torch.Size(shape).numel(),), -1).scatter(0, places, torch.arange(places.numel()))
    which = number[ravel(tuple(index[dim] for dim in dims), shape)]
    keep, terms = (which >= 0).nonzero().flatten(), list[Term]()
    if keep.numel():
        axes = [axis[keep] for dim, axis in enumerate(index) if dim not in dims]
        # Lists that stand side by side leave their axes there, others in front.
        first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
        axes[first:first] = unravel(which[keep], common)
        terms += back(values, broadcast(tuple(axes), sizes.shape(values)), rows[keep])
    rest = torch.arange(rows.numel()) if adds else (which < 0).nonzero().flatten()
    if rest.numel():
        terms += back(base, tuple(axis[rest] for axis in index), rows[rest])
    return terms


def _put(node: fx.Node) -> tuple[fx.Node, fx.Node, dict[int, fx.Node], bool]:
    """What is put into, what is put there, the lists of places by their axes, and whether it is added."""
    base = operand_of(node, 0)
    if op_name(node) == "aten::index_put":
        given, adds = node.args[1], bool(node.kwargs.get("accumulate", (*node.args, False)[3]))
        assert isinstance(given, list | tuple)
        lists = {dim: each for dim, each in enumerate(given) if isinstance(each, fx.Node)}
        values = operand_of(node, 2)
    else:
        raise_if(bool(node.kwargs) or len(node.args) > 4, "values added with a factor")
        adds, values = op_name(node) == "aten::index_add", operand_of(node, 3)
        lists = {ints(node.args[1])[0] % require_fake(base).dim(): operand_of(node, 2)}
    kinds = {require_fake(each).dtype for each in lists.values()}
    raise_if(not kinds or bool(kinds & {torch.bool, torch.uint8}), "elements put by a mask")
    return base, values, lists, adds


def blocks(node: fx.Node, index: Index, rows: Tensor, back: Back, sizes: Sizes) -> list[Term]:
    """Elements of blocks along a diagonal come from the block that holds them, the others are zero: no term."""
    if op_name(node) == "aten::diag_embed":
        return _diagonal(node, index, rows, back)
    terms, offset = list[Term](), [0, 0]
    for block in join_parts(node):
        size = (1, 1, *sizes.shape(block))[-2:]
        at = [axis - start for axis, start in zip(index, offset, strict=True)]
        inside = [(axis >= 0) & (axis < end) for axis, end in zip(at, size, strict=True)]
        keep = (inside[0] & inside[1]).nonzero().flatten()
        if keep.numel():
            axes = tuple(axis[keep] for axis in at)
            terms += back(block, axes[2 - require_fake(block).dim() :], rows[keep])
        offset = [start + end for start, end in zip(offset, size, strict=True)]
    return terms


def _diagonal(node: fx.Node, index: Index, rows: Tensor, back: Back) -> list[Term]:
    named = dict(zip(("offset", "dim1", "dim2"), (0, -2, -1), strict=True))
    named |= dict(zip(named, ints(node.args[1:]), strict=False)) | {
        key: ints(each)[0] for key, each in node.kwargs.items()
    }
    first, second = named["dim1"] % len(index), named["dim2"] % len(index)
    keep = (index[second] - index[first] == named["offset"]).nonzero().flatten()
    if not keep.numel():
        return []
    along = index[first if named["offset"] >= 0 else second]
    axes = [axis[keep] for dim, axis in enumerate(index) if dim not in (first, second)]
    return back(operand_of(node, 0), (*axes, along[keep]), rows[keep])
