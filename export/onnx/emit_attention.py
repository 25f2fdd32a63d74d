"""Attention as ONNX nodes: Attention or MultiHeadAttention where a call fits one, else products and a softmax.

Cases, for the call `softmax(cap(scale * q k^T) + bias + mask) v` with the queries the last of the keys:

1. biases that are sums of products become columns of query and key (`emit_bias`), the others a float mask;
2. opset 23 has the call as one Attention, grouped heads and soft cap included;
3. com.microsoft has it as MultiHeadAttention, without a soft cap, and as GroupQueryAttention with a cache;
4. elsewhere it is two products and a softmax in the compute type; grouped heads share their keys by broadcasting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
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
from grape_compile.errors import GrapeError
from grape_compile.export.onnx.builder import (
    BOOL,
    DOUBLE,
    FLOAT,
    INT64,
    MICROSOFT,
    Builder,
    Size,
    broadcast,
    compute_dtype,
    dtype_of,
    joined,
    sizes,
)
from grape_compile.export.onnx.emit_bias import Column, Lengths, columns, is_lifted, seen, total, whole
from grape_compile.export.onnx.emit_rotation import Emitted, rotate
from grape_compile.export.onnx.emit_tables import Slots, accumulated
from grape_compile.export.onnx.targets import Target

_NOTHING: Final = Nope()


@dataclass(frozen=True)
class Call:
    """Queries [B, H, T_q, D], keys [B, H_kv, T_k, D], values [B, H_kv, T_k, D_v], and what is added to the scores.

    `mask` has up to four axes that broadcast to [B, H, T_q, T_k], True or a number to add. `scale` is 1/sqrt(D) by
    default; `softcap` c makes c tanh(scores / c) of the scaled product; 0 is none.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    encoding: Encoding = _NOTHING
    slots: Mapping[str, ir.Value] = field(default_factory=dict)
    mask: ir.Value | None = None
    is_causal: bool = False
    scale: float | None = None
    window: int | None = None
    softcap: float = 0.0

    @property
    def factor(self) -> float:
        """The score scale."""
        width = sizes(self.query)[-1]
        assert isinstance(width, int)
        return 1.0 / float(np.sqrt(max(width, 1))) if self.scale is None else self.scale


def attend(builder: Builder, call: Call, target: Target) -> Emitted:
    """Return [B, H, T_q, D_v]; what `grape::attend` computes, but for rows without a key."""
    lengths = Lengths(
        builder.size(call.query, 2), _count(builder, call.key), sizes(call.query)[2], sizes(call.key)[2]
    )
    call = _turned(builder, call, lengths, target)
    call, told = _added(builder, call, lengths, target)
    call = _hidden(builder, call, lengths)
    emitted = _chosen(builder, call, target)
    return Emitted(emitted.values, ", ".join((*told, emitted.how)))


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
    grown = _is_grown(call.key)
    lifted: list[Column] = []
    dense: list[ir.Value] = []
    told: list[str] = []
    for part in _parts(call.encoding):
        if isinstance(part, Bias) and is_lifted(part, call.is_causal) and not call.softcap and not grown:
            found = columns(builder, part, call.slots, call.query, lengths)
            lifted += found
            told.append(f"{len(found)} column{'s' * (len(found) > 1)} of query and key")
        elif isinstance(part, Bias | PathBias):
            dense.append(whole(builder, part, call.slots, call.query, lengths, target))
            told.append(f"a bias of all queries and keys: {_why_dense(part, call, grown)}")
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
    if not _is_grown(keys) or source is None:
        return builder.size(keys, 2)
    parts = [builder.size(part, 2) for part in source.inputs if part is not None]
    return total(builder, parts)


def _is_grown(keys: ir.Value) -> bool:
    """Whether keys are a cache with new ones behind it: the operator appends them, columns would copy all."""
    source = keys.producer()
    if source is None or source.op_type != "Concat" or source.inputs[0] is None:
        return False
    return source.inputs[0].is_graph_input()


def _why_dense(part: Bias | PathBias, call: Call, grown: bool) -> str:
    if isinstance(part, PathBias):
        return "a path integral has no finite rank"
    if grown:
        return "columns would copy the cache at every step"
    return "the soft cap comes before it" if call.softcap else "its distance has no sign"


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


