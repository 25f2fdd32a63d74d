"""Readers of operators that make, move and pick elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from grape_compile.export.onnx.reading.call import (
    Call,
    Numbers,
    Untranslated,
    Value,
    integer_of,
    integers_of,
    is_numbers,
    reads,
    settled,
    tensor,
)

_END = 2**63 - 1
_FEW = 64
"""Elements of an array that counts as numbers: the sizes and axes of any operator, never a table."""


def numbers_of(held: ir.TensorProtocol) -> Numbers | None:
    """What a constant holds where it is a scalar, or a short list of integers."""
    kind = held.dtype
    if held.size > _FEW or len(held.shape) > 1 or kind in (ir.DataType.BFLOAT16, ir.DataType.STRING):
        return None
    array = held.numpy()
    if array.dtype.kind == "f":
        return array if held.size == 1 and array.dtype.itemsize > 1 else None
    return array if array.dtype.kind in "ib" else None


@reads("Shape")
def shape(call: Call, value: Value) -> Numbers:
    """The sizes of a value, from one axis to another."""
    sizes = list(value.shape)[call.integer("start", 0) : call.integer("end", _END)]
    return settled(np.array(sizes, dtype=object))


@reads("Size")
def size(call: Call, value: Value) -> Numbers:
    """The number of elements."""
    return settled(np.array(math.prod(value.shape), dtype=object))


@reads("Reshape")
def reshape(call: Call, value: Value, target: Value) -> Value:
    """Other sizes: -1 for what remains, 0 for the size at the same place."""
    sizes = integers_of(target)
    if not call.integer("allowzero", 0):
        sizes = [
            value.shape[place] if isinstance(size, int) and size == 0 else size
            for place, size in enumerate(sizes)
        ]
    return value.reshape(sizes)


@reads("Flatten")
def flatten(call: Call, value: Value) -> Value:
    """A matrix: the axes before `axis`, and those from it on."""
    rank = len(value.shape)
    axis = call.integer("axis", 1) % (rank + 1)
    if axis == rank == 1:
        return value.reshape([-1, 1])
    if axis > 0:
        return value.reshape([math.prod(value.shape[:axis]), -1])
    return value.reshape([1, -1])


@reads("Squeeze")
def squeeze(call: Call, value: Value, axes: Value | None = None) -> Value:
    """Axes of one entry dropped."""
    held = call.integers("axes") if axes is None else integers_of(axes)
    rank = len(value.shape)
    if held is None:
        held = [place for place, size in enumerate(value.shape) if isinstance(size, int) and size == 1]
    places = [axis % rank for axis in held]
    if isinstance(value, np.ndarray):
        return np.asarray(np.squeeze(value, tuple(places)))
    for place in sorted(places, reverse=True):
        value = value.squeeze(place)
    return value


@reads("Unsqueeze")
def unsqueeze(call: Call, value: Value, axes: Value | None = None) -> Value:
    """Axes of one entry added."""
    held = call.integers("axes") if axes is None else integers_of(axes)
    rank = len(value.shape) + len(held or [])
    places = sorted(axis % rank for axis in held or [])
    if isinstance(value, np.ndarray):
        return np.expand_dims(value, tuple(places))
    for place in places:
        value = value.unsqueeze(place)
    return value


@reads("Transpose")
def transpose(call: Call, value: Value) -> Value:
    """Axes in another order, by default reversed."""
    order = call.integers("perm") or list(range(len(value.shape)))[::-1]
    if isinstance(value, np.ndarray):
        return value.transpose(order)
    moved = [place for place, axis in enumerate(order) if place != axis]
    if len(moved) == 2:
        return value.transpose(*moved)
    return value.permute(order)


@reads("Expand")
def expand(call: Call, value: Value, target: Value) -> Value:
    """Entries repeated along axes of size one; a size of one in the target leaves the operand's own."""
    sizes = integers_of(target)
    if isinstance(value, np.ndarray) and all(isinstance(size, int) for size in sizes):
        return np.asarray(np.broadcast_to(value, np.broadcast_shapes(value.shape, tuple(sizes))))
    operand = tensor(value)
    own = [1] * (len(sizes) - operand.dim()) + list(operand.shape)
    sizes = [1] * (len(own) - len(sizes)) + sizes
    wanted = [
        one if isinstance(size, int) and size == 1 else size for one, size in zip(own, sizes, strict=True)
    ]
    return operand.expand(wanted)


