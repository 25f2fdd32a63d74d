"""Attention over a cache of fixed size: all of the buffer with its empty end hidden, or a copy of the part in use.

T queries over a buffer of C tokens, n of them in use, read T C keys and values. Cut out first, those in use are read
and written once and then read T times: (T + 2) n. A step reads the buffer where it is, unless most of it is empty; a
prompt reads what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from grape_compile.export.onnx.builder import BOOL, FLOAT, Builder, Size, dtype_of, sizes
from grape_compile.export.onnx.emit_branches import Make, either
from grape_compile.export.onnx.emit_operators import Call, as_numbers, both, buffer_of
from grape_compile.export.onnx.emit_rotation import Emitted

#: Reading and writing what is cut out.
_COPY = 2


def over_buffer(builder: Builder, call: Call, attend: Callable[[Builder, Call], Emitted]) -> Make:
    """Return what makes a choice between two calls of `attend`, [B, H, T_q, D_v]; keys and values lie in buffers.

    What all layers of a model have in common is computed where `builder` stands, outside of the choice.
    """
    key, value = (_buffer(part) for part in (call.key, call.value))
    queries, used, capacity = builder.size(call.query, 2), _used(call.key), builder.size(key, 2)
    whole = builder.op("Mul", queries, capacity, shape=(1,))
    part = builder.op("Mul", builder.binary("Add", queries, _COPY), used, shape=(1,))
    is_whole = builder.op("LessOrEqual", whole, part, dtype=BOOL, shape=(1,))
    ready = _prepared(builder, call)
    hidden = _hidden(builder, ready.mask, used, capacity, sizes(key)[2])

    def in_place(inner: Builder) -> Emitted:
        return attend(inner, replace(ready, key=key, value=value, mask=hidden))

    def cut_out(inner: Builder) -> Emitted:
        return attend(inner, apart(inner, ready))

    def choose(inner: Builder) -> Emitted:
        shape = (*sizes(call.query)[:3], sizes(call.value)[3])
        mixed, how, _ = either(inner, is_whole, in_place, cut_out, shape)
        return Emitted((mixed,), f"{how}, over a cache in place")

    return choose


def apart(builder: Builder, call: Call) -> Call:
    """Return the call with keys and values of a buffer cut out, as far as it is in use; any other call as it is."""
    if buffer_of(call.key) is None or buffer_of(call.value) is None:
        return call
    key, value = (
        builder.part(_buffer(part), builder.constant([0]), _used(part), 2) for part in (call.key, call.value)
    )
    key.shape, value.shape = call.key.shape, call.value.shape
    return replace(call, key=key, value=value)


def _buffer(part: ir.Value) -> ir.Value:
    buffer = buffer_of(part)
    assert buffer is not None
    return buffer


def _used(part: ir.Value) -> ir.Value:
    """How many tokens of a buffer are in use, [1]: where the cut ends."""
    cut = part.producer()
    assert cut is not None
    end = cut.inputs[2]
    assert end is not None
    return end


def _prepared(builder: Builder, call: Call) -> Call:
    """Return the call with its scale on the queries and its mask as numbers: once, and not in every branch.

    A product with one row is slow where it has a factor.
    """
    width = sizes(call.query)[3]
    assert isinstance(width, int)
    if dtype_of(call.query) != FLOAT:
        return call
    factors = builder.constant([call.factor] * width, FLOAT)
    mask = call.mask
    if mask is not None and dtype_of(mask) == BOOL:
        mask = as_numbers(builder, mask, FLOAT)
    return replace(call, query=builder.binary("Mul", call.query, factors), scale=1.0, mask=mask)


def _hidden(
    builder: Builder, mask: ir.Value | None, used: ir.Value, capacity: ir.Value, size: Size
) -> ir.Value:
    """Return the mask with the end of the buffer, where no token is, hidden."""
    if mask is None or sizes(mask)[-1] == 1:
        there = builder.op("Less", builder.ladder(0, capacity), used, dtype=BOOL, shape=(size,))
        return both(builder, mask, builder.unsqueeze(there, 0))
    dtype, empty = dtype_of(mask), builder.op("Sub", capacity, used, shape=(1,))
    never = builder.constant(False if dtype == BOOL else float(np.finfo(dtype.numpy()).min), dtype)
    pads = builder.concat([builder.constant([0]), empty], 0)
    return builder.op("Pad", mask, pads, never, builder.constant([-1]), shape=(*sizes(mask)[:-1], size))
