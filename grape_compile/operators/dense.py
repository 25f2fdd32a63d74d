"""Attention with all logits in memory, in plain torch: what compilers fuse, and what transforms differentiate.

Query heads are rows of the product with the key head they share. The sum of biases and mask is what that product is
added to, so that Inductor keeps it a product: of one query it makes a reduction that is slower, except where keys are
cast on the way, which a product would want in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grape_compile.operators.call import AttendCall


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] of a call, and its logsumexp [B, H, T_q] without gradients."""
    logits = _logits(call)
    largest = _largest(logits.detach(), call)
    weights = (logits - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if call.sinks is not None:
        total = total + (call.sinks[..., None, None] - largest).exp()
    output = (_by_key_head(weights, call) @ call.value.to(call.dtype)).reshape(*call.query.shape[:3], -1)
    output = output / torch.where(total == 0, 1.0, total)
    return output.to(call.query.dtype), (largest + total.log()).squeeze(-1).detach()


def _largest(logits: Tensor, call: AttendCall) -> Tensor:
    """Return the largest logit of each row, a finite one: no gradient depends on it."""
    lowest = torch.finfo(call.dtype).min
    if not logits.shape[-1]:
        largest = logits.new_full((*logits.shape[:-1], 1), lowest)
    else:
        largest = logits.amax(-1, keepdim=True).clamp(min=lowest)
    return largest if call.sinks is None else torch.maximum(largest, call.sinks.detach()[..., None, None])


def _logits(call: AttendCall) -> Tensor:
    """Return scale q k^T + biases + mask, [B, H, T_q, T_k]; a cap bends the product alone."""
    added = call.logit_block(slice(0, call.query.shape[2]), slice(0, call.key.shape[2]))
    if call.cap is None:
        return _products(call, added)
    logits = call.cap * (_products(call, None) / call.cap).tanh()
    return logits if added is None else logits + added


def _products(call: AttendCall, added: Tensor | None) -> Tensor:
    """Return scale q k^T, with what is added to it."""
    shape = (*call.query.shape[:3], call.key.shape[2])
    query = _by_key_head(call.query.to(call.dtype), call)
    if call.key.dtype != call.dtype:
        products = (query @ call.key.to(call.dtype).mT).reshape(shape) * call.scale
        return products if added is None else products + added
    rows, keys = query.flatten(0, 1), call.key.mT.flatten(0, 1)
    if added is None:
        addend = query.new_zeros(()).expand(rows.shape[0], rows.shape[1], shape[3])
    else:
        addend = _by_key_head(added.expand(shape), call).flatten(0, 1)
    return torch.baddbmm(addend, rows, keys, alpha=call.scale).reshape(shape)


def _by_key_head(rows: Tensor, call: AttendCall) -> Tensor:
    """Return [B, H, T_q, ...] as [B, H_kv, groups * T_q, ...]."""
    return rows.reshape(rows.shape[0], call.key.shape[1], call.groups * rows.shape[2], rows.shape[3])
