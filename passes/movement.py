"""Movement operators: how an element of the result is an element of the operand, as arithmetic on indices.

Indices are computed at the captured example's sizes. An operator whose offsets are symbolic (a cut at the length of a
cache, say) would freeze that length, so it is not movement here: `is_frozen` says so and reading stops before it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from grape_compile.passes.graph import Unreadable, fake, op_name, require_fake
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Index, broadcast, ravel, unravel

RESHAPES = {
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten", "aten::squeeze",
    "aten::unsqueeze", "aten::view_as", "aten::reshape_as",
}  # fmt: skip
IDENTITIES = {
    "aten::clone", "aten::contiguous", "aten::alias", "aten::to", "aten::_to_copy", "aten::type_as", "aten::lift_fresh",
    "aten::lift_fresh_copy", "aten::resolve_conj", "aten::resolve_neg", "aten::positive",
}  # fmt: skip
EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to"}
PERMUTES = {
    "aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT", "aten::swapaxes", "aten::swapdims",
    "aten::movedim", "aten::moveaxis",
}  # fmt: skip
SPLITS = {"aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"}
GRIDS = {"aten::meshgrid"}
# Operators with several results whose offsets are no sizes.
UNCUT = GRIDS | {"aten::unbind", "aten::broadcast_tensors"}
JOINS = {"aten::cat", "aten::concat", "aten::concatenate", "aten::stack"}
CUTS = {"aten::slice", "aten::select", "aten::narrow"}
REPEATS = {"aten::repeat", "aten::tile", "aten::repeat_interleave"}
# Take the type or the shape of a second operand, and none of its numbers.
LIKE = {"aten::type_as", "aten::expand_as", "aten::view_as", "aten::reshape_as"}
SINGLE = (
    RESHAPES
    | IDENTITIES
    | EXPANDS
    | PERMUTES
    | SPLITS
    | CUTS
    | REPEATS
    | {"getitem", "aten::flip", "aten::roll"}
)
MOVEMENTS = SINGLE | JOINS


def operand_of(node: fx.Node, position: int) -> fx.Node:
    """A tensor operand of a node; Unreadable when there is none."""
    operand = node.args[position] if position < len(node.args) else None
    if not isinstance(operand, fx.Node):
        raise Unreadable(f"operand {position} of {node.name} is no tensor")
    return operand


def keeps_numbers(node: fx.Node) -> bool:
    """A cast that keeps numbers, up to the rounding of at least a half-precision float; not one that quantises."""
    value, source = (
        fake(node),
        fake(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None,
    )
    if value is None or source is None:
        return True
    if value.is_complex() != source.is_complex():
        return False
    rounds = source.is_floating_point() and (not value.is_floating_point() or value.dtype.itemsize < 2)
    return not rounds and not (value.dtype is torch.bool and source.dtype is not torch.bool)


def is_frozen(node: fx.Node, name: str) -> bool:
    """True when the indices of a movement depend on a symbolic offset, or on the values of a tensor."""
    if name in CUTS:
        return (is_symbolic(_start(node)) and not _is_whole(node)) or any(map(is_symbolic, node.args[4:5]))
    if name == "aten::repeat_interleave":
        return _repeat(node) is None
    if name in ("aten::flip", "aten::roll", "aten::tile"):
        shape = operand_of(node, 0).meta["val"].shape
        if name == "aten::tile":
            times = ints(node.args[1])[::-1]
            return any(
                is_symbolic(size) for size, count in zip(shape[::-1], times, strict=False) if count != 1
            )
        dims = node.args[2:3] if name == "aten::roll" else node.args[1:2]
        moved = [shape[dim] for each in dims for dim in ints(each)] or shape
        return any(map(is_symbolic, moved))
    if name == "getitem":
        split = operand_of(node, 0)
        if op_name(split) not in SPLITS - UNCUT:
            return False
        dim = split_dim(split)
        return any(is_symbolic(part.shape[dim]) for part in split.meta["val"])
    if name in JOINS - {"aten::stack"}:
        dim = join_dim(node)
        return any(is_symbolic(part.meta["val"].shape[dim]) for part in join_parts(node)[:-1])
    return False


def _start(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _is_whole(node: fx.Node) -> bool:
    """A cut that starts at minus the size, which is zero at any: `x[-n:]` of n entries."""
    start, dim = _start(node), node.args[1]
    assert isinstance(dim, int)
    start, size = (
        start.meta["val"] if isinstance(start, fx.Node) else start,
        require_fake(operand_of(node, 0)).shape[dim],
    )
    return isinstance(size, torch.SymInt) and bool(start.node.expr == -size.node.expr)


def is_symbolic(value: Any) -> bool:
    """A size or scalar that the graph computes at run time."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return isinstance(value, torch.SymInt) and not value.node.expr.is_number


