"""From a clock and a spectrum to cosines and sines, and gradients the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import Accumulated, Clock, Learned, Positions, Rotation, Steps, Table, Tables
from grape_compile.errors import OperandError
from grape_compile.operators.operands import check_broadcast, check_device, check_numbers, compute_dtype

Slots = Mapping[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """Cosine and sine of orientation * clock * theta, times scale: broadcastable to [*tensor.shape[:-1], planes]."""

    cos: Tensor
    sin: Tensor


def turn(rotation: Rotation, slots: Slots, tensor: Tensor) -> Turn:
    """Return the cosines and sines that turn `tensor`, in its compute dtype.

    The angle is one product of a position and a frequency (radians per position), both rounded to the compute dtype.
    Raises OperandError for slots that do not broadcast.
    """
    dtype = compute_dtype(tensor)
    if isinstance(rotation.clock, Tables):
        cos, sin = (
            _table(name, slots, tensor, rotation.planes.count, dtype)
            for name in (rotation.clock.cos, rotation.clock.sin)
        )
    else:
        angle = clock_values(rotation, slots, tensor) * frequencies(rotation, slots, tensor)
        cos, sin = angle.cos(), angle.sin()
    if rotation.orientation < 0:
        sin = -sin
    if rotation.scale != 1.0:
        cos, sin = cos * rotation.scale, sin * rotation.scale
    return Turn(cos, sin)


def frequencies(rotation: Rotation, slots: Slots, tensor: Tensor) -> Tensor:
    """Return theta in radians per position, [planes] or the shape of its slot, in the compute dtype of `tensor`."""
    spectrum, count = rotation.spectrum, rotation.planes.count
    if isinstance(spectrum, Learned | Table):
        return _table(spectrum.slot, slots, tensor, count, compute_dtype(tensor))
    assert spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
    return torch.tensor(spectrum.frequencies(count), dtype=compute_dtype(tensor), device=tensor.device)


def clock_values(rotation: Rotation, slots: Slots, tensor: Tensor) -> Tensor:
    """Return the time of every token with a last axis to broadcast against planes: [..., 1], or [..., planes] by axes."""
    clock, dtype = rotation.clock, compute_dtype(tensor)
    if isinstance(clock, Steps):
        if tensor.dim() < 2:
            raise OperandError(
                "steps along axis -2", f"a tensor of shape {tuple(tensor.shape)}", "a tensor [..., T, head_dim]"
            )
        return torch.arange(tensor.shape[-2], dtype=dtype, device=tensor.device).unsqueeze(-1)
    assert isinstance(clock, Positions | Accumulated)
    positions = slots[clock.slot]
    check_numbers(clock.slot, positions)
    check_device(clock.slot, positions, tensor)
    axes = rotation.planes.axis_count
    if axes == 1:
        check_broadcast(clock.slot, positions.shape, tensor.shape[:-1], "tensor.shape[:-1]")
        return accumulate(clock, positions.to(dtype), tensor.shape[-2:-1]).unsqueeze(-1)
    if positions.dim() == 0 or positions.shape[0] != axes:
        raise OperandError(
            f"{clock.slot} of {axes} axes",
            f"{clock.slot} has shape {tuple(positions.shape)}",
            f"a leading dimension of size {axes}",
        )
    check_broadcast(clock.slot, positions.shape[1:], tensor.shape[:-1], "tensor.shape[:-1]")
    moved = accumulate(clock, positions.to(dtype), tensor.shape[-2:-1]).movedim(0, -1)
    return torch.stack([moved[..., axis] for axis in rotation.planes.axes()], -1)


def accumulate(clock: Clock, rates: Tensor, length: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the running sum of the rates over their last axis where the clock is `Accumulated`, else the rates.

    Raises OperandError where the last axis is not the sequence: a running sum over a broadcast axis has no meaning.
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


def turn_gradient(rotation: Rotation, slots: Slots, tensor: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """Return gradients of the floating slots (basis aside) from those of `Turn.cos` and `Turn.sin`, full size.

    With a = orientation * n * theta: da = scale (cos a dsin - sin a dcos); dn = orientation * sum_j theta_j da_j and
    dtheta = orientation * n * da, summed over the axes that were broadcast.
    """
    clock = rotation.clock
    if isinstance(clock, Tables):
        parts = {clock.cos: rotation.scale * cos, clock.sin: rotation.scale * rotation.orientation * sin}
        return {name: part.sum_to_size(slots[name].shape).to(slots[name].dtype) for name, part in parts.items()}
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
    chosen = torch.tensor(planes, dtype=torch.int64, device=product.device)
    return product.index_select(-1, chosen).sum(-1)


def _table(name: str, slots: Slots, tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    table = slots[name]
    check_numbers(name, table)
    check_device(name, table, tensor)
    check_broadcast(name, table.shape, (*tensor.shape[:-1], count), "[*tensor.shape[:-1], planes]")
    return table.to(dtype)
