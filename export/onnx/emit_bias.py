"""Biases as ONNX nodes: columns of query and key where a bias is a sum of products, else the bias itself (GRAPE 4, 5).

A bias `sum_r f_r[t] g_r[j]` is r more coordinates of query and key, so that attention needs no tensor of T_q x T_k x H.
Softmax does not see what is constant in a row: `slope * (c_j - c_t)` is one product, slope times c_j. Slopes stand on
the side of the query, so that grouped heads share their keys' columns. Times count from the middle of the queries,
which keeps the numbers small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from grape_compile.encoding import (
    Bias,
    Euclidean,
    Identity,
    Learned,
    LogSigmoid,
    PathBias,
    Positions,
    Signed,
    Slopes,
    Steps,
    Table,
    Uniform,
)
from grape_compile.encoding.clock import Accumulated
from grape_compile.export.onnx.builder import (
    BOOL,
    DOUBLE,
    INT64,
    Builder,
    Size,
    broadcast,
    compute_dtype,
    dtype_of,
    sizes,
)
from grape_compile.export.onnx.emit_rotation import rotate
from grape_compile.export.onnx.emit_tables import Slots, accumulated
from grape_compile.export.onnx.targets import Target


@dataclass(frozen=True)
class Lengths:
    """How many queries and keys there are, [1] each, and their names; the queries are the last of the keys."""

    queries: ir.Value
    keys: ir.Value
    query_size: Size
    key_size: Size

    @property
    def is_square(self) -> bool:
        """Whether every key has a query, whatever the length."""
        return self.query_size is not None and self.query_size == self.key_size


@dataclass(frozen=True)
class Column:
    """A product of a number of each query and a number of each key: [1 or B, 1 or H, T] each, None for ones."""

    query: ir.Value | None
    key: ir.Value


def is_lifted(bias: Bias, is_causal: bool) -> bool:
    """Whether a bias is a sum of products: signed, or by steps of keys that are all behind the query."""
    return isinstance(bias.distance, Signed) or (is_causal and isinstance(bias.clock, Steps))


def columns(builder: Builder, bias: Bias, slots: Slots, query: ir.Value, lengths: Lengths) -> list[Column]:
    """Return a signed bias as products, up to a number of each row.

    (lam_q[t] + lam_k[j]) (c_j - c_t) = lam_q[t] c_j + lam_k[j] c_j - c_t lam_k[j] - a number of row t.
    """
    dtype = compute_dtype(query)
    slope = builder.unsqueeze(_slopes(builder, bias.slopes, slots, dtype), -1)
    times = _since(builder, bias, slots, dtype, lengths)
    gate = bias.gate
    if gate is None:
        return [Column(slope, times)]
    found = []
    if gate.query is not None:
        found.append(Column(builder.binary("Mul", slope, _gate(builder, slots[gate.query], dtype)), times))
    if gate.key is not None:
        by_key = _gate(builder, slots[gate.key], dtype)
        behind = builder.same("Neg", _queries(builder, times, lengths))
        found.append(Column(slope, builder.binary("Mul", by_key, times)))
        found.append(Column(builder.binary("Mul", slope, behind), by_key))
    return found


def whole(
    builder: Builder,
    bias: Bias | PathBias,
    slots: Slots,
    query: ir.Value,
    lengths: Lengths,
    target: Target,
    rows: ir.Value | None = None,
) -> ir.Value:
    """Return a bias with all its numbers, [1 or B, 1 or H, T_q, T_k].

    `rows` [1]: of so many queries, the first ones; a path integral is always made for all.
    """
    if isinstance(bias, PathBias):
        return _path(builder, bias, slots, query, lengths, target)
    dtype = compute_dtype(query)
    slope = builder.unsqueeze(_slopes(builder, bias.slopes, slots, dtype), -1, -2)
    times = _since(builder, bias, slots, dtype, lengths)
    apart = builder.binary(
        "Sub",
        builder.unsqueeze(times, -2),
        builder.unsqueeze(first(builder, _queries(builder, times, lengths), rows, -1), -1),
    )
    if bias.gate is not None:
        sides = []
        if bias.gate.query is not None:
            by_query = first(builder, _gate(builder, slots[bias.gate.query], dtype), rows, -1)
            sides.append(builder.unsqueeze(by_query, -1))
        if bias.gate.key is not None:
            sides.append(builder.unsqueeze(_gate(builder, slots[bias.gate.key], dtype), -2))
        gate = sides[0] if len(sides) == 1 else builder.binary("Add", *sides)
        slope = builder.binary("Mul", slope, gate)
    return builder.binary("Mul", slope, _spread(builder, bias, apart))


def _spread(builder: Builder, bias: Bias, apart: ir.Value) -> ir.Value:
    """Return the distance of differences [A, ..] or [..]: signed, or minus their length."""
    if isinstance(bias.distance, Signed):
        return apart
    if len(sizes(apart)) == 4:
        return builder.same("Neg", builder.same("Abs", apart))
    square = builder.binary("Mul", apart, apart)
    total = builder.op("ReduceSum", square, builder.constant([0]), shape=sizes(square)[1:], keepdims=0)
    return builder.same("Neg", builder.same("Sqrt", total))


def _slopes(builder: Builder, slopes: Slopes, slots: Slots, dtype: ir.DataType) -> ir.Value:
    """Return [1 or B, 1 or H]."""
    if isinstance(slopes, Learned | Table):
        given = builder.cast(slots[slopes.slot], dtype)
        return builder.unsqueeze(given, *range(2 - len(sizes(given)))) if len(sizes(given)) < 2 else given
    return builder.constant([(slopes.slope,) if isinstance(slopes, Uniform) else slopes.values()], dtype)


def _gate(builder: Builder, gate: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return [1 or B, 1 or H, T]."""
    wide = builder.cast(gate, dtype)
    return builder.unsqueeze(wide, *range(3 - len(sizes(wide)))) if len(sizes(wide)) < 3 else wide


