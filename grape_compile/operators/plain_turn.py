"""Turning tensors by plain torch operations: every encoding, every device, traceable and differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from grape_compile.operators.actions import action_of
from grape_compile.operators.angles import same_turn
from grape_compile.operators.turn_call import TurnCall


def supports(call: TurnCall) -> Literal[True] | str:
    """Every call."""
    return True


def forward(call: TurnCall) -> list[Tensor]:
    """Return every tensor turned; what several of them turn by is computed once."""
    action = action_of(call.encoding)
    results: list[Tensor] = []
    latest: tuple[Tensor, Any] | None = None
    for tensor in call.tensors:
        if latest is None or not same_turn(action.clock, tensor, latest[0]):
            latest = tensor, action.prepare(call.slots, tensor)
        results.append(action.act(latest[1], call.slots, tensor))
    return results


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
