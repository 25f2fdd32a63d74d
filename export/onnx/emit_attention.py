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
    INT64,
    Builder,
    broadcast,
    compute_dtype,
    dtype_of,
    sizes,
)
from grape_compile.export.onnx.emit_bias import Column, Lengths, columns, first, is_lifted, seen, total, whole
from grape_compile.export.onnx.emit_blocks import SMALLEST, bounded, in_blocks
from grape_compile.export.onnx.emit_branches import Make, either
from grape_compile.export.onnx.emit_buffer import apart, over_buffer
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
    lifted, dense = _biases(builder, call, lengths, target)
    call = replace(_hidden(builder, call, lengths), is_cached=is_grown(call.key))
    for bias, _ in dense:
        call = _biased(builder, call, bias)
    queries = sizes(call.query)[2]
    may_be_many = target.loops and (not isinstance(queries, int) or queries > SMALLEST)
    bounds = bounded(builder, call) if may_be_many else Reach()
    many: Make = partial(_prompt, call=call, lifted=lifted, lengths=lengths, bounds=bounds, target=target)
    if not bounds.is_bounded:
        return _told(dense, _step(builder, call, lifted, lengths, target)(builder))
    if lengths.is_square or isinstance(queries, int):
        return _told(dense, many(builder))
    is_step = builder.op("LessOrEqual", lengths.queries, builder.constant(SMALLEST), dtype=BOOL, shape=(1,))
    rows = builder.op("Where", is_step, lengths.queries, builder.constant([0]), dtype=INT64, shape=(1,))
    few = _step(builder, call, lifted, lengths, target, rows)
    shape = (*sizes(call.query)[:3], sizes(call.value)[3])
    mixed, how, other = either(builder, is_step, few, many, shape)
    return _told(dense, Emitted((mixed,), f"{how}; for more than {SMALLEST} queries {other}"))


def _step(
    builder: Builder,
    call: Call,
    lifted: Sequence[Bias],
    lengths: Lengths,
    target: Target,
    rows: ir.Value | None = None,
) -> Make:
    """Return what computes all queries at once, over a cache where it lies.

    Columns would copy a cache, so biases are added to the mask instead: for the first `rows` [1] queries alone. Those
    are none where there are more than a step has, and a prompt makes no bias of all that it sees.
    """
    if not call.is_cached:
        return partial(_prompt, call=call, lifted=lifted, lengths=lengths, bounds=Reach(), target=target)
    is_buffer = buffer_of(call.key) is not None and buffer_of(call.value) is not None
    if call.mask is not None and (lifted or is_buffer):
        call = replace(call, mask=first(builder, call.mask, rows, -2))
    for part in lifted:
        bias = whole(builder, part, call.slots, call.query, lengths, target, rows)
        call = _biased(builder, call, bias)
    told = ["a bias of a step's queries and all keys: columns would copy the cache"] if lifted else []
    compute = partial(chosen, target=target)
    make = over_buffer(builder, call, compute) if is_buffer else partial(compute, call=call)

    def tell(inner: Builder) -> Emitted:
        made = make(inner)
        return Emitted(made.values, ", ".join((*told, made.how)))

    return tell


def _prompt(
    builder: Builder, *, call: Call, lifted: Sequence[Bias], lengths: Lengths, bounds: Reach, target: Target
) -> Emitted:
    """Compute queries by blocks where there are bounds, with columns, over keys that may be laid out anew."""
    width, told = sizes(call.value)[3], []
    call = replace(apart(builder, call), is_cached=False)
    made = [each for bias in lifted for each in columns(builder, bias, call.slots, call.query, lengths)]
    if made:
        call = _with_columns(builder, call, made)
        told = [f"{len(made)} column{'s' * (len(made) > 1)} of query and key"]
    call = fitted(builder, call, target)
    compute = partial(chosen, target=target)
    emitted = in_blocks(builder, call, bounds, compute) if bounds.is_bounded else compute(builder, call)
    assert isinstance(width, int)
    (mixed,) = emitted.values
    return Emitted((builder.slice(mixed, 0, width),), ", ".join((*told, emitted.how)))


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


def _biases(
    builder: Builder, call: Call, lengths: Lengths, target: Target
) -> tuple[list[Bias], list[tuple[ir.Value, str]]]:
    """Return the biases that are sums of products, and the others with all their numbers, and why."""
    lifted: list[Bias] = []
    dense: list[tuple[ir.Value, str]] = []
    for part in _parts(call.encoding):
        if isinstance(part, Bias) and is_lifted(part, call.is_causal) and not _is_bent(call):
            lifted.append(part)
        elif isinstance(part, Bias | PathBias):
            dense.append((whole(builder, part, call.slots, call.query, lengths, target), _why(part, call)))
    return lifted, dense


def _told(dense: Sequence[tuple[ir.Value, str]], emitted: Emitted) -> Emitted:
    """Return what was made, and why there are biases that are no products."""
    told = [f"a bias of all queries and keys: {why}" for _, why in dense]
    return Emitted(emitted.values, ", ".join((*told, emitted.how)))


def _biased(builder: Builder, call: Call, bias: ir.Value) -> Call:
    """Return the call with numbers added to its scores."""
    if call.mask is not None:
        bias = total(builder, [bias, as_numbers(builder, call.mask, compute_dtype(call.query))])
    return replace(call, mask=bias)


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


def _why(part: Bias | PathBias, call: Call) -> str:
    if isinstance(part, PathBias):
        return "a path integral has no finite rank"
    if call.sinks is not None:
        return "sinks see numbers of a row that softmax alone does not"
    return "the soft cap comes before it" if call.cap else "its distance has no sign"


def _is_bent(call: Call) -> bool:
    """Whether columns of query and key would be bent, or miss numbers of a row that sinks see."""
    return bool(call.cap) or call.sinks is not None


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
