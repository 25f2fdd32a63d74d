"""The provider of `grape::decode` on GPUs: queries and new keys turn, join the cache and attend in two launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Multiplicative, Positions, Rotation, Steps, Tables
from grape_compile.kernels import decoding
from grape_compile.kernels.decoding import Decoding
from grape_compile.kernels.layouts import table
from grape_compile.kernels.planar_launches import theta_of
from grape_compile.kernels.pointers import in_line, strides
from grape_compile.operators import chunked
from grape_compile.operators.call import AttendCall
from grape_compile.operators.decode_call import DecodeCall
from grape_compile.operators.prepare import biases, parts


def supports(call: DecodeCall) -> Literal[True] | str:
    """Few new tokens under at most one rotation of planes, and biases that the kernels of attention take."""
    rotations = [part for part in parts(call.encoding) if isinstance(part, Multiplicative)]
    if len(rotations) > 1:
        return f"{len(rotations)} rotations, more than one"
    if any(tensor.stride(-1) != 1 for tensor in (call.key_cache, call.value_cache)):
        return "a cache whose coordinates are not neighbours in memory"
    if rotations and (refusal := _rotation_refusal(call, rotations[0])):
        return refusal
    return decoding.supports(_attending(call))


def _rotation_refusal(call: DecodeCall, rotation: Multiplicative) -> str:
    if not isinstance(rotation, Rotation) or rotation.basis is not None:
        return "a rotation that mixes more than planes of coordinates"
    if rotation.out is not None or rotation.planes.axis_count > 1:
        return "planes that move or turn by several axes"
    clock, spectrum = rotation.clock, rotation.spectrum
    if spectrum is not None and any(call.slots[name].dim() > 1 for name in spectrum.slots):
        return "frequencies of each token"
    angles, own = (clock.slots, 1) if isinstance(clock, Tables) else (clock.slots, 0)
    for name in angles:
        shape = call.slots[name].shape
        lead = shape[: len(shape) - own]
        if any(size != 1 for size in lead[-2:-1]):
            return "heads that turn by angles of their own"
    return ""


def forward(call: DecodeCall) -> Tensor:
    """Return what the new tokens see [B, H, T, D_v]; their keys and values are then in the caches."""
    attending = _attending(call)
    output, logsumexp = chunked.empty_result(attending)
    both = Decoding(attending, step=step_arguments(call))
    both.split_launch().run()
    both.merge_launch(output, logsumexp).run()
    return output


def _attending(call: DecodeCall) -> AttendCall:
    """Return the call of attention over the whole caches; queries do not stand at their end."""
    found = biases(call.encoding, call.slots, call.query, call.key_cache, True, False)
    return AttendCall(
        call.query, call.key_cache, call.value_cache, found, None, True, call.scale, call.window
    )


def step_arguments(call: DecodeCall) -> dict[str, Any]:
    """Return what the kernel needs to turn queries and new keys and to put them into the caches."""
    key, value = map(in_line, (call.key, call.value))
    arguments = {
        **decoding.NO_STEP,
        **{"LENGTHS": call.lengths.contiguous(), "NEW_KEY": key, "NEW_VALUE": value},
        **strides("new_key", key),
        **strides("new_value", value),
    }
    rotation = next((part for part in parts(call.encoding) if isinstance(part, Rotation)), None)
    return arguments if rotation is None else arguments | _angle_arguments(call, rotation)


def _angle_arguments(call: DecodeCall, rotation: Rotation) -> dict[str, Any]:
    from grape_compile.kernels.bodies import turn as body

    clock = rotation.clock
    if isinstance(clock, Tables):
        source = body.TABLES
        found = _angles("a", call.slots[clock.cos], 1) | _angles("b", call.slots[clock.sin], 1)
    else:
        position = call.slots[clock.slot] if isinstance(clock, Positions) else None
        exact = position is not None and position.dtype == torch.float64
        dtype = torch.float64 if exact else torch.float32
        theta = theta_of(rotation, call.slots, call.query, dtype)
        source = body.EXACT if exact else body.STEPS if isinstance(clock, Steps) else body.POSITIONS
        found = _angles("a", position, 0) | _angles("b", theta, 1)
    return {
        **found,
        "COORDINATES": table(coordinates(rotation), call.query.device),
        "cos_factor": float(rotation.scale),
        "sin_factor": float(rotation.scale * rotation.orientation),
        "SOURCE": int(source),
    }


def _angles(name: str, angles: Tensor | None, own: int) -> dict[str, Any]:
    """Return numbers [.., 1, T] with `own` axes behind, and their strides; zero where one stands for all."""
    if angles is None:
        return {}
    lead = angles.dim() - own
    places = {"batch": lead - 3, "token": lead - 1, "plane": lead if own else -1}
    strides = {
        f"{name}_{axis}": 0 if at < 0 or angles.shape[at] == 1 else angles.stride(at)
        for axis, at in places.items()
    }
    return {name.upper(): angles, **strides}


@lru_cache(maxsize=256)
def coordinates(rotation: Rotation) -> tuple[int, ...]:
    """Return plane, partner and sign of each coordinate, one after the other; plane -1 does not turn.

    >>> from grape_compile.encoding import rope
    >>> coordinates(rope(6, rotary_dim=4))
    (0, 1, 0, 1, -1, -1, 2, 3, 0, 1, 4, 5, -1, -1, 1, 1, 0, 0)
    """
    size = rotation.head_dim
    plane, partner, sign = [-1] * size, list(range(size)), [0] * size
    for number, (first, second) in enumerate(rotation.planes.pairs()):
        plane[first] = plane[second] = number
        partner[first], partner[second] = second, first
        sign[first], sign[second] = -1, 1
    return (*plane, *partner, *sign)
