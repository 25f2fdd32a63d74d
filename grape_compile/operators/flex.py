"""Attention on GPUs by torch's FlexAttention: for biases of one query and one key that are more than two terms.

Biases, mask and cap are a function of a scaled product, which torch compiles into its kernel at the first call of a
kind. Keys are hidden by -inf: no tile is left out. The way back is that of `chunked`: FlexAttention adds up the
gradients of what the function reads in no fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Signed
from grape_compile.operators import chunked
from grape_compile.operators.bias import Additive
from grape_compile.operators.call import AttendCall

#: Coordinates of the smallest head that FlexAttention multiplies.
LEAST_HEAD: Final = 16

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_Added = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

backward = chunked.backward


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls in 16 or 32 bits whose biases see one query and one key."""
    if find_spec("triton") is None:
        return "torch compiles it by Triton, which is not installed"
    if not all(isinstance(bias, Additive) for bias in call.biases):
        return "a path bias sees the keys between, not one query and one key"
    if call.query.dtype == torch.float64:
        return "float64 has no matrix instruction here"
    if 0 in call.query.shape or 0 in call.value.shape or 0 in call.key.shape:
        return "needs at least one element"
    if min(call.query.shape[3], call.value.shape[3]) < LEAST_HEAD:
        return f"heads of fewer than {LEAST_HEAD} coordinates"
    return True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    from torch.nn.attention.flex_attention import AuxRequest

    query, key, value = (part.detach() for part in (call.query, call.key, call.value))
    with torch.no_grad():
        output, found = _attention(query.device.type)(
            query,
            key,
            value,
            score_mod=score_of(call),
            scale=call.scale,
            enable_gqa=call.groups > 1,
            return_aux=AuxRequest(lse=True),
        )
        return call.with_sinks(output, found.lse)


@lru_cache(maxsize=2)
def _attention(device: str) -> Any:
    """Return FlexAttention as it runs on a kind of device: by a kernel of its own, or by its definition."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def score_of(call: AttendCall) -> Score:
    """Return the logit of a query and a key from their scaled product and numbers of batch, head, query and key."""
    added = [_bias(bias, call) for bias in call.biases if isinstance(bias, Additive)]
    cap, offset, window, is_causal = call.cap, call.offset, call.window, call.is_causal
    mask = None if call.mask is None else call.mask.detach().expand(*call.query.shape[:3], call.key.shape[2])
    segments = call.segments
    if segments is not None:
        segments = segments.expand(call.query.shape[0], -1)

    def score(product: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        logit = product if cap is None else cap * torch.tanh(product / cap)
        for bias in added:
            logit = logit + bias(b, h, t, j)
        if mask is not None and mask.dtype != torch.bool:
            logit = logit + mask[b, h, t, j].to(logit.dtype)
        elif mask is not None:
            logit = torch.where(mask[b, h, t, j], logit, -torch.inf)
        if is_causal:
            logit = torch.where(j <= t + offset, logit, -torch.inf)
        if window is not None:
            logit = torch.where(j > t + offset - window, logit, -torch.inf)
        if segments is not None:
            logit = torch.where(segments[b, t + offset] == segments[b, j], logit, -torch.inf)
        return logit

    return score


def _bias(bias: Additive, call: AttendCall) -> _Added:
    """Return slope * gate * distance of a query and a key by their numbers."""
    batch, heads = call.query.shape[:2]
    offset, is_signed = call.offset, isinstance(bias.distance, Signed)
    slopes = bias.slopes.detach().expand(batch, heads)
    clocks = [] if bias.clock is None else [axis.detach().expand(batch, heads, -1) for axis in bias.clock]
    by_query, by_key = (
        None if gate is None else gate.detach().expand(batch, heads, -1)
        for gate in (bias.gate_query, bias.gate_key)
    )

    def added(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Any:
        steep = slopes[b, h]
        if by_query is not None and by_key is not None:
            steep = steep * (by_query[b, h, t] + by_key[b, h, j])
        elif by_query is not None:
            steep = steep * by_query[b, h, t]
        elif by_key is not None:
            steep = steep * by_key[b, h, j]
        apart = [(clock[b, h, j] - clock[b, h, t + offset]).to(steep.dtype) for clock in clocks]
        if not apart:
            apart = [(j - t - offset).to(steep.dtype)]
        if is_signed:
            return steep * apart[0]
        if len(apart) == 1:
            return -steep * apart[0].abs()
        square = apart[0] * apart[0]
        for axis in apart[1:]:
            square = square + axis * axis
        return -steep * square.sqrt()

    return added
