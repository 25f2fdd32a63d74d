"""`grape::attend`: attention whose logits carry the bias of an encoding, computed by a provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Encoding, Nope, PathBias
from grape_compile.errors import OperandError
from grape_compile.operators import dense
from grape_compile.operators.batching import attend_vmap, backward_vmap
from grape_compile.operators.bias import pull
from grape_compile.operators.call import (
    AttendCall,
    check_tensors,
    checked_mask,
    checked_segments,
    checked_sinks,
)
from grape_compile.operators.chunked import empty_result
from grape_compile.operators.constants import Use, used_as
from grape_compile.operators.operands import compute_dtype, parse_encoding, slot_list, slot_mapping
from grape_compile.operators.prepare import (
    biases,
    floating,
    parts,
    turned,
    turned_keys,
    with_turned_queries,
)
from grape_compile.operators.providers import choose, turns_queries
from grape_compile.operators.traced import define_for_transforms

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor[] slots, str encoding, Tensor? mask=None, "
    "bool is_causal=False, float? scale=None, int? window=None, float? cap=None, Tensor? sinks=None, "
    "Tensor? segments=None) -> (Tensor output, Tensor logsumexp)"
)
BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
    "Tensor[] slots, str encoding, Tensor? mask, bool is_causal, float? scale, int? window, float? cap, "
    "Tensor? sinks, Tensor? segments, bool slot_gradients, bool mask_gradient) -> Tensor[]"
)
#: What stands behind the encoding in both schemas.
OPTIONS: Final = ("mask", "is_causal", "scale", "window", "cap", "sinks", "segments")

#: Up to here a compiler is given the definition on a CPU: dense logits.
FEW_QUERIES: Final = 4


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
    cap: float | None = None,
    sinks: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale q k^T + bias + mask) v with the biases of `encoding` (GRAPE 4, 5), in blocks.

    `query` [B, H, T_q, D], `key` [B, H_kv, T_k, D], `value` [B, H_kv, T_k, D_v], H a multiple of H_kv, one
    dtype; result [B, H, T_q, D_v]. The queries are the last T_q keys. The rotations of a `Compose` turn queries
    and keys first, by slots for all T_k tokens; its biases add up. Slots of a bias: slopes broadcast to [B, H],
    clocks are [T_k], [B, T_k] or [B, H, T_k], gates broadcast to [B, H, T_q] and [B, H, T_k], path operands to
    [B, H, T_q, dim] and [B, H, T_k, dim]. `mask` broadcasts to [B, H, T_q, T_k]: bool, True where a key may be
    seen, or a float that is added. `is_causal` hides the future, `window` all but the last `window` keys.
    `scale` is 1/sqrt(D) by default. A soft `cap` bends the scaled products before anything is added,
    cap tanh(scale q k^T / cap) (Gemma 2, 2.2). `sinks`, logits that broadcast to [B, H], are in the denominator
    of every row of their head and have no value (gpt-oss). `segments`, whole numbers [T_k] or [B, T_k], hide all keys
    but those of the query's own number: several sequences in one. Logits and softmax are float32 (float64 for
    float64); running sums of clocks are float64. A row without any key gives zero. Differentiable once, in the
    tensors, a float mask, the sinks and every floating slot. Raises OperandError for operands that do not fit.
    """
    operands = slot_list(encoding, {} if slots is None else slots)
    output, _ = torch.ops.grape.attend(
        query, key, value, operands, str(encoding), mask, is_causal, scale, window, cap, sinks, segments
    )
    return cast(Tensor, output)


