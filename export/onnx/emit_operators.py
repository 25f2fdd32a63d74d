"""A call of attention as one operator of the target: Attention or MultiHeadAttention, else products and a softmax.

Cases, for the call `softmax(cap(scale * q k^T) + mask) v` without a bias of its own:

1. opset 23 has it as one Attention, grouped heads and soft cap included;
2. com.microsoft has it as MultiHeadAttention, without a soft cap;
3. elsewhere it is two products and a softmax in the compute type; grouped heads share their keys by broadcasting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from grape_compile.encoding import Encoding, Nope
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
from grape_compile.export.onnx.emit_bias import Lengths, seen, total
from grape_compile.export.onnx.emit_rotation import Emitted
from grape_compile.export.onnx.targets import Target

_NOTHING: Final = Nope()
#: What writes new tokens into a cache of fixed size.
_WRITE: Final = "ScatterND"


@dataclass(frozen=True)
class Call:
    """Queries [B, H, T_q, D], keys [B, H_kv, T_k, D], values [B, H_kv, T_k, D_v], and what is added to the scores.

    `mask` has up to four axes that broadcast to [B, H, T_q, T_k], True or a number to add. `scale` is 1/sqrt(D) by
    default; `cap` c makes c tanh(scores / c) of the scaled product. `sinks` [1 or B, 1 or H], or [H], are logits of a
    key without a value; `segments` [T_k], or [1 or B, T_k], hide keys of another number than the query's. Where
    `is_cached`, keys and values are those of a cache, which is read where it lies.
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
    cap: float | None = None
    sinks: ir.Value | None = None
    segments: ir.Value | None = None
    is_cached: bool = False

    @property
    def factor(self) -> float:
        """The score scale."""
        width = sizes(self.query)[-1]
        assert isinstance(width, int)
        return 1.0 / float(np.sqrt(max(width, 1))) if self.scale is None else self.scale


def chosen(builder: Builder, call: Call, target: Target) -> Emitted:
    """Return [B, H, T_q, D_v] by what the target has for the call, and what that is."""
    if dtype_of(call.query) == DOUBLE:
        return Emitted((by_products(builder, call),), "two products and a softmax: no operator takes double")
    if call.sinks is not None:
        return Emitted((by_products(builder, call),), "two products and a softmax: no operator has sinks")
    if target.fused:
        return Emitted((_by_attention(builder, call),), "Attention")
    if not target.microsoft:
        return Emitted(
            (by_products(builder, call),),
            f"two products and a softmax: opset {target.opset} has no Attention",
        )
    if call.cap:
        return Emitted(
            (by_products(builder, call),), "two products and a softmax: MultiHeadAttention has no soft cap"
        )
    if _would_copy(call):
        return Emitted(
            (by_products(builder, call),),
            "two products and a softmax: MultiHeadAttention would copy the cache at every step",
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
        softcap=call.cap or None,
    )


def _result(call: Call) -> tuple[Size, ...]:
    return (*sizes(call.query)[:3], sizes(call.value)[3])


def fitted(builder: Builder, call: Call, target: Target) -> Call:
    """Return the call with keys and values as the operator wants them: MultiHeadAttention has no groups, and one width.

    Keys and values of two widths it takes by token alone, and copies them; values get coordinates of zero instead where
    those are few, such as the columns of a bias.
    """
    if not _is_multi_head(call, target):
        return call
    heads, own = sizes(call.query)[1], sizes(call.key)[1]
    if heads != own:
        key, value = (repeated(builder, part, own, heads) for part in (call.key, call.value))
        call = replace(call, key=key, value=value)
    width, value_width = _widths(call)
    if not value_width < width <= value_width + value_width // 8:
        return call
    zeros = builder.constant(np.zeros((1, 1, 1, width - value_width)), dtype_of(call.value))
    batch, _, length, _ = sizes(call.value)
    by = [builder.size(call.value, axis) for axis in range(3)]
    beside = builder.expand(zeros, (*by, 1), (batch, heads, length, width - value_width))
    return replace(call, value=builder.concat([call.value, beside]))


def _is_multi_head(call: Call, target: Target) -> bool:
    plain = not call.cap and call.sinks is None and dtype_of(call.query) == FLOAT
    return target.microsoft and not target.fused and plain and not _would_copy(call)


def _would_copy(call: Call) -> bool:
    """Whether MultiHeadAttention would have a cache laid out anew: it has no groups, and one width."""
    width, value_width = _widths(call)
    return call.is_cached and (sizes(call.query)[1] != sizes(call.key)[1] or width != value_width)


def _widths(call: Call) -> tuple[int, int]:
    width, value_width = sizes(call.query)[3], sizes(call.value)[3]
    assert isinstance(width, int)
    assert isinstance(value_width, int)
    return width, value_width


