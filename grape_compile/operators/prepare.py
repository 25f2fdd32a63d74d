"""From an encoding and the tensors of its slots to what a provider computes with: turned heads and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Clock,
    Compose,
    Encoding,
    Euclidean,
    Half,
    Interleaved,
    Learned,
    Multiplicative,
    Nope,
    PathBias,
    Positions,
    Rotation,
    Signed,
    Slopes,
    Steps,
    Table,
    Tables,
    Uniform,
)
from grape_compile.errors import OperandError
from grape_compile.operators.angles import Turn, accumulate, turn
from grape_compile.operators.bias import Additive
from grape_compile.operators.call import AttendCall, QueryTurn
from grape_compile.operators.constants import constant, stored
from grape_compile.operators.operands import (
    check_broadcast,
    check_device,
    check_floating,
    check_numbers,
    compute_dtype,
)
from grape_compile.operators.path import Path
from grape_compile.operators.planar import Planar
from grape_compile.operators.rotation import rotate, rotated

Slots = Mapping[str, Tensor]
#: Coordinates of heads that lie in a tile without padding, so that their halves do too.
_WHOLE: Final = (16, 32, 64, 128, 256)


def parts(encoding: Encoding) -> tuple[Encoding, ...]:
    """Return the rotations and biases of an encoding in their order."""
    if isinstance(encoding, Compose):
        return tuple(leaf for part in encoding.parts for leaf in parts(part))
    return () if isinstance(encoding, Nope) else (encoding,)


def turned(query: Tensor, key: Tensor, encoding: Encoding, slots: Slots) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by the rotations of an encoding; the queries are the last T_q keys.

    Raises OperandError for more queries than keys.
    """
    for part in parts(encoding):
        if not isinstance(part, Multiplicative):
            continue
        if query.shape[-2] == key.shape[-2]:
            query, key = rotate([query, key], part, slots)
            continue
        if query.shape[-2] > key.shape[-2]:
            raise OperandError(
                f"{part} of queries and keys",
                f"{query.shape[-2]} queries over {key.shape[-2]} keys",
                "at most as many queries",
            )
        (key,) = rotate([key], part, slots)
        (query,) = rotate([query], *_last(part, slots, query.shape[-2], key))
    return query, key


def turned_keys(
    query: Tensor, key: Tensor, encoding: Encoding, slots: Slots
) -> tuple[Tensor, Tensor, QueryTurn | None]:
    """Return queries and keys like `turned`, but queries as they are, and how they turn.

    That is None, and queries are turned, where not one rotation turns whole heads of a power of two coordinates in
    halves or neighbours.
    """
    rotations = [part for part in parts(encoding) if isinstance(part, Multiplicative)]
    only = rotations[0] if len(rotations) == 1 else None
    if (
        not isinstance(only, Rotation)
        or not isinstance(only.planes, Half | Interleaved)
        or only.output != only.planes
        or only.basis is not None
        or query.shape[-2] > key.shape[-2]
        or query.shape[-1] not in _WHOLE
    ):
        return *turned(query, key, encoding, slots), None
    part, named = only, slots
    if query.shape[-2] < key.shape[-2]:
        last, named = _last(only, slots, query.shape[-2], key)
        assert isinstance(last, Rotation), "a part of a rotation"
        part = last
    Planar(part).check(named, query)
    tables = turn(part, named, query)
    cos, sin = (
        each.reshape((1,) * (4 - each.dim()) + tuple(each.shape)) for each in (tables.cos, tables.sin)
    )
    (key,) = rotate([key], only, slots)
    return query, key, QueryTurn(part, cos, sin)


def with_turned_queries(call: AttendCall) -> AttendCall:
    """Return a call whose queries are turned."""
    if call.turn is None:
        return call
    turns = Turn(call.turn.cos, call.turn.sin)
    return replace(call, query=Planar(call.turn.rotation).act(turns, {}, call.query), turn=None)


