"""How a `Rotation` acts: coordinate planes turn by cosines and sines (GRAPE 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grape_compile.encoding import Clock, Rotation
from grape_compile.errors import OperandError
from grape_compile.operators.action import Action, Slots
from grape_compile.operators.angles import Turn, check_by_plane, check_clock, turn, turn_gradient
from grape_compile.operators.coordinates import put, take, take_rest
from grape_compile.operators.operands import (
    check_broadcast,
    check_device,
    check_floating,
    compute_dtype,
    slot_list,
)


@dataclass(frozen=True)
class Planar(Action):
    """y = R(clock * theta) (x E), planes put where `out` says."""

    encoding: Rotation

    @property
    def clock(self) -> Clock:
        return self.encoding.clock

    @property
    def axis_count(self) -> int:
        return self.encoding.planes.axis_count

    def check(self, slots: Slots, tensor: Tensor) -> None:
        rotation = self.encoding
        check_clock(rotation.clock, self.axis_count, slots, tensor)
        by_plane = rotation.clock.slots if rotation.spectrum is None else rotation.spectrum.slots
        check_by_plane(by_plane, rotation.planes.count, slots, tensor)
        if rotation.basis is not None:
            _check_basis(rotation.basis, slots[rotation.basis], tensor)

    def prepare(self, slots: Slots, tensor: Tensor) -> Turn:
        return turn(self.encoding, slots, tensor)

    def act(self, prepared: Turn, slots: Slots, tensor: Tensor) -> Tensor:
        rotation, source = self.encoding, self.in_basis(slots, tensor)
        first, second = (part.to(compute_dtype(tensor)) for part in take(source, rotation.planes))
        out_first = first * prepared.cos - second * prepared.sin
        out_second = second * prepared.cos + first * prepared.sin
        rest = [piece.to(tensor.dtype) for piece in take_rest(source, rotation.planes)]
        return put(out_first.to(tensor.dtype), out_second.to(tensor.dtype), rest, rotation.output)

    def pull_back(self, slots: Slots, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return the cotangents times the transposed matrix, scale R^T E^T: turned by the opposite angle."""
        back = transpose(self.encoding)
        if self.encoding.basis is None:
            return list(torch.ops.grape.rotate(list(cotangents), slot_list(back, slots), str(back)))
        basis = slots[self.encoding.basis]
        wide = [cotangent.to(compute_dtype(cotangent)) for cotangent in cotangents]
        turned = torch.ops.grape.rotate(wide, slot_list(back, slots), str(back))
        with torch.autocast(basis.device.type, enabled=False):
            return [
                (gradient @ basis.to(gradient.dtype).mT).to(cotangent.dtype)
                for gradient, cotangent in zip(turned, cotangents, strict=True)
            ]

    def slots_gradient(self, slots: Slots, tensor: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the floating slots that come through one tensor.

        With h = x E and cotangent g: dcos_j = g0 h0 + g1 h1, dsin_j = g1 h0 - g0 h1 over the two coordinates
        of plane j, and dE = x^T (R^T g). Accumulated in the compute dtype (sums of `Accumulated` in float64),
        rounded once to the dtype of the slot.
        """
        rotation, dtype = self.encoding, compute_dtype(tensor)
        wide = cotangent.to(dtype)
        first, second = (part.to(dtype) for part in take(self.in_basis(slots, tensor), rotation.planes))
        out_first, out_second = take(wide, rotation.output)
        cos = out_first * first + out_second * second
        sin = out_second * first - out_first * second
        gradients = turn_gradient(rotation, slots, tensor, cos, sin)
        return gradients | self.basis_gradient(slots, tensor, cotangent)

    def basis_gradient(self, slots: Slots, tensor: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the gradient x^T (R^T g) of the basis; nothing where there is none."""
        rotation, dtype = self.encoding, compute_dtype(tensor)
        if rotation.basis is None:
            return {}
        basis, back = slots[rotation.basis], transpose(rotation)
        (turned,) = torch.ops.grape.rotate([cotangent.to(dtype)], slot_list(back, slots), str(back))
        with torch.autocast(basis.device.type, enabled=False):
            product = tensor.to(dtype).mT @ turned
        return {rotation.basis: product.sum_to_size(basis.shape).to(basis.dtype)}

    def in_basis(self, slots: Slots, tensor: Tensor) -> Tensor:
        """Return x E in the compute dtype, or x where there is no basis."""
        if self.encoding.basis is None:
            return tensor
        dtype = compute_dtype(tensor)
        with torch.autocast(tensor.device.type, enabled=False):
            return tensor.to(dtype) @ slots[self.encoding.basis].to(dtype)


def transpose(rotation: Rotation) -> Rotation:
    """Return the rotation with the transposed matrix: angle negated, planes and out exchanged, same scale.

    The basis is left out: it acts before the rotation, so its transpose acts after the result.
    """
    return replace(replace(rotation, basis=None).inverse(), scale=rotation.scale)


def _check_basis(name: str, basis: Tensor, tensor: Tensor) -> None:
    """Raise OperandError unless E is [D, D] or broadcasts as a matrix product against [..., T, D]."""
    size = tensor.shape[-1]
    check_floating(name, basis)
    check_device(name, basis, tensor)
    check_broadcast(name, basis.shape, (*tensor.shape[:-2], size, size), "[..., head_dim, head_dim]")
    if basis.dim() < 2 or basis.shape[-1] != size or basis.shape[-2] != size:
        raise OperandError(
            f"{name} as a matrix", f"{name} has shape {tuple(basis.shape)}", f"[{size}, {size}]"
        )
