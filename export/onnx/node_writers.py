"""Write the operators that passes put around a site, views, casts and small arithmetic, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from grape_compile.export.onnx.builder import Builder, broadcast, sizes
from grape_compile.passes.graph import require_fake


class Unwritable(Exception):
    """A node of the program that no ONNX node stands for."""


@dataclass(frozen=True)
class Written:
    """A node of the program whose operands are values of the file."""

    node: fx.Node
    written: Mapping[fx.Node, ir.Value]

    def argument(self, place: int, default: Any = None) -> Any:
        """An argument with values in place of nodes."""
        given: Any = self.node.args
        written: Any = self.written.__getitem__
        return fx.node.map_arg(given[place], written) if place < len(given) else default

    @property
    def first(self) -> ir.Value:
        """The first argument."""
        value: ir.Value = self.argument(0)
        return value

    @property
    def dtype(self) -> ir.DataType:
        """The element type of the result."""
        return element(require_fake(self.node).dtype)


_END = 2**63 - 1


def element(dtype: torch.dtype) -> ir.DataType:
    """The element type of ONNX that is a dtype of torch."""
    return (
        ir.DataType.from_numpy(torch.zeros(0, dtype=dtype).numpy().dtype)
        if dtype != torch.bfloat16
        else ir.DataType.BFLOAT16
    )


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise Unwritable("a place that is computed at run time")
    return size


def _select(builder: Builder, node: Written) -> ir.Value:
    value, axis, place = node.first, _known(node.argument(1)), _known(node.argument(2))
    return builder.op("Gather", value, builder.constant(place), axis=axis % len(sizes(value)))


def _slice(builder: Builder, node: Written) -> ir.Value:
    value = node.first
    axis = _known(node.argument(1, 0)) % len(sizes(value))
    bounds = [node.argument(2, 0) or 0, node.argument(3, _END), axis, node.argument(4, 1)]
    return builder.op("Slice", value, *(builder.constant([_known(bound)]) for bound in bounds))


def _permute(builder: Builder, node: Written) -> ir.Value:
    value = node.first
    return builder.transpose(value, *(axis % len(sizes(value)) for axis in node.argument(1)))


def _transpose(builder: Builder, node: Written) -> ir.Value:
    order = list(range(len(sizes(node.first))))
    one, other = node.argument(1), node.argument(2)
    order[one], order[other] = order[other], order[one]
    return builder.transpose(node.first, *order)


def _reshape(builder: Builder, node: Written) -> ir.Value:
    return builder.op("Reshape", node.first, _sizes(builder, node.argument(1)))


def _unflatten(builder: Builder, node: Written) -> ir.Value:
    value, axis = node.first, node.argument(1) % len(sizes(node.first))
    return _split_or_joined(builder, value, axis, axis, node.argument(2))


def _flatten(builder: Builder, node: Written) -> ir.Value:
    value = node.first
    first, last = (node.argument(*given) % len(sizes(value)) for given in ((1, 0), (2, -1)))
    return _split_or_joined(builder, value, first, last, [-1])


def _split_or_joined(
    builder: Builder, value: ir.Value, first: int, last: int, made: Sequence[Any]
) -> ir.Value:
    """The value with axes of other sizes in the place of those from `first` to `last`."""
    axes = range(len(sizes(value)))
    before, after = (
        [builder.size(value, axis) for axis in part] for part in (axes[:first], axes[last + 1 :])
    )
    return builder.op("Reshape", value, _sizes(builder, [*before, *made, *after]))


def _expand(builder: Builder, node: Written) -> ir.Value:
    return builder.op(
        "Expand", node.first, _sizes(builder, [1 if size == -1 else size for size in node.argument(1)])
    )


def _sizes(builder: Builder, wanted: Iterable[Any]) -> ir.Value:
    """Sizes as one list: numbers, and values of one number."""
    parts = [builder.constant([size]) if isinstance(size, int) else size for size in wanted]
    if any(isinstance(part, torch.SymInt) for part in parts):
        raise Unwritable("a size that no value of the file has")
    return builder.concat(parts, 0)


def _full(builder: Builder, node: Written) -> ir.Value:
    if node.argument(0):
        raise Unwritable("a tensor of one number")
    return builder.constant(node.argument(1), node.dtype)


def _binary(kind: str, dtype: ir.DataType | None = None) -> Callable[[Builder, Written], ir.Value]:
    def write(builder: Builder, node: Written) -> ir.Value:
        left, right = (
            builder.cast(side, node.dtype) if isinstance(side, ir.Value) and dtype is None else side
            for side in (node.argument(0), node.argument(1))
        )
        if not isinstance(left, ir.Value):
            left = builder.constant(left, node.dtype)
        found = builder.binary(kind, left, right)
        if dtype is not None:
            found.dtype = dtype
        return found

    return write


def _where(builder: Builder, node: Written) -> ir.Value:
    parts = [node.argument(place) for place in range(3)]
    shape = broadcast(broadcast(sizes(parts[0]), sizes(parts[1])), sizes(parts[2]))
    return builder.op("Where", *parts, dtype=node.dtype, shape=shape)


def _unary(kind: str) -> Callable[[Builder, Written], ir.Value]:
    return lambda builder, node: builder.same(kind, node.first)


WRITERS: dict[str, Callable[[Builder, Written], ir.Value]] = {
    "aten::select": _select,
    "aten::slice": _slice,
    "aten::permute": _permute,
    "aten::transpose": _transpose,
    "aten::reshape": _reshape,
    "aten::view": _reshape,
    "aten::unflatten": _unflatten,
    "aten::flatten": _flatten,
    "aten::expand": _expand,
    "aten::unsqueeze": lambda builder, node: builder.unsqueeze(node.first, node.argument(1)),
    "aten::squeeze": lambda builder, node: builder.squeeze(node.first, node.argument(1)),
    "aten::cat": lambda builder, node: builder.concat(node.argument(0), node.argument(1, 0)),
    "aten::stack": lambda builder, node: builder.concat(
        [builder.unsqueeze(part, node.argument(1, 0)) for part in node.argument(0)], node.argument(1, 0)
    ),
    "aten::to": lambda builder, node: builder.cast(node.first, node.dtype),
    "aten::detach": lambda builder, node: node.first,
    "aten::sym_size": lambda builder, node: builder.size(node.first, node.argument(1)),
    "aten::full": _full,
    "aten::mul": _binary("Mul"),
    "aten::add": _binary("Add"),
    "aten::sub": _binary("Sub"),
    "aten::le": _binary("LessOrEqual", ir.DataType.BOOL),
    "aten::where": _where,
    "aten::reciprocal": _unary("Reciprocal"),
    "aten::cos": _unary("Cos"),
    "aten::sin": _unary("Sin"),
}
"""How each operator that a pass emits around a site is written."""
