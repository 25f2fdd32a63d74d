"""From a clock and a spectrum to phases, cosines and sines, and gradients the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Clock,
    Learned,
    Positions,
    Rotation,
    Spectrum,
    Steps,
    Table,
    Tables,
)
from grape_compile.errors import OperandError
from grape_compile.operators.action import Slots
from grape_compile.operators.constants import closed_form, constant, stored
from grape_compile.operators.operands import check_broadcast, check_device, check_numbers, compute_dtype


@dataclass(frozen=True)
class Turn:
    """Cosine and sine of orientation * clock * theta, times scale, for [*shape[:-1], planes]."""

    cos: Tensor
    sin: Tensor


def check_clock(clock: Clock, axes: int, slots: Slots, tensor: Tensor) -> None:
    """Raise OperandError for a clock whose slots do not fit a tensor, tables apart from their shape."""
    for name in clock.slots:
        check_numbers(name, slots[name])
        check_device(name, slots[name], tensor)
    if isinstance(clock, Steps) and tensor.dim() < 2:
        raise OperandError(
            "steps along axis -2", f"a tensor of shape {tuple(tensor.shape)}", "a tensor [..., T, head_dim]"
        )
    if isinstance(clock, Positions | Accumulated):
        _check_positions(clock, slots[clock.slot], tensor, axes)


def check_by_plane(names: tuple[str, ...], count: int, slots: Slots, tensor: Tensor) -> None:
    """Raise OperandError unless these slots hold numbers for every token and every one of `count` planes."""
    for name in names:
        check_numbers(name, slots[name])
        check_device(name, slots[name], tensor)
        check_broadcast(name, slots[name].shape, (*tensor.shape[:-1], count), "[*tensor.shape[:-1], planes]")


def phase_dtype(clock: Clock, slots: Slots, tensor: Tensor) -> torch.dtype:
    """Return the dtype of clock, frequency and angle: float64 for sums over tokens and for float64 positions.

    All other clocks keep the compute dtype, which is what models compute with.
    """
    is_wide = isinstance(clock, Positions) and slots[clock.slot].dtype == torch.float64
    return torch.float64 if is_wide or isinstance(clock, Accumulated) else compute_dtype(tensor)


def turn(rotation: Rotation, slots: Slots, tensor: Tensor) -> Turn:
    """Return the cosines and sines that turn `tensor`, in its compute dtype.

    The angle is one product of a position and a frequency (radians per position), both rounded to the compute
    dtype first. Those of an `Accumulated` clock, or of float64 positions, stay float64 until cosine and sine.
    """
    dtype = compute_dtype(tensor)
    if isinstance(rotation.clock, Tables):
        cos, sin = slots[rotation.clock.cos].to(dtype), slots[rotation.clock.sin].to(dtype)
    else:
        times, theta = _factors(rotation, slots, tensor)
        angle = times * theta
        cos, sin = stored(angle.cos().to(dtype)), stored(angle.sin().to(dtype))
    if rotation.orientation < 0:
        sin = -sin
    if rotation.scale != 1.0:
        cos, sin = cos * rotation.scale, sin * rotation.scale
    return Turn(cos, sin)


def _factors(rotation: Rotation, slots: Slots, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return time and frequency, whose product is the angle of every token and plane before orientation."""
    assert rotation.spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
    dtype = phase_dtype(rotation.clock, slots, tensor)
    times = clock_values(rotation.clock, rotation.planes.axes(), slots, tensor, dtype)
    return times, frequencies(rotation.spectrum, rotation.planes.count, slots, tensor, dtype)