@reads("Tile")
def tile(call: Call, value: Value, repeats: Value) -> Value:
    """The whole repeated along each axis."""
    if isinstance(value, np.ndarray):
        return np.tile(value, integers_of(repeats))
    return value.repeat(integers_of(repeats))


@reads("Concat")
def concat(call: Call, *parts: Value) -> Value:
    """Values one behind the other."""
    axis = call.integer("axis", 0)
    if is_numbers(*parts):
        return settled(np.concatenate([np.asarray(part) for part in parts], axis))
    return torch.cat([tensor(part) for part in parts], axis)


@reads("Split")
def split(call: Call, value: Value, lengths: Value | None = None) -> list[Value]:
    """A value cut into parts along one axis."""
    axis = call.integer("axis", 0)
    if lengths is not None:
        parts = integers_of(lengths)
    else:
        count = call.integer("num_outputs", len(call.node.outputs))
        whole = value.shape[axis]
        if not isinstance(whole, int):
            raise Untranslated("equal parts of a symbolic size")
        each = -(-whole // count)
        parts = [min(each, whole - place * each) for place in range(count)]
    if isinstance(value, np.ndarray):
        return list(np.split(value, np.cumsum(parts)[:-1], axis))
    return list(torch.split(value, parts, axis))


@reads("Slice")
def slices(
    call: Call,
    value: Value,
    starts: Value,
    ends: Value,
    axes: Value | None = None,
    steps: Value | None = None,
) -> Value:
    """A stretch of entries along axes, every `step`-th; backwards all of them only."""
    first, last = integers_of(starts), integers_of(ends)
    along = list(range(len(first))) if axes is None else integers_of(axes)
    by = [1] * len(first) if steps is None else integers_of(steps)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        if isinstance(value, np.ndarray):
            where: list[Any] = [slice(None)] * value.ndim
            end_ = None if isinstance(end, int) and step < 0 and end < -_END // 2 else end
            where[axis] = slice(start, end_, step)
            value = value[tuple(where)]
        elif isinstance(step, int) and step > 0:
            value = _slice(value, axis, start, end, step)
        elif step == -1 and start in (-1, _END) and isinstance(end, int) and end < -_END // 2:
            value = value.flip(axis)
        else:
            raise Untranslated("a slice that runs backwards")
    return value


def _slice(value: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    """Ends beyond a value are cut off, also where they are symbolic."""
    cut: Tensor = torch.ops.aten.slice.Tensor(value, axis, start, end, step)
    return cut


@reads("Gather")
def gather(call: Call, value: Value, places: Value) -> Value:
    """Entries picked along one axis."""
    axis = call.integer("axis", 0)
    if is_numbers(value, places):
        assert isinstance(value, np.ndarray)
        assert isinstance(places, np.ndarray)
        return np.asarray(np.take(value, settled(places).astype(np.int64), axis))
    operand = tensor(value)
    axis %= operand.dim()
    if isinstance(places, np.ndarray):
        if places.ndim == 0:
            return operand.select(axis, integer_of(places))
        if places.size == 1 and places.ndim == 1 and isinstance(integer_of(places), int):
            place = integer_of(places)
            return _slice(operand, axis, place, place + 1 if place != -1 else _END, 1)
    index = tensor(places).long()
    if axis == 0 and operand.dim() == 2 and operand.is_floating_point():
        return torch.nn.functional.embedding(index, operand)
    if index.dim() == 0:
        return operand.index_select(axis, index.reshape(1)).squeeze(axis)
    if index.dim() == 1:
        return operand.index_select(axis, index)
    picked: list[Any] = [slice(None)] * axis
    return operand[(*picked, index)]


@reads("GatherElements")
def gather_elements(call: Call, value: Value, places: Value) -> Tensor:
    """One entry picked for every place of the index."""
    return torch.gather(tensor(value), call.integer("axis", 0), tensor(places).long())


@reads("GatherND")
def gather_nd(call: Call, value: Value, places: Value) -> Tensor:
    """Entries picked by several coordinates at once."""
    if call.integer("batch_dims", 0):
        raise Untranslated("GatherND within batches")
    index = tensor(places).long()
    count = index.shape[-1]
    if not isinstance(count, int):
        raise Untranslated("a symbolic number of coordinates")
    coordinates: Any = torch.unbind(index, -1)
    return tensor(value)[coordinates]


@reads("Range")
def arange(call: Call, start: Value, limit: Value, step: Value) -> Tensor:
    """Numbers from one to another."""
    if not is_numbers(start, limit, step):
        raise Untranslated("a range whose length is computed from values")
    assert isinstance(start, np.ndarray)
    bounds = [np.asarray(each).reshape(()).item() for each in (start, limit, step)]
    kind = torch.int64 if start.dtype == object else torch.from_numpy(np.zeros(0, start.dtype)).dtype
    return torch.arange(*bounds, dtype=kind)


@reads("Constant")
def constant(call: Call) -> Numbers:
    """Numbers written out in the graph; larger constants are inputs of what is traced."""
    held = constant_tensor(call.node)
    found = None if held is None else numbers_of(held)
    if found is None:
        raise Untranslated("a constant that is no tensor")
    return found


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """What a `Constant` node holds."""
    (held,) = node.attributes.values() if len(node.attributes) == 1 else (None,)
    if held is None:
        return None
    if held.name == "value":
        return held.as_tensor()
    made: dict[str, Callable[[], Numbers]] = {
        "value_int": lambda: np.array(held.as_int(), np.int64),
        "value_ints": lambda: np.array(held.as_ints(), np.int64),
        "value_float": lambda: np.array(held.as_float(), np.float32),
        "value_floats": lambda: np.array(held.as_floats(), np.float32),
    }
    return ir.Tensor(made[held.name]()) if held.name in made else None


@reads("ConstantOfShape")
def constant_of_shape(call: Call, sizes: Value) -> Value:
    """One number everywhere."""
    held = call.node.attributes.get("value")
    number = np.zeros(1, np.float32) if held is None else held.as_tensor().numpy()
    wanted = integers_of(sizes)
    if all(isinstance(size, int) for size in wanted) and len(wanted) <= 1 and math.prod(wanted) <= _FEW:
        return np.full(wanted, number.item(), number.dtype)
    return torch.full(wanted, number.item(), dtype=torch.from_numpy(number[:0]).dtype)


@reads("Trilu")
def trilu(call: Call, value: Value, diagonal: Value | None = None) -> Tensor:
    """The triangle of a matrix above or below a diagonal."""
    offset = 0 if diagonal is None else integer_of(diagonal)
    if not isinstance(offset, int):
        raise Untranslated("a symbolic diagonal")
    return (torch.triu if call.integer("upper", 1) else torch.tril)(tensor(value), offset)


@reads("Pad")
def pad(
    call: Call, value: Value, widths: Value, fill: Value | None = None, axes: Value | None = None
) -> Tensor:
    """One number added around a value."""
    if call.text("mode", "constant") != "constant":
        raise Untranslated("a padding that repeats entries")
    operand, given = tensor(value), integers_of(widths)
    along = (
        list(range(operand.dim())) if axes is None else [axis % operand.dim() for axis in integers_of(axes)]
    )
    both = {axis: (given[place], given[place + len(along)]) for place, axis in enumerate(along)}
    flat: list[Any] = []
    for axis in reversed(range(operand.dim())):
        flat += both.get(axis, (0, 0))
    if isinstance(fill, Tensor):
        raise Untranslated("a padding with a number computed at run time")
    number = 0.0 if fill is None else fill.item()
    padded: Tensor = torch.ops.aten.constant_pad_nd.default(operand, flat, number)
    return padded


@reads("ScatterElements")
def scatter_elements(call: Call, value: Value, places: Value, updates: Value) -> Tensor:
    """Entries put to the places of an index."""
    if call.text("reduction", "none") != "none":
        raise Untranslated("a scatter that reduces")
    return tensor(value).scatter(call.integer("axis", 0), tensor(places).long(), tensor(updates))