def _queries(builder: Builder, times: ir.Value, lengths: Lengths) -> ir.Value:
    """Return the times of the queries: those of the last keys."""
    if lengths.is_square:
        return times
    return builder.tail(times, lengths.queries, -1, lengths.query_size)


def _since(builder: Builder, bias: Bias, slots: Slots, dtype: ir.DataType, lengths: Lengths) -> ir.Value:
    """Return the times of the keys less that of the query in the middle: [1 or B, 1 or H, T_k], axes in front."""
    middle = builder.binary(
        "Sub", lengths.keys, builder.binary("Div", builder.binary("Add", lengths.queries, 1), 2)
    )
    clock = bias.clock
    if not isinstance(clock, Positions | Accumulated):
        numbers = builder.op("Sub", builder.ladder(0, lengths.keys), middle, shape=(lengths.key_size,))
        return builder.unsqueeze(builder.cast(numbers, dtype), 0, 1)
    times = slots[clock.slot]
    rank = len(sizes(times))
    has_axes = isinstance(bias.distance, Euclidean) and rank >= 3
    times = accumulated(builder, clock, times)
    own = rank - has_axes
    # [T], [B, T] or [B, H, T]; a batch without heads gets an axis of them.
    places = {1: (0, 1), 2: (1,), 3: ()}[own]
    if places:
        times = builder.unsqueeze(times, *(place + has_axes for place in places))
    if sizes(times)[-1] == 1 and lengths.key_size != 1:
        return builder.cast(builder.binary("Sub", times, times), dtype)
    origin = builder.op("Gather", times, middle, shape=(*sizes(times)[:-1], 1), axis=len(sizes(times)) - 1)
    return builder.cast(builder.binary("Sub", times, origin), dtype)