def attend_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: list[Tensor],
    encoding: str,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    keeps_queries: bool = False,
) -> AttendCall:
    """Check the operands of a call against each other, turn queries and keys, or raise OperandError.

    With `keeps_queries` the call says how its queries turn, where it can.
    """
    check_tensors(query, key, value)
    if mask is not None:
        mask = checked_mask(mask, query, key)
    if window is not None and window < 1:
        raise OperandError("a window of keys", f"window = {window}", "a window of at least 1, or None")
    if cap is not None and not 0 < cap < math.inf:
        raise OperandError("a soft cap", f"cap = {cap}", "a positive number, or None")
    whole = parse_encoding(encoding)
    named = slot_mapping(whole, slots)
    turn = None
    if keeps_queries:
        query, key, turn = turned_keys(query, key, whole, named)
    else:
        query, key = turned(query, key, whole, named)
    return AttendCall(
        query,
        key,
        value,
        biases(whole, named, query, key, is_causal, mask is not None),
        mask,
        is_causal,
        1.0 / math.sqrt(max(query.shape[3], 1)) if scale is None else scale,
        window,
        cap,
        None if sinks is None else checked_sinks(sinks, query),
        None if segments is None else checked_segments(segments, query, key),
        turn,
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, slots: list[Tensor], encoding: str, *options: Any
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        keeps = turns_queries(query.device)
        call = attend_call(query, key, value, slots, encoding, *options, keeps_queries=keeps)
        provider = choose(call)
        return provider.kernel().forward(call if provider.turns_queries else with_turned_queries(call))


def attend_decomposition(
    query: Tensor, key: Tensor, value: Tensor, slots: list[Tensor], encoding: str, *options: Any
) -> tuple[Tensor, Tensor]:
    """Return what `grape::attend` computes, in plain ATen: all logits in memory, in the compute dtype."""
    with used_as(Use.DECOMPOSED):
        return _definition(query, key, value, slots, encoding, *options)


def _definition(
    query: Tensor, key: Tensor, value: Tensor, slots: list[Tensor], encoding: str, *options: Any
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return dense.forward(attend_call(query, key, value, slots, encoding, *options))


def _decodes(query: Tensor, *_: Any) -> bool:
    """Whether a call has so few queries that a compiler fuses its logits better than the blocks of a CPU body."""
    queries: int | torch.SymInt = query.shape[2]
    return query.device.type == "cpu" and not isinstance(queries, torch.SymInt) and queries <= FEW_QUERIES


def _attend_fake(
    query: Tensor, key: Tensor, value: Tensor, slots: list[Tensor], encoding: str, *options: Any
) -> tuple[Tensor, Tensor]:
    return empty_result(attend_call(query, key, value, slots, encoding, *options))


def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    slots: list[Tensor],
    encoding: str,
    *options: Any,
) -> list[Tensor]:
    """Return gradients of query, key and value, of the floating slots, of the mask (four axes); no rotations."""
    *given, slot_gradients, mask_gradient = options
    with torch.autocast(query.device.type, enabled=False):
        call = attend_call(query, key, value, slots, encoding, *given)
        call = replace(call, wants_bias_gradients=slot_gradients, wants_mask_gradient=mask_gradient)
        found = choose(call).kernel().backward(call, gradient, output, logsumexp)
    heads = zip((found.query, found.key, found.value), (query, key, value), strict=True)
    results = [_as_planned(gradient, like) for gradient, like in heads]
    if slot_gradients:
        results += _pulled(call, parse_encoding(encoding), slots, found.biases)
    return results if found.mask is None else [*results, found.mask]


def _pulled(
    call: AttendCall, encoding: Encoding, slots: list[Tensor], gradients: tuple[tuple[Tensor, ...], ...]
) -> list[Tensor]:
    """Return the gradients of the floating slots from those of the tensors of the biases made of them."""
    places = floating(slots)

    def made(*floats: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        filled = list(slots)
        for place, value in zip(places, floats, strict=True):
            filled[place] = value
        named = slot_mapping(encoding, filled)
        found = biases(encoding, named, call.query, call.key, call.is_causal, call.mask is not None)
        return tuple(tuple(bias.tensors().values()) for bias in found)

    # Compilers plan for the layout the fake kernel says.
    return [part.contiguous() for part in pull(made, [slots[place] for place in places], gradients)]


def _planned(heads: Tensor) -> Tensor:
    """Return memory for the gradient of heads: on a GPU it lies as they do, which is what a projection takes back."""
    return torch.empty_like(heads) if heads.is_cuda else heads.new_empty(heads.shape)


def _as_planned(gradient: Tensor, heads: Tensor) -> Tensor:
    """Return a gradient in the layout that compilers were told of; most kernels leave it so."""
    planned = _planned(heads)
    return gradient if gradient.stride() == planned.stride() else planned.copy_(gradient)


def _attend_backward_fake(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    slots: list[Tensor],
    encoding: str,
    *options: Any,
) -> list[Tensor]:
    mask, *_, slot_gradients, mask_gradient = options
    results = [_planned(each) for each in (query, key, value)]
    if slot_gradients:
        results += [slots[place].new_empty(slots[place].shape) for place in floating(slots)]
    if mask_gradient and mask is not None:
        four = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        results.append(query.new_empty(four, dtype=compute_dtype(query)))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, slots, ctx.encoding, mask, *ctx.numbers, sinks, segments = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, mask, sinks, segments, *slots)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, logsumexp, mask, sinks, segments, *slots = ctx.saved_tensors
    # The dispatcher drops arguments that have their default; a gradient is due for those that are left.
    needs = ctx.needs_input_grad
    slot_needs, mask_needs = needs[3], mask is not None and needs[5]
    whole = parse_encoding(ctx.encoding)
    named = slot_mapping(whole, slots)
    only = Compose(tuple(part for part in parts(whole) if isinstance(part, Bias | PathBias)) or (Nope(),))
    at = [whole.slots.index(name) for name in only.slots]
    turn = _Turn(query, key, whole, slots, needs[0] or needs[1], slot_needs)
    found = torch.ops.grape.attend_backward(
        gradient,
        *(turn.query, turn.key, value, output, logsumexp),
        [named[name] for name in only.slots],
        str(only),
        # A rotation keeps the head size, so the default scale is the same.
        *(mask, *ctx.numbers, sinks, segments),
        any(slot_needs[place] for place in at),
        mask_needs,
    )
    by_query, by_key, slot_gradients = turn.gradients(found[0], found[1])
    if any(slot_needs[place] for place in at):
        places = [place for place in at if slots[place].is_floating_point()]
        for place, part in zip(places, found[3:], strict=False):
            slot_gradients[place] = part if slot_needs[place] else None
    results: dict[str, Tensor | None] = dict.fromkeys(OPTIONS)
    if mask_needs:
        results["mask"] = found[-1].reshape(mask.shape).to(mask.dtype)
    if sinks is not None and needs[5 + OPTIONS.index("sinks")]:
        results["sinks"] = _sink_gradient(sinks, gradient, output, logsumexp)
    return (by_query, by_key, found[2], slot_gradients, None, *results.values())[: len(needs)]


def _sink_gradient(sinks: Tensor, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:
    """Return what a larger sink takes from all rows of its head: its weight times the sum of output and gradient."""
    wide = logsumexp.dtype
    taken = (gradient.to(wide) * output.to(wide)).sum(-1)
    weights = (sinks.to(wide)[..., None] - logsumexp).exp().nan_to_num(0.0)
    return -(weights * taken).sum(-1).sum_to_size(sinks.shape).to(sinks.dtype)


class _Turn:
    """Queries and keys turned once more for the backward pass, and the way back through the rotations."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        encoding: Encoding,
        slots: list[Tensor],
        heads_need: bool,
        slot_needs: Sequence[bool],
    ) -> None:
        rotations = [part for part in parts(encoding) if not isinstance(part, Bias | PathBias)]
        self.query, self.key, self.slot_count = query, key, len(slots)
        self.leaves: list[Tensor] = []
        if not rotations:
            return
        needed = [name for part in rotations for name in part.slots]
        self.places = [
            place for place, name in enumerate(encoding.slots) if slot_needs[place] and name in needed
        ]
        with torch.enable_grad():
            heads = [part.detach().requires_grad_() for part in (query, key)]
            floats = [slots[place].detach().requires_grad_() for place in self.places]
            filled = dict(zip(encoding.slots, slots, strict=True))
            filled |= {encoding.slots[place]: each for place, each in zip(self.places, floats, strict=True)}
            self.made = turned(heads[0], heads[1], encoding, filled)
        self.leaves = [*heads, *floats]
        self.query, self.key = (part.detach() for part in self.made)

    def gradients(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return the gradients of query, key and the rotations' slots from those of the turned heads."""
        slots: list[Tensor | None] = [None] * self.slot_count
        if not self.leaves:
            return query, key, slots
        found = torch.autograd.grad(self.made, self.leaves, (query, key), allow_unused=True)
        for place, part in zip(self.places, found[2:], strict=True):
            slots[place] = part
        return found[0], found[1], slots


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
define_for_transforms(_operator, _definition, when_compiled=_decodes)
_backward_operator = torch.library.custom_op(
    "grape::attend_backward", _attend_backward, mutates_args=(), schema=BACKWARD_SCHEMA
)
_backward_operator.register_fake(_attend_backward_fake)
_backward_operator.register_vmap(backward_vmap)
_library = torch.library.Library("grape", "FRAGMENT")
_library.impl("attend", _autocast("cpu"), "AutocastCPU")
_library.impl("attend", _autocast("cuda"), "AutocastCUDA")