def join_parts(node: fx.Node) -> list[fx.Node]:
    """The values a cat or stack joins."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        raise Unreadable(f"{node.name} joins something that is no tensor")
    return [part for part in parts if isinstance(part, fx.Node)]


def join_dim(node: fx.Node) -> int:
    """The dimension a cat or stack joins along, counted from the front of the result."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return _wrapped(dim, node)


def split_dim(split: fx.Node) -> int:
    """The dimension a split cuts along."""
    position = 1 if op_name(split) == "aten::unbind" else 2
    dim = split.kwargs.get("dim", split.args[position] if len(split.args) > position else 0)
    return _wrapped(dim, operand_of(split, 0))


def _wrapped(dim: Any, node: fx.Node) -> int:
    """A dimension of a node's tensor counted from the front."""
    rank: int = node.meta["val"].dim()
    return operator.index(dim) % rank


def ints(values: Any) -> list[int]:
    """A number or a list of numbers as a list."""
    return [values] if isinstance(values, int) else [operator.index(value) for value in values]


def move(node: fx.Node, name: str, index: Index, sizes: Sizes) -> tuple[fx.Node, Index]:
    """The operand of a movement with one operand, and where in it the elements `index` of the result come from."""
    operand = operand_of(node, 0)
    if name in IDENTITIES:
        if not keeps_numbers(node):
            raise Unreadable("a cast that rounds to integers")
        return operand, index
    if name == "getitem":
        return _part(node, operand, index, sizes)
    shape = sizes.shape(operand)
    if name in RESHAPES:
        if str(node.target).endswith("view.dtype"):
            raise Unreadable("a view that reinterprets bits")
        return operand, unravel(ravel(index, sizes.shape(node)), shape) if shape else ()
    if name in EXPANDS:
        return operand, broadcast(index, shape)
    if name in PERMUTES:
        moved = list(index)
        for position, dim in enumerate(permutation(node, name, len(shape))):
            moved[dim] = index[position]
        return operand, tuple(moved)
    return operand, _step(node, name, index, shape, sizes)


def _step(node: fx.Node, name: str, index: Index, shape: tuple[int, ...], sizes: Sizes) -> Index:
    if name in ("aten::repeat", "aten::tile"):
        tail = index[len(index) - len(shape) :]
        return tuple(axis % size for axis, size in zip(tail, shape, strict=True))
    if name == "aten::flip":
        dims = {dim % len(shape) for dim in ints(node.args[1])}
        return tuple(shape[d] - 1 - axis if d in dims else axis for d, axis in enumerate(index))
    if name == "aten::roll":
        return _roll(node, index, shape)
    if name == "aten::repeat_interleave":
        return _repeat_interleave(node, index, shape, sizes)
    return _cut(node, name, index, shape, sizes)


def _cut(node: fx.Node, name: str, index: Index, shape: tuple[int, ...], sizes: Sizes) -> Index:
    axes, args = list(index), node.args
    dim = sizes(args[1]) % len(shape) if len(args) > 1 else 0
    if name == "aten::select":
        like = index[0] if index else torch.zeros(1, dtype=torch.int64)
        axes.insert(dim, torch.full_like(like, sizes(args[2]) % shape[dim]))
        return tuple(axes)
    start = sizes(args[2]) if len(args) > 2 and args[2] is not None else 0
    step = sizes(args[4]) if name == "aten::slice" and len(args) > 4 else 1
    start = max(0, min(start + shape[dim] if start < 0 else start, shape[dim]))
    axes[dim] = axes[dim] * step + start
    return tuple(axes)


def _roll(node: fx.Node, index: Index, shape: tuple[int, ...]) -> Index:
    if len(node.args) < 3 or not node.args[2]:
        raise Unreadable("a roll of the flattened tensor")
    axes = list(index)
    for shift, dim in zip(ints(node.args[1]), ints(node.args[2]), strict=True):
        axes[dim] = (axes[dim] - shift) % shape[dim]
    return tuple(axes)


