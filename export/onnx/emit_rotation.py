"""Rotations as ONNX nodes: RotaryEmbedding where a rotation fits that operator, else plain arithmetic.

Cases, by what the tensor and its tables look like:

1. a planar rotation of [B, H, T, D], [B, T, H, D] or [B, T, D] whose tables do not differ between heads is one
   RotaryEmbedding (ai.onnx 23 or com.microsoft); coordinates it does not take are put in order before or after it;
2. any other planar rotation is four products of slices;
3. `rank2` and `non_commuting` are x + F M F^T x (GRAPE 2.3, App. D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from grape_compile.encoding import (
    Axes,
    Compose,
    Encoding,
    Half,
    Interleaved,
    Multiplicative,
    Nope,
    Planes,
    Rotation,
    planes_of,
)
from grape_compile.export.onnx.builder import (
    DOUBLE,
    INT64,
    MICROSOFT,
    Builder,
    Size,
    all_known,
    compute_dtype,
    dtype_of,
    sizes,
)
from grape_compile.export.onnx.emit_generators import generated
from grape_compile.export.onnx.emit_tables import Slots, Turn, turn
from grape_compile.export.onnx.fold_weights import Map, fold
from grape_compile.export.onnx.targets import Target


@dataclass(frozen=True)
class Emitted:
    """The values that stand for the results, and what computes them: an operator, or why there is none."""

    values: tuple[ir.Value, ...]
    how: str


def rotate(
    builder: Builder, tensors: Sequence[ir.Value], encoding: Encoding, slots: Slots, target: Target
) -> Emitted:
    """Return every tensor turned by `encoding` (GRAPE 2-3); what `grape::rotate` computes."""
    if isinstance(encoding, Compose):
        turned, told = tuple(tensors), []
        for part in encoding.parts:
            found = rotate(builder, turned, part, slots, target)
            turned = found.values
            told.append(found.how)
        return Emitted(turned, ", ".join(dict.fromkeys(told)))
    if isinstance(encoding, Nope):
        return Emitted(tuple(tensors), "nothing")
    assert isinstance(encoding, Multiplicative), "a bias acts on logits"
    parts = [_rotated(builder, tensor, encoding, slots, target) for tensor in tensors]
    return Emitted(
        tuple(part.values[0] for part in parts), ", ".join(dict.fromkeys(part.how for part in parts))
    )


def _rotated(
    builder: Builder, tensor: ir.Value, encoding: Multiplicative, slots: Slots, target: Target
) -> Emitted:
    if not isinstance(encoding, Rotation):
        return Emitted(
            (generated(builder, tensor, encoding, slots),), "arithmetic: its planes are no coordinates"
        )
    if encoding.basis is not None:
        tensor = _in_basis(builder, tensor, slots[encoding.basis])
    placed = _in_place(builder, tensor, encoding)
    told = "" if placed is encoding else ", the weights before it in order"
    tables = turn(builder, placed, slots, tensor)
    obstacle = _obstacle(tensor, tables, target)
    if obstacle:
        return Emitted((_by_arithmetic(builder, tensor, placed, tables),), f"arithmetic: {obstacle}{told}")
    return Emitted((_by_operator(builder, tensor, placed, tables, target),), f"RotaryEmbedding{told}")


def _in_basis(builder: Builder, tensor: ir.Value, basis: ir.Value) -> ir.Value:
    """Return x E: by the weights that x comes from where E is known, else as a product."""
    matrix = basis.const_value
    if matrix is not None and fold(builder, tensor, Map.basis(matrix.numpy())):
        return tensor
    return builder.matmul(tensor, builder.cast(basis, dtype_of(tensor)))


def _in_place(builder: Builder, tensor: ir.Value, rotation: Rotation) -> Rotation:
    """Return a rotation whose result has the places of its operand, where weights can make the operand so."""
    own, wanted = rotation.planes, rotation.output
    if own.pairs() == wanted.pairs():
        return rotation
    places = [place for pair in wanted.pairs() for place in pair] + _outside(wanted)
    held = [place for pair in own.pairs() for place in pair] + _outside(own)
    order = [held[places.index(place)] for place in range(own.head_dim)]
    if not fold(builder, tensor, Map.order(order)):
        return rotation
    planes = planes_of(wanted.pairs(), wanted.head_dim)
    return replace(rotation, planes=Axes(planes, own.axes()) if any(own.axes()) else planes, out=None)


# -- the fused operator -----------------------------------------------------------------------------------------------


def _obstacle(tensor: ir.Value, tables: Turn, target: Target) -> str:
    """Why a rotation is not one RotaryEmbedding, or nothing."""
    shape = sizes(tensor)
    if not (target.fused or target.microsoft):
        return f"opset {target.opset} has no RotaryEmbedding"
    if dtype_of(tensor) == DOUBLE:
        return "RotaryEmbedding takes no double"
    if len(shape) not in (3, 4):
        return f"RotaryEmbedding takes no tensor of {len(shape)} axes"
    if len(tables.shape) > len(shape):
        return "its tables have more axes than the tensor"
    if len(shape) == 4 and not _heads_first(tables) and not _tokens_first(tensor, tables):
        return "its tables differ between heads"
    return ""


def _by_rank(tables: Turn, rank: int) -> tuple[Size, ...]:
    return (*(1,) * (rank - len(tables.shape)), *tables.shape)


def _heads_first(tables: Turn) -> bool:
    """Whether tables [.., T, P] hold for [B, H, T, D]."""
    return _by_rank(tables, 4)[1] == 1


def _tokens_first(tensor: ir.Value, tables: Turn) -> bool:
    """Whether tables [.., T, 1, P] hold for [B, T, H, D] with a known number of heads."""
    return _by_rank(tables, 4)[2] == 1 and isinstance(sizes(tensor)[2], int)


def _by_operator(
    builder: Builder, tensor: ir.Value, rotation: Rotation, tables: Turn, target: Target
) -> ir.Value:
    """Turn the coordinates from the first to the last that turn; the operator itself leaves what lies behind them."""
    taken = [place for side in (rotation.planes, rotation.output) for pair in side.pairs() for place in pair]
    start, size = min(taken), rotation.head_dim
    if start == 0:
        return _from_the_first(builder, tensor, rotation.planes, rotation.output, tables, target)
    planes, output = (
        planes_of([(first - start, second - start) for first, second in side.pairs()], size - start)
        for side in (rotation.planes, rotation.output)
    )
    behind = builder.slice(tensor, start, size)
    turned = _from_the_first(builder, behind, planes, output, tables, target)
    return builder.concat([builder.slice(tensor, 0, start), turned])


def _from_the_first(
    builder: Builder, tensor: ir.Value, planes: Planes, output: Planes, tables: Turn, target: Target
) -> ir.Value:
    order = _order(planes, output)
    if order.before is not None:
        tensor = builder.permute(tensor, order.before)
    shape, batch = sizes(tensor), builder.size(tensor, 0)
    heads_axis = 2 if len(shape) == 4 and not _heads_first(tables) else 1
    heads = 1
    if heads_axis == 2:
        heads, width = _known(shape[2:])
        taken = builder.reshape(tensor, (0, 0, heads * width), (*shape[:2], heads * width))
    else:
        taken = tensor
        if len(shape) == 4 and isinstance(shape[1], int):
            heads = shape[1]
    cos, sin = (
        _by_token(builder, table, len(shape), heads_axis, batch, dtype_of(tensor))
        for table in (tables.cos, tables.sin)
    )
    attributes: dict[str, Any] = {
        "interleaved": int(order.interleaved),
        "num_heads": heads,
        "rotary_embedding_dim": 2 * planes.count,
    }
    if target.fused:
        turned = builder.op("RotaryEmbedding", taken, cos, sin, shape=sizes(taken), **attributes)
    else:
        turned = _microsoft(builder, taken, cos, sin, planes.count, attributes)
    if heads_axis == 2:
        turned = builder.reshape(turned, (0, 0, *_known(shape[2:])), shape)
    return turned if order.after is None else builder.permute(turned, order.after)


def _by_token(
    builder: Builder, table: ir.Value, rank: int, heads_axis: int, batch: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """Return a table as [B, T, P]: the kernel of ONNX Runtime does not broadcast it over the batch."""
    own = sizes(table)
    if missing := rank - len(own):
        table = builder.unsqueeze(table, *range(missing))
    if rank == 4:
        table = builder.squeeze(table, heads_axis)
    table = builder.cast(table, dtype)
    lead, tokens, planes = sizes(table)
    return builder.expand(table, (batch, 1, 1), (None, tokens, planes)) if lead == 1 else table


def _microsoft(
    builder: Builder, tensor: ir.Value, cos: ir.Value, sin: ir.Value, planes: int, attributes: dict[str, Any]
) -> ir.Value:
    """com.microsoft looks tables up by position: every token of the batch is a row of its own."""
    count = builder.op("Size", cos, dtype=INT64, shape=())
    rows = builder.op("Div", count, builder.constant(planes), shape=())
    numbers = builder.op("Range", builder.constant(0), rows, builder.constant(1), dtype=INT64, shape=(None,))
    lead = builder.op("Shape", cos, dtype=INT64, shape=(2,), start=0, end=2)
    places = builder.op("Reshape", numbers, lead, shape=sizes(cos)[:2])
    flat = [builder.reshape(table, (-1, planes), (None, planes)) for table in (cos, sin)]
    return builder.op(
        "RotaryEmbedding", tensor, places, *flat, domain=MICROSOFT, shape=sizes(tensor), **attributes
    )


@dataclass(frozen=True)
class _Order:
    """How the operator pairs coordinates, and the order it has to be given and returns (None: as they are)."""

    interleaved: bool
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None


def _order(planes: Planes, output: Planes) -> _Order:
    pairs, size = planes.pairs(), planes.head_dim
    spellings = {rule: rule(2 * len(pairs)).pairs() for rule in (Half, Interleaved)}
    # Two coordinates are both; the operators take halves without a detour.
    rule = next((rule for rule, own in spellings.items() if own == pairs), None)
    places = spellings[rule or Half]
    held = list(range(size)) if rule is not None else _held(pairs, places, size)
    wanted = _held(output.pairs(), places, size)
    after = [wanted.index(coordinate) for coordinate in range(size)]
    return _Order(
        rule is Interleaved,
        None if held == list(range(size)) else tuple(held),
        None if _plain(after) else tuple(after),
    )


def _held(pairs: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]], size: int) -> list[int]:
    """Return which coordinate of the head lies where the operator wants plane by plane, the others behind them."""
    at = {
        place: own
        for pair, spot in zip(pairs, places, strict=True)
        for own, place in zip(pair, spot, strict=True)
    }
    taken = set(at.values())
    rest = iter(coordinate for coordinate in range(size) if coordinate not in taken)
    return [at[place] if place in at else next(rest) for place in range(size)]


def _plain(order: Sequence[int]) -> bool:
    return list(order) == list(range(len(order)))


def _known(shape: Sequence[Size]) -> list[int]:
    assert all_known(shape)
    return [size for size in shape if isinstance(size, int)]


# -- plain arithmetic -------------------------------------------------------------------------------------------------


def _by_arithmetic(builder: Builder, tensor: ir.Value, rotation: Rotation, tables: Turn) -> ir.Value:
    own, dtype = dtype_of(tensor), compute_dtype(tensor)
    first, second = (builder.cast(part, dtype) for part in _take(builder, tensor, rotation.planes))
    out_first = builder.binary(
        "Sub", builder.binary("Mul", first, tables.cos), builder.binary("Mul", second, tables.sin)
    )
    out_second = builder.binary(
        "Add", builder.binary("Mul", second, tables.cos), builder.binary("Mul", first, tables.sin)
    )
    turned = [builder.cast(part, own) for part in (out_first, out_second)]
    outside = _outside(rotation.planes)
    return _put(builder, turned, _rest(builder, tensor, outside), rotation.output)


def _outside(planes: Planes) -> list[int]:
    taken = {coordinate for pair in planes.pairs() for coordinate in pair}
    return [coordinate for coordinate in range(planes.head_dim) if coordinate not in taken]


def _take(builder: Builder, tensor: ir.Value, planes: Planes) -> tuple[ir.Value, ir.Value]:
    first, second = (list(side) for side in zip(*planes.pairs(), strict=True))
    return _pick(builder, tensor, first), _pick(builder, tensor, second)


def _pick(builder: Builder, tensor: ir.Value, coordinates: list[int]) -> ir.Value:
    step = coordinates[1] - coordinates[0] if len(coordinates) > 1 else 1
    if step > 0 and coordinates == list(range(coordinates[0], coordinates[-1] + 1, step)):
        return builder.slice(tensor, coordinates[0], coordinates[-1] + 1, step=step)
    return builder.gather(tensor, coordinates)


def _rest(builder: Builder, tensor: ir.Value, outside: list[int]) -> list[ir.Value]:
    return [_pick(builder, tensor, outside)] if outside else []


def _put(builder: Builder, turned: list[ir.Value], rest: list[ir.Value], planes: Planes) -> ir.Value:
    """Return coordinates in their places: what does not turn in front of or behind what does, or else among it."""
    first, second = zip(*planes.pairs(), strict=True)
    outside, inside = _outside(planes), [*first, *second]
    if _plain([*outside, *inside]):
        return builder.concat([*rest, *turned])
    held = [*inside, *outside]
    order = [held.index(coordinate) for coordinate in range(planes.head_dim)]
    return builder.permute(builder.concat([*turned, *rest]), order)
