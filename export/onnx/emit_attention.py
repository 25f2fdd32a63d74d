"""Attention as ONNX nodes, for the call `softmax(cap(scale * q k^T) + bias + mask) v`, queries the last of the keys.

Cases:

1. rotations of the encoding turn queries and keys (`emit_rotation`);
2. biases that are sums of products become columns of query and key (`emit_bias`), the others a float mask;
3. where a file may hold loops, what the mask hides as a whole is left out by blocks of queries (`emit_blocks`);
   keys in a cache of fixed size are read where they are, or cut out (`emit_buffer`);
4. what is left is an operator of the target (`emit_operators`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import onnx_ir as ir

from grape_compile.encoding import (
    Bias,
    Compose,
    Encoding,
    Multiplicative,
    Nope,
    PathBias,
    Positions,
    Steps,
    Tables,
)
from grape_compile.encoding.clock import Accumulated
from grape_compile.export.onnx.builder import (
    BOOL,
    Builder,
    broadcast,
    compute_dtype,
    dtype_of,
    sizes,
)
from grape_compile.export.onnx.emit_bias import Column, Lengths, columns, is_lifted, seen, total, whole
from grape_compile.export.onnx.emit_blocks import SMALLEST, bounded, in_blocks
from grape_compile.export.onnx.emit_buffer import over_buffer
from grape_compile.export.onnx.emit_operators import (
    Call,
    as_numbers,
    both,
    buffer_of,
    chosen,
    fitted,
    is_grown,
    repeated,
)
from grape_compile.export.onnx.emit_rotation import Emitted, rotate
from grape_compile.export.onnx.emit_tables import Slots, accumulated
from grape_compile.export.onnx.targets import Target
from grape_compile.export.onnx.visible_keys import Reach

_NOTHING: Final = Nope()


def attend(builder: Builder, call: Call, target: Target) -> Emitted:
    """Return [B, H, T_q, D_v]; what `grape::attend` computes, but for rows without a key."""
    lengths = Lengths(
        builder.size(call.query, 2), _count(builder, call.key), sizes(call.query)[2], sizes(call.key)[2]
    )
    call = _turned(builder, call, lengths, target)
    call, told = _added(builder, call, lengths, target)
    call = _hidden(builder, call, lengths)
    width = sizes(call.value)[3]
    call = fitted(builder, call, target)
    bounds = bounded(builder, call) if _has_blocks(call, target) else Reach()
    compute = partial(chosen, target=target)
    if bounds.is_bounded:
        emitted = in_blocks(builder, call, bounds, compute)
    elif buffer_of(call.key) is not None and buffer_of(call.value) is not None:
        emitted = over_buffer(builder, call, compute)
    else:
        emitted = compute(builder, call)
    (mixed,) = emitted.values
    assert isinstance(width, int)
    return Emitted((builder.slice(mixed, 0, width),), ", ".join((*told, emitted.how)))


def _has_blocks(call: Call, target: Target) -> bool:
    """Whether there may be more queries than a block has, and keys that are not a cache."""
    queries = sizes(call.query)[2]
    return target.loops and not is_grown(call.key) and (not isinstance(queries, int) or queries > SMALLEST)


# -- what is made of the encoding -------------------------------------------------------------------------------------


def _parts(encoding: Encoding) -> tuple[Encoding, ...]:
    if isinstance(encoding, Compose):
        return tuple(leaf for part in encoding.parts for leaf in _parts(part))
    return () if isinstance(encoding, Nope) else (encoding,)


def _turned(builder: Builder, call: Call, lengths: Lengths, target: Target) -> Call:
    """Turn queries and keys by the rotations of the encoding."""
    query, key = call.query, call.key
    for part in _parts(call.encoding):
        if not isinstance(part, Multiplicative):
            continue
        if lengths.is_square:
            query, key = rotate(builder, [query, key], part, call.slots, target).values
            continue
        (key,) = rotate(builder, [key], part, call.slots, target).values
        own, slots = _last(builder, part, call.slots, lengths)
        (query,) = rotate(builder, [query], own, slots, target).values
    return replace(call, query=query, key=key)


def _last(
    builder: Builder, part: Multiplicative, slots: Slots, lengths: Lengths
) -> tuple[Multiplicative, Slots]:
    """Return the rotation of the queries alone: the times of the last keys."""
    clock = part.clock
    if isinstance(clock, Tables):
        cut = {name: _tail(builder, slots[name], -2, lengths) for name in (clock.cos, clock.sin)}
        return part, {**slots, **cut}
    if isinstance(clock, Positions | Accumulated):
        times = _tail(builder, accumulated(builder, clock, slots[clock.slot]), -1, lengths)
        return part.by(Positions(clock.slot)), {**slots, clock.slot: times}
    assert isinstance(clock, Steps)
    offset = builder.op("Sub", lengths.keys, lengths.queries, shape=(1,))
    return part.by(Positions("steps")), {**slots, "steps": builder.ladder(offset, lengths.keys)}


def _tail(builder: Builder, slot: ir.Value, axis: int, lengths: Lengths) -> ir.Value:
    if sizes(slot)[axis] == 1:
        return slot
    return builder.tail(slot, lengths.queries, axis, lengths.query_size)


def _added(builder: Builder, call: Call, lengths: Lengths, target: Target) -> tuple[Call, list[str]]:
    """Make columns or a float mask of the biases."""
    lifted: list[Column] = []
    dense: list[ir.Value] = []
    told: list[str] = []
    for part in _parts(call.encoding):
        if isinstance(part, Bias) and is_lifted(part, call.is_causal) and not _is_dense(call):
            found = columns(builder, part, call.slots, call.query, lengths)
            lifted += found
            told.append(f"{len(found)} column{'s' * (len(found) > 1)} of query and key")
        elif isinstance(part, Bias | PathBias):
            dense.append(whole(builder, part, call.slots, call.query, lengths, target))
            told.append(f"a bias of all queries and keys: {_why_dense(part, call)}")
    if dense:
        mask = (
            total(builder, dense)
            if call.mask is None
            else total(builder, [*dense, as_numbers(builder, call.mask, compute_dtype(call.query))])
        )
        call = replace(call, mask=mask)
    return _with_columns(builder, call, lifted) if lifted else call, told


def _count(builder: Builder, keys: ir.Value) -> ir.Value:
    """Return how many keys there are, [1]; of a cache without reading what the operator is to append."""
    source = keys.producer()
    if not is_grown(keys) or source is None:
        return builder.size(keys, 2)
    if buffer_of(keys) is not None:
        end = source.inputs[2]
        assert end is not None
        return end
    parts = [builder.size(part, 2) for part in source.inputs if part is not None]
    return total(builder, parts)


def _why_dense(part: Bias | PathBias, call: Call) -> str:
    if isinstance(part, PathBias):
        return "a path integral has no finite rank"
    if is_grown(call.key):
        return "columns would copy the cache at every step"
    if call.sinks is not None:
        return "sinks see numbers of a row that softmax alone does not"
    return "the soft cap comes before it" if call.cap else "its distance has no sign"


def _is_dense(call: Call) -> bool:
    """Whether columns of query and key would copy a cache, be bent, or miss numbers of a row that sinks see."""
    return is_grown(call.key) or bool(call.cap) or call.sinks is not None


def _with_columns(builder: Builder, call: Call, lifted: Sequence[Column]) -> Call:
    """Return the call with more coordinates: scale * query column * key column is a bias."""
    scale = call.factor
    by_query, by_key = [], []
    for column in lifted:
        side = column.query
        assert side is not None
        by_query.append(_as_heads(builder, builder.binary("Mul", side, 1.0 / scale), call.query))
        by_key.append(column.key)
    key = call.key
    heads, query_heads = sizes(key)[1], sizes(call.query)[1]
    if heads != query_heads and any(sizes(column)[1] != 1 for column in by_key):
        # Every query head has its own numbers of the keys: so must have its own keys.
        key = repeated(builder, key, heads, query_heads)
        call = replace(call, value=repeated(builder, call.value, heads, query_heads))
    columns_of_key = [_as_heads(builder, column, key) for column in by_key]
    return replace(
        call,
        query=builder.concat([call.query, *by_query]),
        key=builder.concat([key, *columns_of_key]),
        scale=scale,
    )


def _as_heads(builder: Builder, column: ir.Value, heads: ir.Value) -> ir.Value:
    """Return numbers [1 or B, 1 or H, 1 or T] as [B, H, T, 1]."""
    wide = builder.cast(builder.unsqueeze(column, -1), dtype_of(heads))
    by = [builder.size(heads, axis) for axis in range(3)]
    return builder.expand(wide, (*by, 1), (*sizes(heads)[:3], 1))


def _hidden(builder: Builder, call: Call, lengths: Lengths) -> Call:
    """Put into the mask what no attribute of an operator says: segments, a window, the future of keys with a past."""
    mask = call.mask
    if call.segments is not None:
        mask = both(builder, mask, _together(builder, call.segments, lengths))
    if call.window is None and (not call.is_causal or lengths.is_square):
        return replace(call, mask=mask, segments=None)
    visible = seen(builder, lengths, is_causal=call.is_causal, window=call.window)
    return replace(call, mask=both(builder, mask, visible), is_causal=False, window=None, segments=None)


def _together(builder: Builder, segments: ir.Value, lengths: Lengths) -> ir.Value:
    """Return True where query and key have one number, [1 or B, 1, T_q, T_k]; the queries are the last of the keys."""
    by_batch = builder.unsqueeze(segments, 0) if len(sizes(segments)) == 1 else segments
    of_queries = _tail(builder, by_batch, -1, lengths)
    queries, keys = builder.unsqueeze(of_queries, 1, 3), builder.unsqueeze(by_batch, 1, 2)
    return builder.op("Equal", queries, keys, dtype=BOOL, shape=broadcast(sizes(queries), sizes(keys)))
