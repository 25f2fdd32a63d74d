"""`grape::rotate`: the operator of all `Multiplicative` encodings, for tensors that turn alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Compose, Encoding, Multiplicative, Nope, Rotation
from grape_compile.errors import OperandError
from grape_compile.operators import plain_turn
from grape_compile.operators.action import Action
from grape_compile.operators.actions import action_of
from grape_compile.operators.constants import Use, used_as
from grape_compile.operators.operands import (
    check_floating,
    parse_encoding,
    slot_list,
    slot_mapping,
    slot_names,
)
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.traced import decompose_when_compiled, define_for_transforms
from grape_compile.operators.turn_call import TurnCall

SCHEMA = "(Tensor[] tensors, Tensor[] slots, str encoding) -> Tensor[]"


def rotate(
    tensors: Sequence[Tensor], encoding: Encoding, slots: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Return every tensor turned by `encoding`: y = exp(clock * X) x, X skew (GRAPE 2-3), in new memory.

    `tensors` share their last axis, the head; all other axes broadcast against the slots, so [B, H, T, D] and
    [B, T, H, D] differ only in the shape of the positions ([B, 1, T] or [B, T, 1]; [A, ...] for A axes).
    `Steps` and `Accumulated` run along axis -2. Angles are radians. A `Rotation` computes them with one product
    in float32 (float64 for float64), as it does sine and cosine; sums over tokens, float64 positions and the
    angles of generators stay float64. The tensors turn in float32 (float64 for float64) and are rounded once, to
    their own dtype.
    Differentiable in the tensors and in every floating slot. Raises OperandError for operands that do not fit
    the encoding.
    """
    given = {} if slots is None else slots
    if isinstance(encoding, Compose):
        turned = tuple(tensors)
        for part in encoding.parts:
            turned = rotate(turned, part, given)
        return turned
    if isinstance(encoding, Nope):
        return tuple(tensor.clone() for tensor in tensors)
    text = str(_multiplicative(encoding))
    return tuple(torch.ops.grape.rotate(list(tensors), slot_list(encoding, given), text))


def rotate_decomposition(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> list[Tensor]:
    """Return what `grape::rotate` computes, written in plain ATen without constant tensors.

    Give it to `ExportedProgram.run_decompositions` to leave no `grape::rotate` node behind
    (`decompositions()`).
    """
    with used_as(Use.DECOMPOSED):
        return _plain(tensors, slots, encoding)


def rotated(tensors: Sequence[Tensor], encoding: Encoding, slots: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return what `rotate` returns, computed by plain torch operations: part of the body of another operator."""
    return tuple(_plain(tensors, slot_list(encoding, slots), str(encoding)))


def _body(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> list[Tensor]:
    call = turn_call(tensors, slots, encoding)
    return choose_turn(call).turn_kernel().forward(call) if tensors else []


def _plain(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> list[Tensor]:
    return plain_turn.forward(turn_call(tensors, slots, encoding))


def turn_call(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> TurnCall:
    """Return a call of `grape::rotate`, its operands checked against each other, or raise OperandError."""
    turning = _turning(encoding)
    action, named = action_of(turning), slot_mapping(turning, slots)
    for tensor in tensors:
        _check_tensor(tensor, turning)
        action.check(named, tensor)
    return TurnCall(tuple(tensors), turning, named)


@lru_cache(maxsize=1024)
def _turning(text: str) -> Multiplicative:
    """Return the encoding of this text; OperandError for one that does not act on queries and keys."""
    return _multiplicative(parse_encoding(text))


def _multiplicative(encoding: Encoding) -> Multiplicative:
    if not isinstance(encoding, Multiplicative):
        raise OperandError(
            "grape::rotate", f"the encoding {encoding}", "a rotation; a bias acts on logits, in grape::attend"
        )
    return encoding


def _check_tensor(tensor: Tensor, encoding: Multiplicative) -> None:
    check_floating("the tensor to rotate", tensor)
    if tensor.dim() == 0 or tensor.shape[-1] != encoding.head_dim:
        partly = ", or planes partial(planes, start, size)" if isinstance(encoding, Rotation) else ""
        raise OperandError(
            f"a rotation of heads of {encoding.head_dim} coordinates",
            f"a tensor of shape {tuple(tensor.shape)}",
            f"a last axis of size {encoding.head_dim}{partly}",
        )


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], str], output: list[Tensor]) -> None:
    tensors, slots, encoding = inputs
    ctx.encoding, ctx.tensor_count = encoding, len(tensors)
    # The tensors themselves matter only to the gradients of the slots.
    ctx.keeps_tensors = any(slot.requires_grad for slot in slots)
    ctx.save_for_backward(*slots, *(tensors if ctx.keeps_tensors else ()))


def _backward(ctx: Any, cotangents: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None], None]:
    encoding = _turning(ctx.encoding)
    names = slot_names(encoding)
    saved = ctx.saved_tensors
    named = dict(zip(names, saved[: len(names)], strict=True))
    tensor_needs, slot_needs, _ = ctx.needs_input_grad
    of_tensors: Sequence[Tensor | None] | None = None
    of_slots: dict[str, Tensor] = {}
    if any(slot_needs):
        call = TurnCall(tuple(saved[len(names) :]), encoding, named)
        # Only torch operations can be differentiated again.
        kernel = plain_turn if torch.is_grad_enabled() else choose_turn(call).turn_kernel()
        of_tensors, of_slots = kernel.gradients(call, cotangents, of_tensors=any(tensor_needs))
    elif any(tensor_needs):
        of_tensors = action_of(encoding).pull_back(named, cotangents)
    wanted = [of_slots.get(name) if needed else None for name, needed in zip(names, slot_needs, strict=True)]
    return list(of_tensors or [None] * ctx.tensor_count), wanted, None


def _vmap(
    info: Any, in_dims: tuple[list[int | None], list[int | None], None], *operands: Any
) -> tuple[list[Tensor], list[int]]:
    tensors, slots, encoding = operands
    tensor_dims, slot_dims, _ = in_dims
    action = action_of(_turning(encoding))
    names = slot_names(action.encoding)
    results = []
    for tensor, dim in zip(tensors, tensor_dims, strict=True):
        front = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
        aligned = [
            slot if at is None else _align(slot.movedim(at, 0), name, action, front.dim())
            for slot, at, name in zip(slots, slot_dims, names, strict=True)
        ]
        results.extend(torch.ops.grape.rotate([front], aligned, encoding))
    return results, [0] * len(results)


def _align(slot: Tensor, name: str, action: Action, rank: int) -> Tensor:
    """Return a slot whose batch axis 0 meets axis 0 of a tensor of `rank` axes when both are broadcast."""
    is_clock = name == getattr(action.clock, "slot", None)
    axes = is_clock and action.axis_count > 1
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
_operator.register_fake(_plain)
_operator.register_autograd(_backward, setup_context=_setup_context)
_operator.register_vmap(_vmap)
decompose_when_compiled(_operator, _body)
define_for_transforms(_operator, _plain)
