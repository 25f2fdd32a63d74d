"""`grape::attend`: attention whose logits carry the bias of an encoding, computed by a provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Encoding, Nope, Rotation
from grape_compile.errors import OperandError
from grape_compile.operators.batching import attend_vmap, backward_vmap
from grape_compile.operators.bias import slots_gradient
from grape_compile.operators.call import attend_call
from grape_compile.operators.chunked import empty_result
from grape_compile.operators.operands import parse_encoding, slot_list, slot_mapping
from grape_compile.operators.providers import choose
from grape_compile.operators.rotation import rotate

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor[] slots, str encoding, Tensor? mask=None, "
    "bool is_causal=False, float? scale=None, int? window=None) -> (Tensor output, Tensor logsumexp)"
)
BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
    "Tensor[] slots, str encoding, Tensor? mask, bool is_causal, float? scale, int? window, "
    "bool bias_gradient, bool mask_gradient) -> Tensor[]"
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoding: Encoding,
    slots: Mapping[str, Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return softmax(scale q k^T + bias + mask) v with the bias of `encoding` (GRAPE 4.2), in blocks.

    `query` [B, H, T_q, D], `key` [B, H_kv, T_k, D], `value` [B, H_kv, T_k, D_v], H a multiple of H_kv, one
    dtype; result [B, H, T_q, D_v]. The queries are the last T_q keys. `mask` broadcasts to [B, H, T_q, T_k]:
    bool, True where a key may be seen, or a float that is added. `is_causal` hides the future, `window` all
    but the last `window` keys. `scale` is 1/sqrt(D) by default. The rotations of a `Compose` turn queries and
    keys first. Logits and softmax are float32 (float64 for float64). A row without any key gives zero.
    Differentiable once, in the tensors, a float mask and every floating slot. Raises OperandError for
    operands that do not fit.
    """
    given = {} if slots is None else slots
    parts = _parts(encoding)
    biases = [part for part in parts if not isinstance(part, Rotation)]
    if len(biases) > 1:
        raise OperandError(
            "attention", f"{len(biases)} biases in {encoding}", "one bias, and any number of rotations"
        )
    bias = biases[0] if biases else Nope()
    for rotation in parts:
        if isinstance(rotation, Rotation):
            query, key = _turned_pair(query, key, rotation, given)
    text = str(bias) if biases else "nope"
    operands = slot_list(bias, given)
    output, _ = torch.ops.grape.attend(query, key, value, operands, text, mask, is_causal, scale, window)
    return cast(Tensor, output)


def _parts(encoding: Encoding) -> list[Encoding]:
    """Return the rotations and biases of an encoding in their order.

    The parts themselves, not canonical ones: Dynamo can print a value it was given, but not one made while
    tracing.
    """
    if isinstance(encoding, Compose):
        return [leaf for part in encoding.parts for leaf in _parts(part)]
    return [] if isinstance(encoding, Nope) else [encoding]


