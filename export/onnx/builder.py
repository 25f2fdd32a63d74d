"""Nodes put into a graph one by one, with what is known of their values: types, and shapes where they matter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from grape_compile.errors import GrapeError

#: A size: a number, or the name of one that is known at run time; None for one without a name.
Size = int | str | None

FLOAT: Final = ir.DataType.FLOAT
DOUBLE: Final = ir.DataType.DOUBLE
INT64: Final = ir.DataType.INT64
BOOL: Final = ir.DataType.BOOL
MICROSOFT: Final = "com.microsoft"


class Builder:
    """Puts nodes in front of `anchor`; equal constants are one initializer of `root`, which a body of a loop lies in.

    A value is given the element type of the first input unless told otherwise.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node, root: ir.Graph | None = None) -> None:
        self.graph, self.anchor, self.root = graph, anchor, root or graph
        self._prefix = (
            next((value.name for value in anchor.outputs if value.name), None) or f"node{id(anchor)}"
        )
        self._count = 0

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Sequence[Size] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node of one output and return that."""
        (value,) = self.ops(kind, inputs, 1, dtype=dtype, domain=domain, **attributes)
        value.shape = None if shape is None else ir.Shape(shape)
        return value

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        *,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node of several outputs, all of one element type, and return them."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        kept = {name: value for name, value in attributes.items() if value is not None}
        node = ir.Node(
            domain,
            kind,
            given,
            ir.convenience.convert_attributes(kept),
            num_outputs=outputs,
            name=self._name(),
        )
        element = dtype or next((dtype_of(value) for value in given if value is not None), None)
        for value in node.outputs:
            value.name = self._name()
            value.type = None if element is None else ir.TensorType(element)
        node.metadata_props.update(self.anchor.metadata_props)
        self.graph.insert_before(self.anchor, node)
        return list(node.outputs)

    def constant(self, numbers: Any, dtype: ir.DataType = INT64) -> ir.Value:
        """Return an initializer with these numbers, the one there is if there is one."""
        array = np.asarray(numbers, dtype.numpy())
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        name = f"grape_{dtype.name.lower()}_{hashlib.sha256(content).hexdigest()[:16]}"
        root = self.root
        if name not in root.initializers:
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(dtype),
                const_value=ir.tensor(array, name=name),
            )
            root.register_initializer(value)
        return root.initializers[name]

    def given(self, name: str, dtype: ir.DataType, shape: Sequence[Size]) -> ir.Value:
        """Return a value that a body is given."""
        return ir.Value(name=f"{self._name()}_{name}", type=ir.TensorType(dtype), shape=ir.Shape(shape))

    # -- operators that every part needs ------------------------------------------------------------------------------

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the numbers in another element type, or the value itself."""
        if dtype_of(value) == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, shape=sizes(value), to=int(dtype))

    def binary(self, kind: str, left: ir.Value, right: ir.Value | float) -> ir.Value:
        """Return an operator of two operands that broadcast; a number takes the element type of `left`."""
        other = right if isinstance(right, ir.Value) else self.constant(right, dtype_of(left))
        return self.op(kind, left, other, shape=broadcast(sizes(left), sizes(other)))

    def same(self, kind: str, value: ir.Value, **attributes: Any) -> ir.Value:
        """Return an operator that keeps shape and element type."""
        return self.op(kind, value, shape=sizes(value), **attributes)

    def gather(self, value: ir.Value, indices: Sequence[int], axis: int = -1) -> ir.Value:
        """Return chosen entries of one axis."""
        at = axis % len(sizes(value))
        shape = (*sizes(value)[:at], len(indices), *sizes(value)[at + 1 :])
        return self.op("Gather", value, self.constant(indices), shape=shape, axis=at)

    def permute(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """Return the last axis in another order: neighbours to halves and back by a transposition, else by a Gather.

        ONNX Runtime gathers along a last axis one number at a time, six times slower than it transposes.
        """
        size = len(order)
        moved = [at for at in range(size) if order[at] != at]
        if not moved:
            return value
        # Neighbours to halves leave the first and the last where they are.
        for start, stop in ((0, size), (max(moved[0] - 1, 0), min(moved[-1] + 2, size))):
            inner = [at - start for at in order[start:stop]]
            if inner != _transposed(len(inner), inner[1]):
                continue
            middle = self._transposed(self.slice(value, start, stop), inner[1])
            before = [self.slice(value, 0, start)] if start else []
            behind = [self.slice(value, stop, size)] if stop < size else []
            return self.concat([*before, middle, *behind])
        return self.gather(value, order)

    def _transposed(self, value: ir.Value, columns: int) -> ir.Value:
        """Return the last axis as a matrix of so many columns, transposed."""
        *lead, size = sizes(value)
        assert isinstance(size, int)
        rank, zeros, rows = len(lead), (0,) * len(lead), size // columns
        apart = self.reshape(value, (*zeros, rows, columns), (*lead, rows, columns))
        turned = self.transpose(apart, *range(rank), rank + 1, rank)
        return self.reshape(turned, (*zeros, size), (*lead, size))

    def slice(self, value: ir.Value, start: int, stop: int, axis: int = -1, step: int = 1) -> ir.Value:
        """Return entries start ... stop - 1 of one axis of known size, or the value itself where that is all."""
        at = axis % len(sizes(value))
        if (start, stop, step) == (0, sizes(value)[at], 1):
            return value
        shape = (*sizes(value)[:at], len(range(start, stop, step)), *sizes(value)[at + 1 :])
        bounds = (self.constant([bound]) for bound in (start, stop, at, step))
        return self.op("Slice", value, *bounds, shape=shape)

    def part(self, value: ir.Value, start: ir.Value, stop: ir.Value, axis: int) -> ir.Value:
        """Return the entries from `start` to `stop` ([1] each) of one axis."""
        at = axis % len(sizes(value))
        shape = (*sizes(value)[:at], None, *sizes(value)[at + 1 :])
        return self.op("Slice", value, start, stop, self.constant([at]), shape=shape)

    def tail(self, value: ir.Value, count: ir.Value, axis: int, size: Size = None) -> ir.Value:
        """Return the last `count` [1] entries of one axis."""
        at = axis % len(sizes(value))
        shape = (*sizes(value)[:at], size, *sizes(value)[at + 1 :])
        last = self.op("Neg", count, shape=(1,))
        end = self.constant([np.iinfo(np.int64).max])
        return self.op("Slice", value, last, end, self.constant([at]), shape=shape)

    def concat(self, parts: Sequence[ir.Value], axis: int = -1) -> ir.Value:
        """Return the parts one behind the other along one axis, or the only one."""
        if len(parts) == 1:
            return parts[0]
        at = axis % len(sizes(parts[0]))
        along = [sizes(part)[at] for part in parts]
        total = sum(size for size in along if isinstance(size, int)) if all_known(along) else None
        shape = (*sizes(parts[0])[:at], total, *sizes(parts[0])[at + 1 :])
        return self.op("Concat", *parts, shape=shape, axis=at)

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        """Return the value with axes of size one at these places of the result."""
        rank = len(sizes(value)) + len(axes)
        places = sorted(axis % rank for axis in axes)
        shape = list(sizes(value))
        for place in places:
            shape.insert(place, 1)
        return self.op("Unsqueeze", value, self.constant(places), shape=shape)

    def squeeze(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the value without an axis of size one."""
        at = axis % len(sizes(value))
        shape = (*sizes(value)[:at], *sizes(value)[at + 1 :])
        return self.op("Squeeze", value, self.constant([at]), shape=shape)

    def transpose(self, value: ir.Value, *order: int) -> ir.Value:
        """Return the value with its axes in another order."""
        return self.op("Transpose", value, shape=[sizes(value)[at] for at in order], perm=order)

    def reshape(self, value: ir.Value, target: Sequence[int], shape: Sequence[Size]) -> ir.Value:
        """Return the numbers in another shape; `target` as Reshape takes it (0: as before, -1: what is left)."""
        return self.op("Reshape", value, self.constant(list(target)), shape=shape)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the size of one axis, [1]."""
        at = axis % len(sizes(value))
        known = sizes(value)[at]
        if isinstance(known, int):
            return self.constant([known])
        return self.op("Shape", value, dtype=INT64, shape=(1,), start=at, end=at + 1)

    def expand(self, value: ir.Value, by: Sequence[ir.Value | int], shape: Sequence[Size]) -> ir.Value:
        """Return the value broadcast to the sizes `by` ([1] each); 1 leaves an axis as it is."""
        target = self.concat([self.constant([size]) if isinstance(size, int) else size for size in by], 0)
        return self.op("Expand", value, target, shape=shape)

    def ladder(self, start: ir.Value | int, stop: ir.Value) -> ir.Value:
        """Return start, start + 1, ..., stop - 1 from [1] operands."""
        first = self.constant(start) if isinstance(start, int) else self.squeeze(start, 0)
        return self.op("Range", first, self.squeeze(stop, 0), self.constant(1), dtype=INT64, shape=(None,))

    def matmul(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Return the matrix product."""
        lead = broadcast(sizes(left)[:-2], sizes(right)[:-2])
        return self.op("MatMul", left, right, shape=(*lead, sizes(left)[-2], sizes(right)[-1]))

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}_grape_{self._count}"


def dtype_of(value: ir.Value) -> ir.DataType:
    """Return the element type of a value; GrapeError where the graph does not tell."""
    if value.dtype is None:
        raise GrapeError(
            "emit ONNX nodes", f"{value.name} has no element type", "a graph with shape inference"
        )
    return value.dtype


def sizes(value: ir.Value) -> tuple[Size, ...]:
    """Return the shape of a value; GrapeError where the graph does not tell its rank."""
    if value.shape is None:
        raise GrapeError("emit ONNX nodes", f"{value.name} has no shape", "a graph with shape inference")
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def broadcast(left: Sequence[Size], right: Sequence[Size]) -> tuple[Size, ...]:
    """Return the shape of what two shapes broadcast to."""
    rank = max(len(left), len(right))
    pairs = zip(*((*(1,) * (rank - len(side)), *side) for side in (left, right)), strict=True)
    return tuple(_wider(first, second) for first, second in pairs)


def all_known(shape: Sequence[Size]) -> bool:
    """Whether every size is a number."""
    return all(isinstance(size, int) for size in shape)


def _transposed(size: int, columns: int) -> list[int]:
    """Return the order in which a matrix of `size` numbers is read by columns; nothing where it is no matrix."""
    if columns < 1 or size % columns:
        return []
    rows = size // columns
    return [row * columns + column for column in range(columns) for row in range(rows)]


def _wider(first: Size, second: Size) -> Size:
    if first == 1:
        return second
    if second == 1 or first == second:
        return first
    return second if isinstance(second, int) else first


def compute_dtype(value: ir.Value) -> ir.DataType:
    """Return the element type that an encoding computes in: double for double, else float."""
    return DOUBLE if dtype_of(value) == DOUBLE else FLOAT


def joined(builder: Builder, heads: ir.Value) -> ir.Value:
    """Return [B, T, H * D] from [B, H, T, D]."""
    batch, count, length, width = sizes(heads)
    assert isinstance(count, int)
    assert isinstance(width, int)
    by_token = builder.transpose(heads, 0, 2, 1, 3)
    return builder.reshape(by_token, (0, 0, count * width), (batch, length, count * width))
