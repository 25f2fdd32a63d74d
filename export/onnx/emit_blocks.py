"""Attention by blocks of queries, each of which looks at the keys it can see and at no others.

A causal mask hides half of the products of queries and keys; ONNX Runtime computes them all the same on a CPU, and
keeps them all at once. A `Loop` over blocks of queries computes those that a block can see, in memory for one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir

from grape_compile.export.onnx.builder import BOOL, INT64, Builder, Size, broadcast, dtype_of, sizes
from grape_compile.export.onnx.emit_bias import total
from grape_compile.export.onnx.emit_operators import Call, as_numbers
from grape_compile.export.onnx.emit_rotation import Emitted
from grape_compile.export.onnx.visible_keys import Reach, reach

#: Eight blocks leave 9/16 of the work; none is smaller than the one number of queries, where a round costs more than it
#: saves, or larger than the other.
BLOCKS: Final = 8
SMALLEST, LARGEST = 64, 256


def bounded(builder: Builder, call: Call) -> Reach:
    """Return the keys that a query of a call can see at most."""
    if call.is_causal:
        return Reach(last=builder.constant([0]))
    return Reach() if call.mask is None else reach(builder, call.mask)


def in_blocks(
    builder: Builder, call: Call, seen: Reach, attend: Callable[[Builder, Call], Emitted]
) -> Emitted:
    """Return attention [B, H, T_q, D_v] as a loop in which `attend` computes a block."""
    queries = builder.size(call.query, 2)
    share = builder.binary("Div", builder.binary("Add", queries, BLOCKS - 1), BLOCKS)
    block = builder.binary("Min", builder.binary("Max", share, SMALLEST), LARGEST)
    rounds = builder.binary("Div", builder.binary("Add", queries, builder.binary("Sub", block, 1)), block)
    batch, heads, length, _ = sizes(call.query)
    width, dtype = sizes(call.value)[3], dtype_of(call.query)
    assert isinstance(heads, int)
    assert isinstance(width, int)
    nothing = builder.concat([builder.size(call.query, 0), builder.constant([heads, 0, width])], 0)
    zero = ir.tensor(np.zeros(1, dtype.numpy()))
    empty = builder.op("ConstantOfShape", nothing, dtype=dtype, shape=(batch, heads, 0, width), value=zero)
    body, how = _body(builder, call, seen, block, queries, attend)
    result = builder.op(
        "Loop",
        builder.squeeze(rounds, 0),
        None,
        empty,
        dtype=dtype,
        shape=(batch, heads, length, width),
        body=body,
    )
    return Emitted((result,), f"a loop over blocks of queries, {how}")


def _body(
    outer: Builder,
    call: Call,
    seen: Reach,
    block: ir.Value,
    queries: ir.Value,
    attend: Callable[[Builder, Call], Emitted],
) -> tuple[ir.Graph, str]:
    """Return the graph of one round, [B, H, done, D_v] -> [B, H, done + block, D_v], and what computes it."""
    dtype = dtype_of(call.query)
    number, go = outer.given("round", INT64, ()), outer.given("go", BOOL, ())
    done = outer.given("done", dtype, (None, sizes(call.query)[1], None, sizes(call.value)[3]))
    last = ir.Node("", "Identity", [go], num_outputs=1)
    last.outputs[0].name, last.outputs[0].type = f"{go.name}_on", go.type
    last.outputs[0].shape = ir.Shape(())
    body = ir.Graph([number, go, done], [last.outputs[0]], nodes=[last], name=f"{done.name}_block")
    builder = Builder(body, last, outer.root)
    start = builder.op("Mul", builder.unsqueeze(number, 0), block, shape=(1,))
    stop = builder.binary("Min", builder.binary("Add", start, block), queries)
    begin, end = _keys(builder, call, seen, start, stop)
    key, value = (builder.part(part, begin, end, 2) for part in (call.key, call.value))
    mask = call.mask
    for axis, bounds in ((-2, (start, stop)), (-1, (begin, end))):
        if mask is not None and sizes(mask)[axis] != 1:
            mask = builder.part(mask, *bounds, axis)
    if call.is_causal:
        mask = _causal(builder, mask, (start, stop), (begin, end))
    inner = replace(
        call, query=builder.part(call.query, start, stop, 2), key=key, value=value, mask=mask, is_causal=False
    )
    emitted = attend(builder, inner)
    body.outputs.append(builder.concat([done, *emitted.values], 2))
    for node in body:
        for each in node.outputs:
            each.shape = None  # the outer graph names its sizes later
    return body, emitted.how


def _keys(
    builder: Builder, call: Call, seen: Reach, start: ir.Value, stop: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return the first key of a block and the one behind its last; one key there is always."""
    end = builder.size(call.key, 2)
    if seen.last is not None:
        reached = builder.binary("Max", builder.binary("Add", stop, seen.last), 1)
        end = builder.binary("Min", reached, end)
    if seen.first is None:
        return builder.constant([0]), end
    reached = builder.binary("Max", builder.binary("Add", start, seen.first), 0)
    return builder.binary("Min", reached, builder.binary("Sub", end, 1)), end


def _causal(
    builder: Builder,
    mask: ir.Value | None,
    queries: tuple[ir.Value, ir.Value],
    keys: tuple[ir.Value, ir.Value],
) -> ir.Value:
    """Return the mask of a block that also hides what lies ahead of a query."""
    by_query, by_key = (builder.ladder(*bounds) for bounds in (queries, keys))
    shape: tuple[Size, ...] = (None, None)
    ahead = builder.op(
        "LessOrEqual", builder.unsqueeze(by_key, 0), builder.unsqueeze(by_query, 1), dtype=BOOL, shape=shape
    )
    if mask is None:
        return ahead
    if dtype_of(mask) == BOOL:
        return builder.op("And", mask, ahead, dtype=BOOL, shape=broadcast(sizes(mask), shape))
    return total(builder, [mask, as_numbers(builder, ahead, dtype_of(mask))])