def _by_multi_head(builder: Builder, call: Call) -> ir.Value:
    """com.microsoft takes queries as [B, T, H * D], keys and values by heads, and a float bias."""
    heads, key, value = sizes(call.query)[1], call.key, call.value
    width, value_width = _widths(call)
    assert isinstance(heads, int)
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
    if call.factor != 1.0:
        query = builder.binary("Mul", query, _factors(builder, call, dtype))
    mask = call.mask
    if call.is_causal:
        lengths = Lengths(builder.size(query, 2), builder.size(key, 2), sizes(query)[2], sizes(key)[2])
        visible = seen(builder, lengths, is_causal=True, window=None)
        if mask is not None and dtype_of(mask) != BOOL:
            mask = builder.cast(mask, dtype)
        mask = both(builder, mask, visible)
    bias = None if mask is None else _four(builder, as_numbers(builder, mask, dtype))
    if heads != key_heads:
        query, key, value, bias = _grouped(builder, query, key, value, bias)
    rank = len(sizes(key))
    scores = builder.matmul(query, builder.transpose(key, *range(rank - 2), rank - 1, rank - 2))
    if call.cap:
        bent = builder.same("Tanh", builder.binary("Div", scores, call.cap))
        scores = builder.binary("Mul", bent, call.cap)
    if bias is not None:
        scores = builder.binary("Add", scores, bias)
    mixed = builder.matmul(_weights(builder, call, scores), value)
    if heads != key_heads:
        assert isinstance(heads, int)
        width = sizes(value)[-1]
        assert isinstance(width, int)
        mixed = builder.reshape(mixed, (0, heads, -1, width), _result(call))
    return builder.cast(mixed, own)


def _weights(builder: Builder, call: Call, scores: ir.Value) -> ir.Value:
    """Return the softmax of the scores [B, H, T_q, T_k] or [B, H_kv, G, T_q, T_k], with a last column for the sinks."""
    if call.sinks is None:
        return builder.same("Softmax", scores, axis=-1)
    sinks = builder.cast(call.sinks, dtype_of(scores))
    missing = 2 - len(sizes(sinks))
    sinks = builder.unsqueeze(sinks, *range(missing)) if missing else sinks
    lead, heads = sizes(sinks)
    if len(sizes(scores)) == 5:
        own, groups = sizes(scores)[1:3]
        assert isinstance(own, int)
        assert isinstance(groups, int)
        parts = (own, groups) if heads != 1 else (1, 1)
        sinks = builder.reshape(sinks, (0, *parts), (lead, *parts))
    column = builder.unsqueeze(sinks, -1, -2)
    by = [builder.size(scores, axis) for axis in range(len(sizes(scores)) - 1)]
    column = builder.expand(column, (*by, 1), (*sizes(scores)[:-1], 1))
    weights = builder.same("Softmax", builder.concat([scores, column]), axis=-1)
    return builder.part(weights, builder.constant([0]), builder.constant([-1]), -1)


def _factors(builder: Builder, call: Call, dtype: ir.DataType) -> ir.Value:
    """Return the scale as the queries are multiplied by it: for keys of a cache once for every coordinate, [D].

    ONNX Runtime would make a single number part of the product, which is three times as slow for one row and a factor.
    """
    width = sizes(call.query)[-1]
    assert isinstance(width, int)
    return builder.constant([call.factor] * width if call.is_cached else call.factor, dtype)


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


# -- operands ---------------------------------------------------------------------------------------------------------


def is_grown(keys: ir.Value) -> bool:
    """Whether keys are a cache with new ones behind it: the operator appends them, columns would copy all."""
    buffer = buffer_of(keys)
    source = (keys if buffer is None else buffer).producer()
    if source is None or source.op_type not in ("Concat", _WRITE) or source.inputs[0] is None:
        return False
    return source.inputs[0].is_graph_input()


def buffer_of(keys: ir.Value) -> ir.Value | None:
    """The buffer of fixed size that keys are the first tokens of (`write_in_place`), or None."""
    cut = keys.producer()
    buffer = None if cut is None or cut.op_type != "Slice" else cut.inputs[0]
    writer = None if buffer is None else buffer.producer()
    return buffer if writer is not None and writer.op_type == _WRITE else None


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


def both(builder: Builder, mask: ir.Value | None, visible: ir.Value) -> ir.Value:
    """Return a mask that also hides what is not visible."""
    if mask is None:
        return visible
    if dtype_of(mask) != BOOL:
        return total(builder, [mask, as_numbers(builder, visible, dtype_of(mask))])
    return builder.op("And", mask, visible, dtype=BOOL, shape=broadcast(sizes(mask), sizes(visible)))
