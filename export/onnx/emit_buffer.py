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
from grape_compile.export.onnx.emit_bias import total
from grape_compile.export.onnx.emit_operators import Call, as_numbers, buffer_of
from grape_compile.export.onnx.emit_rotation import Emitted

#: Reading and writing what is cut out.
_COPY = 2


def over_buffer(builder: Builder, call: Call, attend: Callable[[Builder, Call], Emitted]) -> Emitted:
    """Return attention [B, H, T_q, D_v] as a choice between two calls of `attend`; keys and values lie in buffers."""
    key, value = (_buffer(part) for part in (call.key, call.value))
    queries, used, capacity = builder.size(call.query, 2), _used(call.key), builder.size(key, 2)
    whole = builder.op("Mul", queries, capacity, shape=(1,))
    part = builder.op("Mul", builder.binary("Add", queries, _COPY), used, shape=(1,))
    is_whole = builder.op("LessOrEqual", whole, part, dtype=BOOL, shape=(1,))
    call = _scaled(builder, call)
    mask = (
        call.mask
        if call.mask is None or dtype_of(call.mask) != BOOL
        else as_numbers(builder, call.mask, dtype_of(call.query))
    )
    call = replace(call, mask=mask)
    hidden = _hidden(builder, call, used, capacity, sizes(key)[2])

    def in_place(inner: Builder) -> Emitted:
        return attend(inner, replace(call, key=key, value=value, mask=hidden))

    def cut_out(inner: Builder) -> Emitted:
        parts = (inner.part(each, inner.constant([0]), used, 2) for each in (key, value))
        for each, old in zip(cut := tuple(parts), (call.key, call.value), strict=True):
            each.shape = old.shape
        return attend(inner, replace(call, key=cut[0], value=cut[1]))

    shape = (*sizes(call.query)[:3], sizes(call.value)[3])
    (first, how), (second, _) = (_branch(builder, make, shape) for make in (in_place, cut_out))
    result = builder.op(
        "If",
        builder.squeeze(is_whole, 0),
        dtype=dtype_of(call.query),
        shape=shape,
        then_branch=first,
        else_branch=second,
    )
    return Emitted((result,), f"{how}, over a cache in place")


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


def _scaled(builder: Builder, call: Call) -> Call:
    """Return the call with its scale on the queries: a product with one row is slow where it has a factor."""
    width = sizes(call.query)[3]
    assert isinstance(width, int)
    if dtype_of(call.query) != FLOAT:
        return call
    factors = builder.constant([call.factor] * width, FLOAT)
    return replace(call, query=builder.binary("Mul", call.query, factors), scale=1.0)


def _hidden(builder: Builder, call: Call, used: ir.Value, capacity: ir.Value, size: Size) -> ir.Value:
    """Return the mask as numbers with the end of the buffer, where no token is, hidden."""
    mask, dtype = call.mask, dtype_of(call.query)
    lowest = builder.constant(float(np.finfo(dtype.numpy()).min), dtype)
    if mask is None or sizes(mask)[-1] == 1:
        there = builder.op("Less", builder.ladder(0, capacity), used, dtype=BOOL, shape=(size,))
        shown = as_numbers(builder, builder.unsqueeze(there, 0), dtype)
        return shown if mask is None else total(builder, [mask, shown])
    empty = builder.op("Sub", capacity, used, shape=(1,))
    pads = builder.concat([builder.constant([0]), empty], 0)
    lowest = builder.cast(lowest, dtype_of(mask))
    return builder.op("Pad", mask, pads, lowest, builder.constant([-1]), shape=(*sizes(mask)[:-1], size))


def _branch(
    outer: Builder, make: Callable[[Builder], Emitted], shape: tuple[Size, ...]
) -> tuple[ir.Graph, str]:
    """Return the graph of one branch, and what computes it."""
    result = outer.given("chosen", FLOAT, shape)
    last = ir.Node("", "Identity", [None], outputs=[result])
    body = ir.Graph([], [result], nodes=[last], name=f"{result.name}_branch")
    emitted = make(Builder(body, last, outer.root))
    last.replace_input_with(0, emitted.values[0])
    result.type = emitted.values[0].type
    for node in body:
        for each in node.outputs:
            each.shape = None  # the outer graph names its sizes later
    return body, emitted.how
