"""`grape::rotate_normed`: RMSNorm of queries and keys and their rotation in one pass (Qwen3, Gemma 3, OLMo 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from grape_compile.encoding import Multiplicative
from grape_compile.errors import OperandError
from grape_compile.operators import plain_turn
from grape_compile.operators.operands import check_device, check_floating, slot_list
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.rotation import turn_call
from grape_compile.operators.traced import decompose_when_compiled, define_for_transforms
from grape_compile.operators.turn_call import Norm, Place, TurnCall

SCHEMA = (
    "(Tensor[] tensors, Tensor[] weights, Tensor[] slots, str encoding, str place, float epsilon, float offset) "
    "-> Tensor[]"
)


def rotate_normed(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    encoding: Multiplicative,
    slots: Mapping[str, Tensor] | None = None,
    *,
    epsilon: float,
    place: Place = "before",
    offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """Return every tensor normalised and turned: R(x / sqrt(mean(x^2) + epsilon) * (weight + offset)).

    `place` "before" and "after" the rotation take the mean over each head, weights [D]; "across" takes it over all
    heads of tensors [..., H, T, D] before they turn, weights [H * D]. Gemma's weights have offset 1. As in `rotate`,
    everything is float32 (float64 for float64), rounded once, and differentiable in tensors, weights and slots.
    Raises OperandError for operands that do not fit.
    """
    named = slot_list(encoding, {} if slots is None else slots)
    return tuple(
        torch.ops.grape.rotate_normed(
            list(tensors), list(weights), named, str(encoding), place, float(epsilon), float(offset)
        )
    )


def normed_call(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    slots: Sequence[Tensor],
    encoding: str,
    place: str,
    epsilon: float,
    offset: float,
) -> TurnCall:
    """Check the operands of a call against each other, or raise OperandError."""
    call = turn_call(tensors, slots, encoding)
    if place not in ("before", "after", "across") or len(weights) != len(tensors):
        raise OperandError(
            "RMSNorm of tensors that turn",
            f"place {place!r}, {len(weights)} weights for {len(tensors)} tensors",
            'place "before", "after" or "across", and one weight for each tensor',
        )
    for tensor, weight in zip(tensors, weights, strict=True):
        check_floating("weight", weight)
        check_device("weight", weight, tensor)
        across = place == "across"
        size = tensor.shape[-1] * (tensor.shape[-3] if across and tensor.dim() > 2 else 1)
        if tuple(weight.shape) != (size,) or (across and tensor.dim() < 3):
            raise OperandError(
                f"RMSNorm {place} of a tensor of shape {tuple(tensor.shape)}",
                f"a weight of shape {tuple(weight.shape)}",
                f"a weight of shape {(size,)}",
            )
    return replace(call, norm=Norm(tuple(weights), epsilon, cast(Place, place), offset))


def _body(*operands: Any) -> list[Tensor]:
    call = normed_call(*operands)
    return choose_turn(call).turn_kernel().forward(call) if call.tensors else []


def _plain(*operands: Any) -> list[Tensor]:
    return plain_turn.forward(normed_call(*operands))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, weights, slots, *ctx.rest = inputs
    ctx.counts = len(tensors), len(weights)
    ctx.save_for_backward(*tensors, *weights, *slots)


def _backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    """Go back through the norm and the rotation one after the other; the rotation by its own operator."""
    one, two = ctx.counts[0], sum(ctx.counts)
    needs = [need for group in ctx.needs_input_grad[:3] for need in group]
    with torch.enable_grad():
        leaves = [
            saved.detach().requires_grad_(need and saved.is_floating_point())
            for saved, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        call = normed_call(leaves[:one], leaves[one:two], leaves[two:], *ctx.rest)
        results = _by_parts(call, leaves[two:])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(results, wanted, cotangents, allow_unused=True))
    gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return gradients[:one], gradients[one:two], gradients[two:], None, None, None, None


def _by_parts(call: TurnCall, slots: list[Tensor]) -> list[Tensor]:
    assert call.norm is not None
    heads, encoding = list(call.tensors), str(call.encoding)

    def norm(tensors: Sequence[Tensor]) -> list[Tensor]:
        assert call.norm is not None
        return [plain_turn.normalised(call.norm, tensor, number) for number, tensor in enumerate(tensors)]

    if call.norm.place == "after":
        turned = norm(torch.ops.grape.rotate(heads, slots, encoding))
    else:
        turned = torch.ops.grape.rotate(norm(heads), slots, encoding)
    return [each.to(tensor.dtype) for each, tensor in zip(turned, heads, strict=True)]


_operator = torch.library.custom_op("grape::rotate_normed", _body, mutates_args=(), schema=SCHEMA)
_operator.register_fake(_plain)
_operator.register_autograd(_backward, setup_context=_setup_context)
decompose_when_compiled(_operator, _body)
define_for_transforms(_operator, _plain)
