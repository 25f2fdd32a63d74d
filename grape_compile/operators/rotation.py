"""`grape::rotate`: the operator of a `Rotation`, for any number of tensors that turn by the same angles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from grape_compile.encoding import Compose, Encoding, Nope, Rotation
from grape_compile.errors import OperandError
from grape_compile.operators.angles import Slots, Turn, check_slots, same_turn, turn, turn_gradient
from grape_compile.operators.constants import Use, used_as
from grape_compile.operators.coordinates import put, take, take_rest
from grape_compile.operators.operands import (
    check_broadcast,
    check_device,
    check_floating,
    compute_dtype,
    parse_encoding,
    slot_list,
    slot_mapping,
)
from grape_compile.operators.traced import decompose_when_compiled

SCHEMA = "(Tensor[] tensors, Tensor[] slots, str encoding) -> Tensor[]"


def rotate(
    tensors: Sequence[Tensor], encoding: Encoding, slots: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Return every tensor turned by `encoding`: y = R(clock * theta) x (GRAPE 3.1), in new memory.

    `tensors` share their last axis, the head; all other axes broadcast against the slots, so [B, H, T, D] and
    [B, T, H, D] differ only in the shape of the positions ([B, 1, T] or [B, T, 1]; [A, ...] for A axes).
    `Steps` and `Accumulated` run along axis -2. Angles are radians, computed with one product in float32
    (float64 for float64), as are sine, cosine and rotation; the result is rounded once, to the dtype of its
    tensor. Differentiable in the tensors and in every floating slot. Raises OperandError for operands that do
    not fit the encoding.
    """
    given = {} if slots is None else slots
    if isinstance(encoding, Compose):
        turned = tuple(tensors)
        for part in encoding.parts:
            turned = rotate(turned, part, given)
        return turned
    if isinstance(encoding, Nope):
        return tuple(tensor.clone() for tensor in tensors)
    text = str(_rotation(encoding))
    return tuple(torch.ops.grape.rotate(list(tensors), slot_list(encoding, given), text))