def _turned_pair(
    query: Tensor, key: Tensor, rotation: Rotation, slots: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Turn keys and queries of one sequence; its last T_q tokens are the queries."""
    queries, before = query.shape[-2], key.shape[-2] - query.shape[-2]
    if before < 0:
        raise OperandError(
            f"{rotation} of queries and keys",
            f"{queries} queries over {key.shape[-2]} keys",
            "at most as many queries",
        )
    whole = torch.nn.functional.pad(query, (0, 0, before, 0))
    turned_query, turned_key = rotate([whole, key], rotation, slots)
    return turned_query[..., before:, :], turned_key


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: list[Tensor],
    encoding: str,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    call = attend_call(query, key, value, slots, parse_encoding(encoding), mask, is_causal, scale, window)
    with torch.autocast(query.device.type, enabled=False):
        return choose(call).kernel().forward(call)


def _attend_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: list[Tensor],
    encoding: str,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    call = attend_call(query, key, value, slots, parse_encoding(encoding), mask, is_causal, scale, window)
    return empty_result(call)


def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    slots: list[Tensor],
    encoding: str,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    bias_gradient: bool,
    mask_gradient: bool,
) -> list[Tensor]:
    """Return gradients of query, key, value, then slopes [B, H] and clock [A, B, T_k], then the mask."""
    call = attend_call(query, key, value, slots, parse_encoding(encoding), mask, is_causal, scale, window)
    call = replace(call, wants_bias_gradient=bias_gradient, wants_mask_gradient=mask_gradient)
    with torch.autocast(query.device.type, enabled=False):
        found = choose(call).kernel().backward(call, gradient, output, logsumexp)
    everything = (found.query, found.key, found.value, found.slopes, found.clock, found.mask)
    return [part for part in everything if part is not None]


def _attend_backward_fake(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    slots: list[Tensor],
    encoding: str,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    bias_gradient: bool,
    mask_gradient: bool,
) -> list[Tensor]:
    call = attend_call(query, key, value, slots, parse_encoding(encoding), mask, is_causal, scale, window)
    results = [query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)]
    if bias_gradient:
        clock = None if call.bias is None else call.bias.clock
        axes = 1 if clock is None else clock.shape[0]
        results.append(query.new_empty(query.shape[:2], dtype=call.dtype))
        results.append(query.new_empty((axes, query.shape[0], key.shape[2]), dtype=call.dtype))
    if mask_gradient and call.mask is not None:
        results.append(query.new_empty(call.mask.shape, dtype=call.dtype))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, slots, ctx.encoding, mask, ctx.is_causal, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.slot_count, ctx.has_mask = len(slots), mask is not None
    ctx.save_for_backward(query, key, value, *output, *slots, *(() if mask is None else (mask,)))


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, logsumexp, *rest = ctx.saved_tensors
    slots, mask = rest[: ctx.slot_count], rest[-1] if ctx.has_mask else None
    # The dispatcher drops arguments that have their default; a gradient is due for those that are left.
    needs = ctx.needs_input_grad
    slot_needs, mask_needs = needs[3], mask is not None and needs[5]
    found = torch.ops.grape.attend_backward(
        gradient,
        query,
        key,
        value,
        output,
        logsumexp,
        slots,
        ctx.encoding,
        mask,
        ctx.is_causal,
        ctx.scale,
        ctx.window,
        any(slot_needs),
        mask_needs,
    )
    encoding = parse_encoding(ctx.encoding)
    slot_gradients: list[Tensor | None] = [None] * len(slots)
    if any(slot_needs):
        assert isinstance(encoding, Bias), "only a bias has slots"
        named = slots_gradient(encoding, slot_mapping(encoding, slots), found[3], found[4])
        slot_gradients = [
            named.get(name) if need else None for name, need in zip(encoding.slots, slot_needs, strict=True)
        ]
    mask_gradient = found[-1].reshape(mask.shape).to(mask.dtype) if mask_needs and mask is not None else None
    return (*found[:3], slot_gradients, None, mask_gradient, None, None, None)[: len(needs)]


def _autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what autocast does: queries, keys and values in its dtype, as for torch's own attention."""

    def cast_and_attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        narrow = [part if part.dtype == torch.float64 else part.to(dtype) for part in (query, key, value)]
        with torch.autocast(device, enabled=False):
            return cast(tuple[Tensor, Tensor], torch.ops.grape.attend(*narrow, *rest))

    return cast_and_attend


_operator = torch.library.custom_op("grape::attend", _attend, mutates_args=(), schema=SCHEMA)
_operator.register_fake(_attend_fake)
_operator.register_autograd(_backward, setup_context=_setup_context)
_operator.register_vmap(attend_vmap)
_backward_operator = torch.library.custom_op(
    "grape::attend_backward", _attend_backward, mutates_args=(), schema=BACKWARD_SCHEMA
)
_backward_operator.register_fake(_attend_backward_fake)
_backward_operator.register_vmap(backward_vmap)
_library = torch.library.Library("grape", "FRAGMENT")
_library.impl("attend", _autocast("cpu"), "AutocastCPU")
_library.impl("attend", _autocast("cuda"), "AutocastCUDA")