def same_turn(clock: Clock, tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors turn by the same angles: those depend on no more of them than this."""
    return (
        compute_dtype(tensor) == compute_dtype(other)
        and tensor.device == other.device
        and (not isinstance(clock, Steps) or tensor.shape[-2] == other.shape[-2])
    )


def frequencies(spectrum: Spectrum, count: int, slots: Slots, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return theta in radians per position, [planes] or the shape of its slot."""
    if isinstance(spectrum, Learned | Table):
        return slots[spectrum.slot].to(dtype)
    return closed_form(spectrum, count, dtype, tensor)


def clock_values(
    clock: Clock, axes: tuple[int, ...], slots: Slots, tensor: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the time of every token, [..., 1], or of every token and plane, [..., planes], by several axes."""
    if isinstance(clock, Steps):
        return torch.arange(tensor.shape[-2], dtype=dtype, device=tensor.device).unsqueeze(-1)
    assert isinstance(clock, Positions | Accumulated), "tables have no clock"
    times = accumulate(clock, slots[clock.slot].to(dtype), tensor.shape[-2:-1])
    return torch.stack([times[axis] for axis in axes], -1) if any(axes) else times.unsqueeze(-1)


def _check_positions(clock: Positions | Accumulated, positions: Tensor, tensor: Tensor, axes: int) -> None:
    lead = () if axes == 1 else (axes,)
    if tuple(positions.shape[: len(lead)]) != lead:
        raise OperandError(
            f"{clock.slot} of {axes} axes",
            f"{clock.slot} has shape {tuple(positions.shape)}",
            f"a leading dimension of size {axes}",
        )
    check_broadcast(clock.slot, positions.shape[len(lead) :], tensor.shape[:-1], "tensor.shape[:-1]")


def accumulate(clock: Clock, rates: Tensor, length: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the running sum of the rates over their last axis, in float64, for `Accumulated`; else the rates.

    A million float32 rates of one size add up exactly. Raises OperandError where the last axis is not the
    sequence: a running sum over a broadcast axis has no meaning.
    """
    if not isinstance(clock, Accumulated):
        return rates
    if rates.shape[-1:] != tuple(length):
        raise OperandError(
            f"the running sum of {clock.slot} along a sequence of {tuple(length)}",
            f"{clock.slot} has shape {tuple(rates.shape)}",
            f"a last axis of {tuple(length)}: one rate for each token",
        )
    wide = rates.to(torch.float64)
    total = wide.cumsum(-1)
    return total if clock.inclusive else total - wide


def accumulate_gradient(clock: Clock, gradient: Tensor) -> Tensor:
    """Return the gradient of the rates from that of `accumulate`: the running sum from the end, in float64."""
    if not isinstance(clock, Accumulated):
        return gradient
    wide = gradient.to(torch.float64)
    total = wide.flip(-1).cumsum(-1).flip(-1)
    return total if clock.inclusive else total - wide


def turn_gradient(
    rotation: Rotation, slots: Slots, tensor: Tensor, cos: Tensor, sin: Tensor
) -> dict[str, Tensor]:
    """Return gradients of the floating slots (not the basis) from full size ones of `Turn.cos`, `Turn.sin`.

    With a = orientation * n * theta: da = scale (cos a dsin - sin a dcos); dn = orientation * sum_j theta_j
    da_j and dtheta = orientation * n * da, summed over the axes that were broadcast.
    """
    if isinstance(rotation.clock, Tables):
        return turning_gradient(rotation, slots, tensor, (cos, sin))
    turned = turn(rotation, slots, tensor)
    return turning_gradient(rotation, slots, tensor, (turned.cos * sin - turned.sin * cos,))


def turning_gradient(
    rotation: Rotation, slots: Slots, tensor: Tensor, sums: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Return gradients of the floating slots from those of `Turn.cos` and `Turn.sin` for tables, else of a.

    They are [*shape[:-1], planes]; an axis that all slots share may be summed already.
    """
    clock = rotation.clock
    if isinstance(clock, Tables):
        cos, sin = sums
        parts = {clock.cos: rotation.scale * cos, clock.sin: rotation.scale * rotation.orientation * sin}
        return {
            name: part.sum_to_size(slots[name].shape).to(slots[name].dtype) for name, part in parts.items()
        }
    angle = rotation.orientation * sums[0]
    times, theta = _factors(rotation, slots, tensor)
    gradients = {}
    if isinstance(rotation.spectrum, Learned | Table):
        slot = slots[rotation.spectrum.slot]
        gradients[rotation.spectrum.slot] = (angle * times).sum_to_size(slot.shape).to(slot.dtype)
    if isinstance(clock, Positions | Accumulated) and slots[clock.slot].is_floating_point():
        gradients[clock.slot] = _clock_gradient(rotation, slots[clock.slot], angle * theta)
    return gradients


def _clock_gradient(rotation: Rotation, positions: Tensor, product: Tensor) -> Tensor:
    axes = rotation.planes.axis_count
    if axes == 1:
        summed = product.sum(-1).sum_to_size(positions.shape)
    else:
        members = [[j for j, axis in enumerate(rotation.planes.axes()) if axis == at] for at in range(axes)]
        parts = [sum_planes(product, planes).sum_to_size(positions.shape[1:]) for planes in members]
        summed = torch.stack(parts)
    return accumulate_gradient(rotation.clock, summed).to(positions.dtype)


def sum_planes(product: Tensor, planes: list[int]) -> Tensor:
    """Return the sum of `product` over some of its last axis; zero for none."""
    chosen = constant(planes, torch.int64, product)
    return product.index_select(-1, chosen).sum(-1)