def _path(
    builder: Builder, bias: PathBias, slots: Slots, query: ir.Value, lengths: Lengths, target: Target
) -> ir.Value:
    """Return slope * sum over l = j+1 ... t of g(<p_t, R_l r_l> / dim), by one running sum from the end."""
    dtype = compute_dtype(query)
    by_query, by_key = (_edges(builder, slots[name], dtype) for name in (bias.query, bias.key))
    if bias.normalised == "both":
        by_query = _by_root_mean_square(builder, by_query)
    if bias.normalised != "none":
        by_key = _by_root_mean_square(builder, by_key)
    if bias.turn is not None:
        (by_key,) = rotate(builder, [by_key], bias.turn, slots, target).values
    product = builder.matmul(
        builder.binary("Div", by_query, float(bias.dim)), builder.transpose(by_key, 0, 1, 3, 2)
    )
    edges = _linked(builder, bias, product)
    ahead = seen(builder, lengths, is_causal=True, window=None)
    kept = builder.op("Where", ahead, edges, builder.constant(0.0, dtype), dtype=dtype, shape=sizes(edges))
    # Edges after the query are no part of a path; the sum over l > j is exclusive, from the end.
    total = builder.op("CumSum", kept, builder.constant(3), shape=sizes(kept), exclusive=1, reverse=1)
    slope = builder.unsqueeze(_slopes(builder, bias.slopes, slots, dtype), -1, -2)
    return builder.binary("Mul", slope, total)


def _edges(builder: Builder, edges: ir.Value, dtype: ir.DataType) -> ir.Value:
    wide = builder.cast(edges, dtype)
    return builder.unsqueeze(wide, *range(4 - len(sizes(wide)))) if len(sizes(wide)) < 4 else wide


def _by_root_mean_square(builder: Builder, value: ir.Value) -> ir.Value:
    square = builder.binary("Mul", value, value)
    axes = builder.constant([-1])
    mean = builder.op("ReduceMean", square, axes, shape=(*sizes(square)[:-1], 1), keepdims=1)
    return builder.binary("Div", value, builder.same("Sqrt", builder.binary("Add", mean, 1e-6)))


def _linked(builder: Builder, bias: PathBias, product: ir.Value) -> ir.Value:
    if isinstance(bias.link, Identity):
        return product
    if isinstance(bias.link, LogSigmoid):
        # log sigmoid(x) = -softplus(-x).
        return builder.same("Neg", builder.same("Softplus", builder.same("Neg", product)))
    return builder.same("Neg", builder.same("Exp", product))


def seen(builder: Builder, lengths: Lengths, *, is_causal: bool, window: int | None) -> ir.Value:
    """Return True where a query may see a key, [T_q, T_k]; the queries are the last of the keys."""
    offset = builder.op("Sub", lengths.keys, lengths.queries, shape=(1,))
    keys = builder.unsqueeze(builder.ladder(0, lengths.keys), 0)
    queries = builder.unsqueeze(builder.ladder(offset, lengths.keys), 1)
    parts: list[ir.Value] = []
    shape = (lengths.query_size, lengths.key_size)
    if is_causal:
        parts.append(builder.op("LessOrEqual", keys, queries, dtype=BOOL, shape=shape))
    if window is not None:
        near = builder.op("Sub", queries, builder.constant(window), dtype=INT64, shape=sizes(queries))
        parts.append(builder.op("Greater", keys, near, dtype=BOOL, shape=shape))
    return parts[0] if len(parts) == 1 else builder.op("And", *parts, dtype=BOOL, shape=shape)


def first(builder: Builder, value: ir.Value, count: ir.Value | None, axis: int) -> ir.Value:
    """Return the first `count` [1] entries of one axis, or all; an axis of one is left, which broadcasts."""
    if count is None or sizes(value)[axis] == 1:
        return value
    return builder.part(value, builder.constant([0]), count, axis)


def total(builder: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    """Return the sum of values that broadcast."""
    first, *others = parts
    for part in others:
        first = builder.op("Add", first, part, shape=broadcast(sizes(first), sizes(part)))
    return first


def is_double(value: ir.Value) -> bool:
    """Whether a value is computed in double, which no fused operator takes."""
    return dtype_of(value) == DOUBLE
