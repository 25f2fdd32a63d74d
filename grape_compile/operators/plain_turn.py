"""Turning tensors by plain torch operations: every encoding, every device, traceable and differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grape_compile.operators.actions import action_of
from grape_compile.operators.angles import same_turn
from grape_compile.operators.operands import compute_dtype
from grape_compile.operators.turn_call import Norm, TurnCall


def supports(call: TurnCall, outputs: Sequence[Tensor] | None = None) -> Literal[True] | str:
    """Every call."""
    return True


def forward(call: TurnCall, outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return every tensor turned; what several of them turn by is computed once."""
    action = action_of(call.encoding)
    results: list[Tensor] = []
    latest: tuple[Tensor, Any] | None = None
    for number, tensor in enumerate(call.tensors):
        if latest is None or not same_turn(action.clock, tensor, latest[0]):
            latest = tensor, action.prepare(call.slots, tensor)
        before = (
            tensor
            if call.norm is None or call.norm.place == "after"
            else normalised(call.norm, tensor, number)
        )
        wide = tensor.to(compute_dtype(tensor)) if call.norm is not None and before is tensor else before
        turned = action.act(latest[1], call.slots, wide)
        if call.norm is not None and call.norm.place == "after":
            turned = normalised(call.norm, turned, number)
        results.append(turned.to(tensor.dtype))
    if outputs is None:
        return results
    for number, (output, result) in enumerate(zip(outputs, results, strict=True)):
        place = call.place(number)
        if place is None:
            output.copy_(result)
        else:
            output.index_copy_(-2, torch.where(place < 0, place + output.shape[-2], place), result)
    return list(outputs)


def normalised(norm: Norm, tensor: Tensor, number: int) -> Tensor:
    """Return tensor `number` of a call normalised, in the compute dtype."""
    wide = tensor.to(compute_dtype(tensor))
    weight = norm.weights[number].to(wide.dtype) + norm.offset
    if norm.place == "across":
        weight = weight.unflatten(0, (wide.shape[-3], 1, wide.shape[-1]))
    mean = wide.square().mean((-3, -1) if norm.place == "across" else -1, keepdim=True)
    return wide * torch.rsqrt(mean + norm.epsilon) * weight


def gradients(
    call: TurnCall, cotangents: Sequence[Tensor], *, of_tensors: bool
) -> tuple[list[Tensor] | None, dict[str, Tensor]]:
    """Return the gradients of the tensors (where asked) and of the floating slots, summed over the tensors."""
    action = action_of(call.encoding)
    total: dict[str, Tensor] = {}
    for tensor, cotangent in zip(call.tensors, cotangents, strict=True):
        for name, part in action.slots_gradient(call.slots, tensor, cotangent).items():
            total[name] = total[name] + part if name in total else part
    return action.pull_back(call.slots, cotangents) if of_tensors else None, total
