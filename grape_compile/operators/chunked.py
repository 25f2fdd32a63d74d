"""Attention in plain torch, a few queries at a time: for every device, all of it in float32 or more.

Also what the fast providers fall back on for the rows that need the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from grape_compile.operators.call import AnyBias, AttendCall, Gradients, cut, sum_heads

#: A row whose best logit is below this has been pushed down by a mask: the sum rounds away what its logits say, and a
#: logsumexp of that size could not give the weights back.
FAINT: Final = -64.0
#: Logits that may be in memory at once; several arrays of this size are alive in the backward pass.
MAX_LOGITS: Final = 1 << 22


def supports(call: AttendCall) -> Literal[True]:
    """Every call that passed its checks."""
    return True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = empty_result(call)
    for rows in row_chunks(call):
        weights = Weights(call, rows)
        output[:, :, rows] = weights.output()
        logsumexp[:, :, rows] = weights.logsumexp
    return output, logsumexp


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output; the weights are computed again."""
    sums = Sums(call)
    for rows in row_chunks(call):
        Weights(call, rows).add_gradients(gradient[:, :, rows], sums)
    return sums.gradients()


def without_faint_rows(
    call: AttendCall,
    gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    found: Callable[[Tensor], Gradients],
) -> Gradients:
    """Return the gradients that are `found` with the logsumexp that is handed over, and of faint rows those from here.

    A logsumexp of minus infinity leaves a row out.
    """
    faint = (logsumexp < FAINT) & (logsumexp > -torch.inf)
    if call.mask is None or call.mask.dtype == torch.bool or not bool(faint.any()):
        return found(logsumexp)
    ours = found(logsumexp.masked_fill(faint, -torch.inf))
    rest = backward(call, gradient.where(faint[..., None], 0.0), output, logsumexp)
    return Gradients(
        ours.query + rest.query,
        ours.key + rest.key,
        ours.value + rest.value,
        tuple(
            tuple(one + other for one, other in zip(*pair, strict=True))
            for pair in zip(ours.biases, rest.biases, strict=True)
        ),
    )


def empty_result(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Allocate output and logsumexp; the output lies in memory as [B, T_q, H, D_v], ready to join heads."""
    batch, heads, length, _ = call.query.shape
    output = call.query.new_empty(batch, length, heads, call.value.shape[3]).transpose(1, 2)
    return output, call.query.new_empty((batch, heads, length), dtype=call.dtype)


def row_chunks(call: AttendCall, rows: slice | None = None) -> Iterator[slice]:
    """Cut the queries, or some of them, so that the logits of a chunk stay below `MAX_LOGITS`."""
    batch, heads, length, _ = call.query.shape
    begin, end = (0, length) if rows is None else (rows.start, rows.stop)
    size = max(1, min(256, MAX_LOGITS // max(1, batch * heads * call.key.shape[2])))
    return (slice(start, min(start + size, end)) for start in range(begin, end, size))


class Sums:
    """Gradients of one call while its chunks are summed, in the compute dtype."""

    def __init__(self, call: AttendCall) -> None:
        self.call = call
        self.query = self._zeros(call.query.shape)
        self.key = self._zeros(call.keys.shape)
        self.value = self._zeros(call.values.shape)
        self.biases = [[torch.zeros_like(leaf) for leaf in bias.tensors().values()] for bias in call.biases]
        self.mask = (
            self._zeros(call.mask.shape) if call.mask is not None and call.wants_mask_gradient else None
        )

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return self.call.query.new_zeros(shape, dtype=self.call.dtype)

    def add_bias(self, number: int, parts: Sequence[Tensor]) -> None:
        """Add to the gradients of one bias."""
        for total, part in zip(self.biases[number], parts, strict=True):
            total += part

    def gradients(self) -> Gradients:
        """Round to the dtypes of the operands and sum over grouped heads."""
        call = self.call
        return Gradients(
            self.query.to(call.query.dtype),
            sum_heads(self.key, call.groups).to(call.key.dtype),
            sum_heads(self.value, call.groups).to(call.value.dtype),
            tuple(map(tuple, self.biases)) if call.wants_bias_gradients else (),
            self.mask,
        )


@dataclass(frozen=True)
class _Operands:
    query: Tensor
    key: Tensor
    value: Tensor


class Weights:
    """Softmax weights of some queries over the keys they may see, [B, H, rows, keys], compute dtype."""

    def __init__(self, call: AttendCall, rows: slice) -> None:
        self.call, self.rows, self.keys = call, rows, call.key_range(rows)
        dtype = call.dtype
        self.operands = _Operands(
            call.query[:, :, rows].to(dtype),
            call.keys[:, :, self.keys].to(dtype),
            call.values[:, :, self.keys].to(dtype),
        )
        logits = call.capped((self.operands.query @ self.operands.key.mT).mul_(call.scale))
        self.steep = None if call.cap is None else 1.0 - (logits / call.cap).square_()
        added = call.logit_block(rows, self.keys)
        if added is not None:
            logits += added
        lowest = torch.finfo(dtype).min
        # A row without a key has no largest logit; with the lowest finite one its weights are zero.
        largest = (
            logits.amax(-1, keepdim=True).clamp_(min=lowest)
            if logits.shape[-1]
            else logits.new_full((*logits.shape[:-1], 1), lowest)
        )
        sinks = None if call.sinks is None else call.sinks[..., None, None]
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        weights = logits.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks - largest).exp_()
        self.logsumexp = (largest + total.log()).squeeze(-1)
        self.weights = weights.div_(torch.where(total == 0, 1.0, total))

    def output(self) -> Tensor:
        """Return weights @ values, [B, H, rows, D_v], in the compute dtype."""
        return self.weights @ self.operands.value

    def add_gradients(self, cotangent: Tensor, sums: Sums) -> None:
        """Add what these rows contribute to all gradients; cotangent of their output [B, H, rows, D_v]."""
        call, wide = self.call, cotangent.to(self.call.dtype)
        sums.value[:, :, self.keys] += self.weights.mT @ wide
        logits = wide @ self.operands.value.mT
        logits -= (logits * self.weights).sum(-1, keepdim=True)
        logits *= self.weights
        products = logits if self.steep is None else logits * self.steep
        sums.query[:, :, self.rows] += (products @ self.operands.key).mul_(call.scale)
        sums.key[:, :, self.keys] += (products.mT @ self.operands.query).mul_(call.scale)
        if sums.mask is not None:
            part = cut(cut(sums.mask, 2, self.rows), 3, self.keys)
            part += logits.sum_to_size(part.shape)
        if call.wants_bias_gradients:
            for number, bias in enumerate(call.biases):
                sums.add_bias(number, block_gradients(bias, logits, self.rows, self.keys, call.offset))


def block_gradients(
    bias: AnyBias, logits: Tensor, rows: slice, keys: slice, offset: int
) -> tuple[Tensor, ...]:
    """Return the gradients of a bias from those of a block of logits, [B, H, rows, keys]."""

    def form(held: AnyBias) -> Tensor:
        return held.block(rows, keys, offset).expand(logits.shape)

    return bias.pull(form, logits)