def rotate_decomposition(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> list[Tensor]:
    """Return what `grape::rotate` computes, written in plain ATen without constant tensors.

    Give it to `ExportedProgram.run_decompositions` to leave no `grape::rotate` node behind
    (`decompositions()`).
    """
    with used_as(Use.DECOMPOSED):
        return _body(tensors, slots, encoding)


def rotated(tensors: Sequence[Tensor], encoding: Encoding, slots: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return what `rotate` returns, computed by plain torch operations: part of the body of another operator."""
    return tuple(_body(tensors, slot_list(encoding, slots), str(encoding)))


def _compiled(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> list[Tensor]:
    with used_as(Use.COMPILED):
        return _body(tensors, slots, encoding)


def _body(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> list[Tensor]:
    rotation = _rotation(parse_encoding(encoding))
    named = slot_mapping(rotation, slots)
    results: list[Tensor] = []
    latest: tuple[Tensor, Turn] | None = None
    for tensor in tensors:
        _check_tensor(tensor, rotation)
        check_slots(rotation, named, tensor)
        if latest is None or not same_turn(rotation, tensor, latest[0]):
            latest = tensor, turn(rotation, named, tensor)
        results.append(_turned(tensor, latest[1], rotation, named))
    return results


def transpose(rotation: Rotation) -> Rotation:
    """Return the rotation with the transposed matrix: angle negated, planes and out exchanged, same scale.

    The basis is left out: it acts before the rotation, so its transpose acts after the result.
    """
    return replace(replace(rotation, basis=None).inverse(), scale=rotation.scale)


def _turned(tensor: Tensor, turned: Turn, rotation: Rotation, slots: Slots) -> Tensor:
    source = tensor if rotation.basis is None else _in_basis(tensor, rotation.basis, slots)
    first, second = (part.to(compute_dtype(tensor)) for part in take(source, rotation.planes))
    out_first = first * turned.cos - second * turned.sin
    out_second = second * turned.cos + first * turned.sin
    rest = [piece.to(tensor.dtype) for piece in take_rest(source, rotation.planes)]
    return put(out_first.to(tensor.dtype), out_second.to(tensor.dtype), rest, rotation.output)


def _in_basis(tensor: Tensor, name: str, slots: Slots) -> Tensor:
    """Return x E in the compute dtype; E is [D, D] or broadcasts as a matrix product against [..., T, D]."""
    basis, size = slots[name], tensor.shape[-1]
    check_floating(name, basis)
    check_device(name, basis, tensor)
    check_broadcast(name, basis.shape, (*tensor.shape[:-2], size, size), "[..., head_dim, head_dim]")
    if basis.dim() < 2 or basis.shape[-1] != size or basis.shape[-2] != size:
        raise OperandError(
            f"{name} as a matrix", f"{name} has shape {tuple(basis.shape)}", f"[{size}, {size}]"
        )
    dtype = compute_dtype(tensor)
    with torch.autocast(tensor.device.type, enabled=False):
        return tensor.to(dtype) @ basis.to(dtype)


def _rotation(encoding: Encoding) -> Rotation:
    if not isinstance(encoding, Rotation):
        raise OperandError(
            "grape::rotate", f"the encoding {encoding}", "a rotation; a bias acts on logits, in grape::attend"
        )
    return encoding


def _check_tensor(tensor: Tensor, rotation: Rotation) -> None:
    check_floating("the tensor to rotate", tensor)
    if tensor.dim() == 0 or tensor.shape[-1] != rotation.head_dim:
        raise OperandError(
            f"a rotation of heads of {rotation.head_dim} coordinates",
            f"a tensor of shape {tuple(tensor.shape)}",
            f"a last axis of size {rotation.head_dim}, or planes partial(planes, start, size)",
        )


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], str], output: list[Tensor]) -> None:
    tensors, slots, encoding = inputs
    ctx.encoding, ctx.tensor_count = encoding, len(tensors)
    # The tensors themselves matter only to the gradients of the slots.
    ctx.keeps_tensors = any(slot.requires_grad for slot in slots)
    ctx.save_for_backward(*slots, *(tensors if ctx.keeps_tensors else ()))


def _backward(ctx: Any, cotangents: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None], None]:
    rotation = cast(Rotation, parse_encoding(ctx.encoding))
    names = rotation.slots
    saved = ctx.saved_tensors
    named = dict(zip(names, saved[: len(names)], strict=True))
    tensor_needs, slot_needs, _ = ctx.needs_input_grad
    tensor_gradients: list[Tensor | None] = [None] * ctx.tensor_count
    if any(tensor_needs):
        tensor_gradients = list(tensors_gradient(rotation, named, cotangents))
    slot_gradients: dict[str, Tensor] = {}
    if any(slot_needs):
        for tensor, cotangent in zip(saved[len(names) :], cotangents, strict=True):
            for name, part in slots_gradient(rotation, named, tensor, cotangent).items():
                slot_gradients[name] = slot_gradients[name] + part if name in slot_gradients else part
    wanted = [
        slot_gradients.get(name) if needed else None for name, needed in zip(names, slot_needs, strict=True)
    ]
    return tensor_gradients, wanted, None


def tensors_gradient(rotation: Rotation, slots: Slots, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Return the cotangents times the transposed matrix, scale R^T E^T: turned by the opposite angle."""
    back = transpose(rotation)
    basis = None if rotation.basis is None else slots[rotation.basis]
    if basis is None:
        return list(torch.ops.grape.rotate(list(cotangents), slot_list(back, slots), str(back)))
    wide = [cotangent.to(compute_dtype(cotangent)) for cotangent in cotangents]
    turned = torch.ops.grape.rotate(wide, slot_list(back, slots), str(back))
    with torch.autocast(basis.device.type, enabled=False):
        return [
            (gradient @ basis.to(gradient.dtype).mT).to(cotangent.dtype)
            for gradient, cotangent in zip(turned, cotangents, strict=True)
        ]


def slots_gradient(rotation: Rotation, slots: Slots, tensor: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the floating slots that come through one tensor.

    With h = x E and cotangent g: dcos_j = g0 h0 + g1 h1, dsin_j = g1 h0 - g0 h1 over the two coordinates of
    plane j, and dE = x^T (R^T g). Accumulated in the compute dtype, rounded once to the dtype of the slot.
    """
    dtype = compute_dtype(tensor)
    wide = cotangent.to(dtype)
    source = tensor if rotation.basis is None else _in_basis(tensor, rotation.basis, slots)
    first, second = (part.to(dtype) for part in take(source, rotation.planes))
    out_first, out_second = take(wide, rotation.output)
    cos = out_first * first + out_second * second
    sin = out_second * first - out_first * second
    gradients = turn_gradient(rotation, slots, tensor, cos, sin)
    if rotation.basis is not None:
        basis, back = slots[rotation.basis], transpose(rotation)
        (turned,) = torch.ops.grape.rotate([wide], slot_list(back, slots), str(back))
        with torch.autocast(basis.device.type, enabled=False):
            product = tensor.to(dtype).mT @ turned
        gradients[rotation.basis] = product.sum_to_size(basis.shape).to(basis.dtype)
    return gradients


def _vmap(
    info: Any, in_dims: tuple[list[int | None], list[int | None], None], *operands: Any
) -> tuple[list[Tensor], list[int]]:
    tensors, slots, encoding = operands
    tensor_dims, slot_dims, _ = in_dims
    rotation = _rotation(parse_encoding(encoding))
    results = []
    for tensor, dim in zip(tensors, tensor_dims, strict=True):
        front = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
        aligned = [
            slot if at is None else _align(slot.movedim(at, 0), name, rotation, front.dim())
            for slot, at, name in zip(slots, slot_dims, rotation.slots, strict=True)
        ]
        results.extend(torch.ops.grape.rotate([front], aligned, encoding))
    return results, [0] * len(results)


def _align(slot: Tensor, name: str, rotation: Rotation, rank: int) -> Tensor:
    """Return a slot whose batch axis 0 meets axis 0 of a tensor of `rank` axes when both are broadcast."""
    is_clock = name == getattr(rotation.clock, "slot", None)
    axes = is_clock and rotation.planes.axis_count > 1
    if axes:
        slot = slot.movedim(1, 0)
    lead = 2 if axes else 1
    wanted = rank - 1 if is_clock else rank
    missing = wanted + axes - slot.dim()
    return slot.reshape(*slot.shape[:lead], *(1,) * missing, *slot.shape[lead:])


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table for `ExportedProgram.run_decompositions` that writes `grape::rotate` in plain ATen."""
    return {torch.ops.grape.rotate.default: rotate_decomposition}


_operator = torch.library.custom_op("grape::rotate", _body, mutates_args=(), schema=SCHEMA)
_operator.register_fake(_body)
_operator.register_autograd(_backward, setup_context=_setup_context)
_operator.register_vmap(_vmap)
decompose_when_compiled(_operator, _compiled)