def _repeat_interleave(node: fx.Node, index: Index, shape: tuple[int, ...], sizes: Sizes) -> Index:
    found = _repeat(node)
    if found is None:
        raise Unreadable("repeat_interleave with tensor repeats or of the flattened tensor")
    repeats, dim = found
    axes = list(index)
    axes[dim % len(shape)] = axes[dim % len(shape)] // sizes(repeats)
    return tuple(axes)


def _repeat(node: fx.Node) -> tuple[Any, int] | None:
    """How often a `repeat_interleave` repeats every entry and along which dimension, where neither is a tensor's."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    repeats = node.args[1] if len(node.args) > 1 else None
    if (
        repeats is None
        or is_symbolic(repeats)
        or (isinstance(repeats, fx.Node) and fake(repeats) is not None)
    ):
        return None
    return (repeats, dim) if isinstance(dim, int) else None


def _part(node: fx.Node, split: fx.Node, index: Index, sizes: Sizes) -> tuple[fx.Node, Index]:
    name, which = op_name(split), node.args[1]
    if name in GRIDS and isinstance(which, int):
        return _axis_of_grid(split, which, index)
    if name == "aten::broadcast_tensors" and isinstance(which, int):
        operand = join_parts(split)[which]
        return operand, broadcast(index, sizes.shape(operand))
    if name not in SPLITS or not isinstance(which, int):
        raise Unreadable(f"output of {name or split.op}")
    dim, parts = split_dim(split), list(split.meta["val"])
    which = which % len(parts)
    axes = list(index)
    if name == "aten::unbind":
        axes.insert(dim, torch.full_like(index[0], which))
    else:
        axes[dim] = axes[dim] + sum(sizes(part.shape[dim]) for part in parts[:which])
    return operand_of(split, 0), tuple(axes)


def _axis_of_grid(grid: fx.Node, which: int, index: Index) -> tuple[fx.Node, Index]:
    """One coordinate of a grid: the axis it was made of, at the index along its own dimension."""
    axes = join_parts(grid)
    which = which % len(axes)
    dim = {0: 1, 1: 0}.get(which, which) if grid.kwargs.get("indexing") == "xy" else which
    return axes[which], (index[dim],) if axes[which].meta["val"].dim() else ()


def permutation(node: fx.Node, name: str, rank: int) -> list[int]:
    """For every axis of the result the axis of the operand it is."""
    order = list(range(rank))
    if name == "aten::permute":
        return [dim % rank for dim in ints(node.args[1])]
    if name in ("aten::movedim", "aten::moveaxis"):
        sources, targets = ([dim % rank for dim in ints(argument)] for argument in node.args[1:3])
        order = [dim for dim in order if dim not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
        return order
    if name == "aten::numpy_T":
        return order[::-1]
    first, second = (
        (-2, -1) if name == "aten::mT" else (0, 1) if name == "aten::t" else tuple(ints(node.args[1:3]))
    )
    if rank >= 2:
        order[first], order[second] = order[second], order[first]
    return order


def places(node: fx.Node) -> tuple[int, fx.Node]:
    """The axis that `index_select`, or `index` with one list, picks along, and the list."""
    if op_name(node) == "aten::index_select":
        return ints(node.args[1])[0] % require_fake(node).dim(), operand_of(node, 2)
    given = node.args[1]
    assert isinstance(given, list | tuple)
    picked = [(dim, each) for dim, each in enumerate(given) if isinstance(each, fx.Node)]
    if len(picked) != 1 or require_fake(picked[0][1]).dim() != 1:
        raise Unreadable("elements picked one by one")
    return picked[0]


def table_of(node: fx.Node, axes: int) -> fx.Node | None:
    """The table that rows are looked up in, of which the last `axes` axes are left as they are."""
    name = op_name(node)
    if name not in ("aten::embedding", "aten::index_select", "aten::index"):
        return None
    table = operand_of(node, 0)
    rank = require_fake(table).dim()
    if name == "aten::index":
        given = node.args[1]
        assert isinstance(given, list | tuple)
        picked = [dim for dim, each in enumerate(given) if each is not None]
    else:
        picked = [0 if name == "aten::embedding" else ints(node.args[1])[0] % rank]
    return table if picked and max(picked) < rank - axes else None
