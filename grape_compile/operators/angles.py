"""From a clock and a spectrum to cosines and sines, and gradients the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import Accumulated, Clock, Learned, Positions, Rotation, Steps, Table, Tables
from grape_compile.errors import OperandError
from grape_compile.operators.constants import closed_form, constant, stored
from grape_compile.operators.operands import check_broadcast, check_device, check_numbers, compute_dtype

Slots = Mapping[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """Cosine and sine of orientation * clock * theta, times scale, for [*shape[:-1], planes]."""

    cos: Tensor
    sin: Tensor


def check_slots(rotation: Rotation, slots: Slots, tensor: Tensor) -> None:
    """Raise OperandError for slots that do not fit a tensor; the functions below take them as they are."""
    clock, spectrum, count = rotation.clock, rotation.spectrum, rotation.planes.count
    by_plane = (*clock.slots, *(spectrum.slots if spectrum is not None else ()))
    for name in by_plane:
        check_numbers(name, slots[name])
        check_device(name, slots[name], tensor)
    if isinstance(clock, Steps) and tensor.dim() < 2:
        raise OperandError(
            "steps along axis -2", f"a tensor of shape {tuple(tensor.shape)}", "a tensor [..., T, head_dim]"
        )
    if isinstance(clock, Positions | Accumulated):
        _check_positions(clock, slots[clock.slot], tensor, rotation.planes.axis_count)
        by_plane = by_plane[1:]
    for name in by_plane:
        check_broadcast(name, slots[name].shape, (*tensor.shape[:-1], count), "[*tensor.shape[:-1], planes]")


def turn(rotation: Rotation, slots: Slots, tensor: Tensor) -> Turn:
    """Return the cosines and sines that turn `tensor`, in its compute dtype.

    The angle is one product of a position and a frequency (radians per position), both rounded to the compute
    dtype.
    """
    dtype = compute_dtype(tensor)
    if isinstance(rotation.clock, Tables):
        cos, sin = slots[rotation.clock.cos].to(dtype), slots[rotation.clock.sin].to(dtype)
    else:
        angle = clock_values(rotation, slots, tensor) * frequencies(rotation, slots, tensor)
        cos, sin = stored(angle.cos()), stored(angle.sin())
    if rotation.orientation < 0:
        sin = -sin
    if rotation.scale != 1.0:
        cos, sin = cos * rotation.scale, sin * rotation.scale
    return Turn(cos, sin)


def same_turn(rotation: Rotation, tensor: Tensor, other: Tensor) -> bool:
    """Return whether `turn` is one and the same for two tensors: it sees no more of them than this."""
    return (
        compute_dtype(tensor) == compute_dtype(other)
        and tensor.device == other.device
        and (not isinstance(rotation.clock, Steps) or tensor.shape[-2] == other.shape[-2])
    )


def frequencies(rotation: Rotation, slots: Slots, tensor: Tensor) -> Tensor:
    """Return theta in radians per position, [planes] or the shape of its slot, in the compute dtype."""
    spectrum = rotation.spectrum
    if isinstance(spectrum, Learned | Table):
        return slots[spectrum.slot].to(compute_dtype(tensor))
    assert spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
    return closed_form(spectrum, rotation.planes.count, compute_dtype(tensor), tensor)


def clock_values(rotation: Rotation, slots: Slots, tensor: Tensor) -> Tensor:
    """Return the time of every token, [..., 1], or of every token and plane, [..., planes], by axes."""
    clock, dtype = rotation.clock, compute_dtype(tensor)
    if isinstance(clock, Steps):
        return torch.arange(tensor.shape[-2], dtype=dtype, device=tensor.device).unsqueeze(-1)
    assert isinstance(clock, Positions | Accumulated), "tables have no clock"
    times = accumulate(clock, slots[clock.slot].to(dtype), tensor.shape[-2:-1])
    if rotation.planes.axis_count == 1:
        return times.unsqueeze(-1)
    return torch.stack([times[axis] for axis in rotation.planes.axes()], -1)


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
    """Return the running sum of the rates over their last axis for `Accumulated`, else the rates.

    Raises OperandError where the last axis is not the sequence: a running sum over a broadcast axis has no
    meaning.
    """
    if not isinstance(clock, Accumulated):
        return rates
    if rates.shape[-1:] != tuple(length):
        raise OperandError(
            f"the running sum of {clock.slot} along a sequence of {tuple(length)}",
            f"{clock.slot} has shape {tuple(rates.shape)}",
            f"a last axis of {tuple(length)}: one rate for each token",
        )
    total = rates.cumsum(-1)
    return total if clock.inclusive else total - rates


def accumulate_gradient(clock: Clock, gradient: Tensor) -> Tensor:
    """Return the gradient of the rates from that of `accumulate`: the running sum from the end."""
    if not isinstance(clock, Accumulated):
        return gradient
    total = gradient.flip(-1).cumsum(-1).flip(-1)
    return total if clock.inclusive else total - gradient


def turn_gradient(
    rotation: Rotation, slots: Slots, tensor: Tensor, cos: Tensor, sin: Tensor
) -> dict[str, Tensor]:
    """Return gradients of the floating slots (not the basis) from full size ones of `Turn.cos`, `Turn.sin`.

    With a = orientation * n * theta: da = scale (cos a dsin - sin a dcos); dn = orientation * sum_j theta_j
    da_j and dtheta = orientation * n * da, summed over the axes that were broadcast.
    """
    clock = rotation.clock
    if isinstance(clock, Tables):
        parts = {clock.cos: rotation.scale * cos, clock.sin: rotation.scale * rotation.orientation * sin}
        return {
            name: part.sum_to_size(slots[name].shape).to(slots[name].dtype) for name, part in parts.items()
        }
    turned = turn(rotation, slots, tensor)
    angle = rotation.orientation * (turned.cos * sin - turned.sin * cos)
    gradients = {}
    spectrum = rotation.spectrum
    if isinstance(spectrum, Learned | Table):
        theta = slots[spectrum.slot]
        product = angle * clock_values(rotation, slots, tensor)
        gradients[spectrum.slot] = product.sum_to_size(theta.shape).to(theta.dtype)
    if isinstance(clock, Positions | Accumulated) and slots[clock.slot].is_floating_point():
        product = angle * frequencies(rotation, slots, tensor)
        gradients[clock.slot] = _clock_gradient(rotation, slots[clock.slot], product)
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