def _last(part: Multiplicative, slots: Slots, count: int, key: Tensor) -> tuple[Encoding, Slots]:
    """Return a rotation of the last `count` of the keys' tokens alone, and its slots."""
    clock, length = part.clock, key.shape[-2]
    if isinstance(clock, Tables):
        cut = {name: _tail(slots[name], -2, count, length) for name in (clock.cos, clock.sin)}
        return part, {**slots, **cut}
    if isinstance(clock, Positions | Accumulated):
        times = _tail(accumulate(clock, slots[clock.slot], (length,)), -1, count, length)
        return part.by(Positions(clock.slot)), {**slots, clock.slot: times}
    steps = torch.arange(length - count, length, device=key.device)
    return part.by(Positions("steps")), {**slots, "steps": steps}


def _tail(slot: Tensor, axis: int, count: int, length: int) -> Tensor:
    """Return the last tokens of a slot that has one entry for each key; one entry for all stays."""
    return slot.narrow(axis, length - count, count) if slot.shape[axis] == length else slot


def biases(
    encoding: Encoding, slots: Slots, query: Tensor, key: Tensor, is_causal: bool, has_mask: bool
) -> tuple[Additive | Path, ...]:
    """Return the biases of an encoding for queries [B, H, T_q, D] and keys [B, H_kv, T_k, D].

    Raises OperandError for slots of the wrong shape, and for a path bias of a call that is not causal.
    """
    found: list[Additive | Path] = []
    for part in parts(encoding):
        if isinstance(part, Bias):
            found.append(_additive(part, slots, query, key, is_causal))
        elif isinstance(part, PathBias):
            if not (is_causal or has_mask or query.shape[2] == 1):
                raise OperandError(
                    f"{part} between all queries and keys",
                    "is_causal=False and no mask",
                    "is_causal=True: a path leads from a query to the keys before it",
                )
            found.append(_path(part, slots, query, key))
    return tuple(found)


def _additive(bias: Bias, slots: Slots, query: Tensor, key: Tensor, is_causal: bool) -> Additive:
    """Under a causal mask with steps, |j - t| is t - j, so an absolute distance becomes signed."""
    steps_behind = is_causal and isinstance(bias.clock, Steps)
    gates: list[Tensor | None] = [None, None]
    if bias.gate is not None:
        sides = ((bias.gate.query, query.shape[2], "queries"), (bias.gate.key, key.shape[2], "keys"))
        gates = [
            None if name is None else _gate(name, slots, query, length, axis) for name, length, axis in sides
        ]
    return Additive(
        Signed() if steps_behind else bias.distance,
        _slopes(bias, bias.slopes, slots, query),
        _clock(bias, bias.clock, slots, query, key),
        *gates,
        constants=_constants(bias.slopes),
    )


def _constants(slopes: Slopes) -> tuple[str, ...]:
    """Return the field of slopes in closed form, whose gradient nobody asks for."""
    return () if slopes.slots else ("slopes",)


def _slopes(encoding: Encoding, slopes: Slopes, slots: Slots, query: Tensor) -> Tensor:
    batch, heads, dtype = query.shape[0], query.shape[1], compute_dtype(query)
    if isinstance(slopes, Learned | Table):
        values = slots[slopes.slot]
        check_floating(slopes.slot, values)
        check_device(slopes.slot, values, query)
        check_broadcast(slopes.slot, values.shape, (batch, heads), "[batch, heads]")
        # Few numbers that every logit reads: a formula behind them is not computed again for each.
        wide = stored(values.to(dtype))
    elif isinstance(slopes, Uniform):
        wide = torch.full((1,), slopes.slope, dtype=dtype, device=query.device)
    else:
        if len(slopes.values()) != heads:
            raise OperandError(
                f"the {len(slopes.values())} slopes of {encoding}",
                f"{heads} query heads",
                "one slope for each head",
            )
        wide = constant(slopes.values(), dtype, query)
    return wide.reshape((1,) * (2 - wide.dim()) + tuple(wide.shape))