def repeated(builder: Builder, heads: ir.Value, own: Size, wanted: Size) -> ir.Value:
    """Return [B, H, T, D] from [B, H_kv, T, D], each head as often as it has query heads."""
    assert isinstance(own, int)
    assert isinstance(wanted, int)
    batch, _, length, width = sizes(heads)
    apart = builder.unsqueeze(heads, 2)
    copies = builder.expand(apart, (1, 1, wanted // own, 1, 1), (batch, own, wanted // own, length, width))
    return builder.reshape(copies, (0, wanted, -1, int(str(width))), (batch, wanted, length, width))


def as_numbers(builder: Builder, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return a mask as numbers to add; what is hidden gets a low one that stays finite when others are added."""
    if dtype_of(mask) != BOOL:
        return builder.cast(mask, dtype)
    hidden = builder.constant(float(np.finfo(dtype.numpy()).min) / 2, dtype)
    return builder.op("Where", mask, builder.constant(0.0, dtype), hidden, dtype=dtype, shape=sizes(mask))


def _hidden(builder: Builder, call: Call, lengths: Lengths) -> Call:
    """Put into the mask what no attribute of an operator says: a window, and the future of keys with a past."""
    if call.window is None and (not call.is_causal or lengths.is_square):
        return call
    visible = seen(builder, lengths, is_causal=call.is_causal, window=call.window)
    if call.mask is None:
        mask = visible
    elif dtype_of(call.mask) == BOOL:
        shape = broadcast(sizes(call.mask), sizes(visible))
        mask = builder.op("And", call.mask, visible, dtype=BOOL, shape=shape)
    else:
        mask = total(builder, [call.mask, as_numbers(builder, visible, dtype_of(call.mask))])
    return replace(call, mask=mask, is_causal=False, window=None)


# -- what computes it -------------------------------------------------------------------------------------------------


def _chosen(builder: Builder, call: Call, target: Target) -> Emitted:
    if dtype_of(call.query) == DOUBLE:
        return Emitted((by_products(builder, call),), "two products and a softmax: no operator takes double")
    if target.fused:
        return Emitted((_by_attention(builder, call),), "Attention")
    if not target.microsoft:
        return Emitted(
            (by_products(builder, call),),
            f"two products and a softmax: opset {target.opset} has no Attention",
        )
    if call.softcap:
        return Emitted(
            (by_products(builder, call),), "two products and a softmax: MultiHeadAttention has no soft cap"
        )
    if dtype_of(call.query) != FLOAT:
        return Emitted(
            (by_products(builder, call),),
            "two products and a softmax: MultiHeadAttention takes float on a CPU",
        )
    return Emitted((_by_multi_head(builder, call),), "MultiHeadAttention")


def _four(builder: Builder, mask: ir.Value) -> ir.Value:
    missing = 4 - len(sizes(mask))
    return builder.unsqueeze(mask, *range(missing)) if missing else mask


def _by_attention(builder: Builder, call: Call) -> ir.Value:
    mask = call.mask
    if mask is not None:
        mask = _four(builder, mask)
        if dtype_of(mask) not in (BOOL, dtype_of(call.query)):
            mask = builder.cast(mask, dtype_of(call.query))
    return builder.op(
        "Attention",
        *(call.query, call.key, call.value, mask),
        shape=_result(call),
        scale=call.factor,
        is_causal=int(call.is_causal),
        softcap=call.softcap or None,
    )


def _result(call: Call) -> tuple[Size, ...]:
    return (*sizes(call.query)[:3], sizes(call.value)[3])


def _by_multi_head(builder: Builder, call: Call) -> ir.Value:
    """com.microsoft takes queries as [B, T, H * D], keys and values by heads, and a float bias."""
    heads, own = sizes(call.query)[1], sizes(call.key)[1]
    key, value = (
        part if own == heads else repeated(builder, part, own, heads) for part in (call.key, call.value)
    )
    width, value_width = sizes(call.query)[3], sizes(value)[3]
    assert isinstance(heads, int)
    assert isinstance(width, int)
    assert isinstance(value_width, int)
    bias = None if call.mask is None else _four(builder, as_numbers(builder, call.mask, FLOAT))
    if bias is not None:
        bias = _over_all(builder, bias, call)
    batch, _, length, _ = sizes(call.query)
    if width != value_width:
        # By heads, keys and values have to be of one width.
        key, value = joined(builder, key), joined(builder, value)
    mixed = builder.op(
        "MultiHeadAttention",
        *(joined(builder, call.query), key, value, None, None, bias),
        domain=MICROSOFT,
        shape=(batch, length, heads * value_width),
        num_heads=heads,
        scale=call.factor,
        unidirectional=1 if call.is_causal else None,
    )
    apart = builder.reshape(mixed, (0, 0, heads, value_width), (batch, length, heads, value_width))
    return builder.transpose(apart, 0, 2, 1, 3)


def _over_all(builder: Builder, bias: ir.Value, call: Call) -> ir.Value:
    """Return a bias whose last two axes have all queries and keys: the operator broadcasts the first two only."""
    if sizes(bias)[2] != 1 and sizes(bias)[3] != 1:
        return bias
    by = (1, 1, builder.size(call.query, 2), builder.size(call.key, 2))
    return builder.expand(bias, by, (*sizes(bias)[:2], sizes(call.query)[2], sizes(call.key)[2]))


def by_products(builder: Builder, call: Call) -> ir.Value:
    """Return the attention written out; scores and softmax in the compute type."""
    dtype, own = compute_dtype(call.query), dtype_of(call.query)
    heads, key_heads = sizes(call.query)[1], sizes(call.key)[1]
    query, key, value = (builder.cast(part, dtype) for part in (call.query, call.key, call.value))
    query = builder.binary("Mul", query, call.factor)
    mask = call.mask
    if call.is_causal:
        lengths = Lengths(builder.size(query, 2), builder.size(key, 2), sizes(query)[2], sizes(key)[2])
        visible = seen(builder, lengths, is_causal=True, window=None)
        if mask is not None and dtype_of(mask) == BOOL:
            mask = builder.op("And", mask, visible, dtype=BOOL, shape=broadcast(sizes(mask), sizes(visible)))
        else:
            shown = as_numbers(builder, visible, dtype)
            mask = shown if mask is None else total(builder, [builder.cast(mask, dtype), shown])
    bias = None if mask is None else _four(builder, as_numbers(builder, mask, dtype))
    if heads != key_heads:
        query, key, value, bias = _grouped(builder, query, key, value, bias)
    rank = len(sizes(key))
    scores = builder.matmul(query, builder.transpose(key, *range(rank - 2), rank - 1, rank - 2))
    if call.softcap:
        bent = builder.same("Tanh", builder.binary("Div", scores, call.softcap))
        scores = builder.binary("Mul", bent, call.softcap)
    if bias is not None:
        scores = builder.binary("Add", scores, bias)
    mixed = builder.matmul(builder.same("Softmax", scores, axis=-1), value)
    if heads != key_heads:
        assert isinstance(heads, int)
        width = sizes(value)[-1]
        assert isinstance(width, int)
        mixed = builder.reshape(mixed, (0, heads, -1, width), _result(call))
    return builder.cast(mixed, own)


def _grouped(
    builder: Builder, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
    """Return everything with an axis for the query heads of one key head, which broadcasts over keys and values."""
    (batch, heads, length, width), own = sizes(query), sizes(key)[1]
    if not isinstance(heads, int) or not isinstance(own, int) or not isinstance(width, int):
        raise GrapeError("attention with grouped heads", f"{heads} and {own} heads", "known numbers of heads")
    groups = heads // own
    query = builder.reshape(query, (0, own, groups, -1, width), (batch, own, groups, length, width))
    key, value = (builder.unsqueeze(part, 2) for part in (key, value))
    if bias is None:
        return query, key, value, None
    if sizes(bias)[1] == 1:
        return query, key, value, builder.unsqueeze(bias, 2)
    lead, _, rows, columns_ = sizes(bias)
    last = builder.op("Shape", bias, dtype=INT64, shape=(2,), start=2, end=4)
    first = builder.size(bias, 0)
    target = builder.concat([first, builder.constant([own, groups]), last], 0)
    return query, key, value, builder.op("Reshape", bias, target, shape=(lead, own, groups, rows, columns_))