def _clock(bias: Bias, clock: Clock, slots: Slots, query: Tensor, key: Tensor) -> Tensor | None:
    """Return [A, 1 or B, 1 or H, T_k] from [T_k], [B, T_k] or [B, H, T_k]; the axes of `Euclidean` come first."""
    if not isinstance(clock, Positions | Accumulated):
        return None
    name, length = clock.slot, key.shape[2]
    times = slots[name]
    check_numbers(name, times)
    check_device(name, times, query)
    axes = times.shape[:1] if isinstance(bias.distance, Euclidean) and times.dim() >= 3 else ()
    own = times.shape[len(axes) :]
    if len(own) < 3:
        check_broadcast(name, own, (key.shape[0], length), "[batch, keys]")
        four = (1,) * (2 - len(own)) + tuple(own)
        four = (four[0], 1, four[1])
    else:
        check_broadcast(name, own, (key.shape[0], query.shape[1], length), "[batch, heads, keys]")
        four = tuple(own)
    if query.shape[2] > length:
        raise OperandError(
            f"{name} as the time of queries and keys",
            f"{query.shape[2]} queries over {length} keys",
            "queries that are the last of the keys",
        )
    wide = accumulate(clock, times, (length,)).reshape(*(axes or (1,)), *four)
    if not wide.is_floating_point():
        wide = wide.to(torch.int64)
    elif wide.dtype != torch.float64:
        wide = wide.to(compute_dtype(query))
    return wide.expand(*wide.shape[:-1], length)


def _gate(name: str, slots: Slots, query: Tensor, length: int, axis: str) -> Tensor:
    gate = slots[name]
    check_floating(name, gate)
    check_device(name, gate, query)
    check_broadcast(name, gate.shape, (query.shape[0], query.shape[1], length), f"[batch, heads, {axis}]")
    wide = gate.to(compute_dtype(query)).reshape((1,) * (3 - gate.dim()) + tuple(gate.shape))
    return wide.expand(*wide.shape[:2], length)


def _path(bias: PathBias, slots: Slots, query: Tensor, key: Tensor) -> Path:
    if query.shape[2] > key.shape[2]:
        raise OperandError(
            f"{bias} of queries and keys",
            f"{query.shape[2]} queries over {key.shape[2]} keys",
            "queries that are the last of the keys",
        )
    by_query = _edges(bias, bias.query, slots, query, query.shape[2])
    by_key = _edges(bias, bias.key, slots, query, key.shape[2])
    if bias.normalised == "both":
        by_query = by_root_mean_square(by_query)
    if bias.normalised != "none":
        by_key = by_root_mean_square(by_key)
    if bias.turn is not None:
        (by_key,) = rotated([by_key], bias.turn, slots)
    slopes = _slopes(bias, bias.slopes, slots, query)
    bounded = bias.normalised == "both" and _keeps_length(bias.turn)
    return Path(bias.link, slopes, by_query / bias.dim, by_key, bounded, constants=_constants(bias.slopes))


def _keeps_length(turn: Rotation | None) -> bool:
    """Whether no vector gets longer: not so for tables and bases, which may hold anything."""
    return turn is None or not (isinstance(turn.clock, Tables) or turn.basis or abs(turn.scale) > 1)


def _edges(bias: PathBias, name: str, slots: Slots, query: Tensor, length: int) -> Tensor:
    edges = slots[name]
    check_floating(name, edges)
    check_device(name, edges, query)
    wanted = (*query.shape[:2], length, bias.dim)
    check_broadcast(name, edges.shape, wanted, "[batch, heads, tokens, dim]")
    if edges.shape[-2:] != wanted[-2:]:
        raise OperandError(
            f"{name} of {bias}",
            f"{name} has shape {tuple(edges.shape)}",
            f"last axes of {tuple(wanted[-2:])}",
        )
    return edges.to(compute_dtype(query)).reshape((1,) * (4 - edges.dim()) + tuple(edges.shape))


def by_root_mean_square(tensor: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + 1e-6), over the last axis, without a learned scale."""
    mean: Tensor = tensor.square().mean(-1, keepdim=True)
    return tensor * (mean + 1e-6).rsqrt()


def floating(slots: Sequence[Tensor]) -> list[int]:
    """Return the numbers of the slots that may have a gradient."""
    return [number for number, slot in enumerate(slots) if slot.is_floating_point()]
