"""Attention with signed biases through the fused attention of the CPU, without a bias matrix.

A signed bias is a sum of factors, a number of the query times a number of the key (`Additive.factors`). Where the
number of the query is one, the kernel reads the numbers of the keys as a mask of one row; the others are coordinates
added to the heads. What is left is a constant of each row, which only the logsumexp sees.

The softmax of a query block is the merger of two softmaxes, through their logsumexp:

* its *past*, all keys before the block, with factors whose times count from the block's first query: they are as
  accurate as slope * (j - t) written out (a bias centred once for the whole sequence has nine times the error);
* its *diagonal*, the keys of the block itself, under the causal mask, with one small matrix where no factor needs
  coordinates.

Keys whose weights underflow are skipped head by head. With a mask operand, a window, segments, or a distance that is
not signed, each block gets a matrix of its own. Sinks join the logsumexp of a finished row. The backward pass walks the
same parts with the logsumexp of the whole row, as ring attention does; the kernel returns the gradients of the
coordinates, and those are the gradients of the factors.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor

from grape_compile.operators import chunked
from grape_compile.operators.bias import Additive
from grape_compile.operators.blocks import Block, Part, blocks, of_heads, product_count
from grape_compile.operators.call import AttendCall, Gradients
from grape_compile.operators.operands import LOG2E

#: Heads with added coordinates have a multiple of this size: the kernel's products are slow on odd sizes.
ROUND: Final = 4

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls on the CPU whose gradients do not need the matrix of logit gradients."""
    if not all(isinstance(bias, Additive) for bias in call.biases):
        return "a path bias is no sum of factors"
    if call.cap is not None:
        return "a soft cap bends products, which the fused attention of the CPU does not"
    if call.wants_mask_gradient:
        return "the gradient of a mask needs every logit's gradient"
    if call.wants_bias_gradients and not call.is_signed:
        return "the gradient of an unsigned distance needs every logit's gradient"
    if call.query.shape[3] == 0 or call.value.shape[3] == 0:
        return "heads of size 0"
    return True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    operands = Operands(call)
    for block in blocks(call):
        if block.plain or not block.parts:
            weights = chunked.Weights(call, block.rows)
            output[:, :, block.rows], logsumexp[:, :, block.rows] = weights.output(), weights.logsumexp
            continue
        merged, total = call.with_sinks(*_merged(operands, block))
        output[:, :, block.rows] = merged[..., : output.shape[-1]]
        logsumexp[:, :, block.rows] = total
    return output, logsumexp


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output, from its output and logsumexp."""
    operands = Operands(call, gradient, output)
    sums = chunked.Sums(call)
    for block in blocks(call):
        if block.plain or not block.parts:
            chunked.Weights(call, block.rows).add_gradients(gradient[:, :, block.rows], sums)
            continue
        total = logsumexp[:, :, block.rows]
        if any(part.gone is not None for part in block.parts):
            total = total.masked_fill(total == -math.inf, math.inf)  # no key: weights exp(logit - inf) = 0
        _add_block(operands, block, total, sums)
    return sums.gradients()


class Operands:
    """The tensors as the kernel wants them: one head size, repeated key heads, contiguous heads.

    Behind the coordinates of the heads come those of the factors f g, f / scale in the query and g in the key, whose
    product is added to the logit. A backward call has two more: 1 / scale meets zero in the key and then in the query,
    which adds nothing, and whose gradients are the sums of the logit gradients of each key and of each query.
    """

    def __init__(
        self, call: AttendCall, gradient: Tensor | None = None, output: Tensor | None = None
    ) -> None:
        self.call, self.head = call, call.query.shape[3]
        self.products = product_count(call)
        self.extra = self.products + 2 * call.wants_bias_gradients
        size = max(self.head + self.extra, call.value.shape[3])
        if self.extra:
            size += -size % ROUND
        wide = call.dtype if self.extra else call.query.dtype
        self.query, self.key, self.value = (
            _padded(part, size, wide) for part in (call.query, call.keys, call.values)
        )
        self.gradient = None if gradient is None else _padded(gradient, size, wide)
        self.output = None if output is None else _padded(output, size, wide)
        if call.wants_bias_gradients:
            self.query[..., self.head + self.products] = 1.0 / call.scale
            self.key[..., self.head + self.products + 1] = 1.0 / call.scale

    def place(self, rows: slice, part: Part) -> None:
        """Write the coordinates of the factors for the queries and keys of a part."""
        if not self.products:
            return
        if part.whole:
            self.query[:, part.heads, rows, self.head : self.head + self.products] = 0.0
            return
        for at, factor in enumerate(part.factors, self.head):
            assert factor.by_query is not None, "a factor of the key alone is part of the mask"
            self.query[:, part.heads, rows, at] = of_heads(factor.by_query, part.heads) / self.call.scale
            self.key[:, part.heads, part.keys, at] = of_heads(factor.by_key, part.heads)


def _merged(operands: Operands, block: Block) -> tuple[Tensor, Tensor]:
    """Return output and logsumexp of one block: the parts weighted by their share of the whole softmax."""
    rows, first, *others = block.rows, *block.parts
    output, total = _run(operands, rows, first)
    for part in others:
        more, their = _run(operands, rows, part)
        ours = total[:, part.heads]
        both = torch.logaddexp(ours, their)
        share = (their - both).exp_().unsqueeze(-1).to(output.dtype)
        if part.gone is not None:
            share.nan_to_num_(0.0)  # -inf of -inf: no key here, and none before
        target = output[:, part.heads]
        target.lerp_(more, share)
        ours.copy_(both)
    return output, total


def _run(operands: Operands, rows: slice, part: Part) -> tuple[Tensor, Tensor]:
    operands.place(rows, part)
    output, logsumexp = _flash(
        operands.query[:, part.heads, rows],
        operands.key[:, part.heads, part.keys],
        operands.value[:, part.heads, part.keys],
        0.0,
        part.causal,
        attn_mask=part.mask,
        scale=operands.call.scale,
    )
    if part.shift is not None:
        logsumexp = logsumexp - part.shift
    return output, logsumexp if part.gone is None else logsumexp.masked_fill(part.gone, -math.inf)


def _add_block(operands: Operands, block: Block, total: Tensor, sums: chunked.Sums) -> None:
    """Add what a block contributes to all gradients; `total` is the logsumexp of its rows."""
    call, rows, head = operands.call, block.rows, operands.head
    assert operands.gradient is not None, "a backward call has a cotangent"
    assert operands.output is not None, "a backward call has an output"
    gathered = _Gathered(operands, block) if call.wants_bias_gradients else None
    for part in block.parts:
        heads, keys = part.heads, part.keys
        if gathered is not None and part.whole and not gathered.is_clocked:
            _add_whole(operands, rows, part, total, sums)
            continue
        operands.place(rows, part)
        query, key, value = _flash_backward(
            operands.gradient[:, heads, rows],
            operands.query[:, heads, rows],
            operands.key[:, heads, keys],
            operands.value[:, heads, keys],
            operands.output[:, heads, rows],
            total[:, heads] if part.shift is None else total[:, heads] + part.shift,
            0.0,
            part.causal,
            attn_mask=part.mask,
            scale=call.scale,
        )
        sums.query[:, heads, rows] += query[..., :head]
        sums.key[:, heads, keys] += key[..., :head]
        sums.value[:, heads, keys] += value[..., : call.value.shape[3]]
        if gathered is not None:
            gathered.add(part, query[..., head:], key[..., head:])
    if gathered is not None:
        gathered.pull(sums)


def _add_whole(operands: Operands, rows: slice, part: Part, total: Tensor, sums: chunked.Sums) -> None:
    """Add the gradients of a part whose biases are in its mask, by its logits themselves.

    As factors, times count from the first query of the block; close to the diagonal they are much larger than the
    distances that matter there, and sums over them would lose digits.
    """
    call, keys, dtype = operands.call, part.keys, operands.call.dtype
    assert operands.gradient is not None, "a backward call has a cotangent"
    assert operands.output is not None, "a backward call has an output"
    query, key = call.query[:, :, rows].to(dtype), call.keys[:, :, keys].to(dtype)
    cotangent, output = operands.gradient[:, :, rows], operands.output[:, :, rows]
    logits = (query @ key.mT).mul_(call.scale * LOG2E)
    if part.mask is not None:
        logits.add_(part.mask, alpha=LOG2E)
    weights = logits.sub_(total[..., None] * LOG2E).exp2_()
    if part.causal:
        weights.tril_()
    sums.value[:, :, keys] += (weights.mT @ cotangent)[..., : call.value.shape[3]]
    changes = (cotangent @ operands.value[:, :, keys].mT).sub_((cotangent * output).sum(-1, keepdim=True))
    changes.mul_(weights)
    sums.query[:, :, rows] += (changes @ key).mul_(call.scale)
    sums.key[:, :, keys] += (changes.mT @ query).mul_(call.scale)
    for number, bias in enumerate(call.biases):
        sums.add_bias(number, chunked.block_gradients(bias, changes, rows, keys, call.offset))


class _Gathered:
    """The gradients of the coordinates of one block, over its parts with factors, on their way into the biases.

    Sums of logit gradients are all that a clock needs, so where nothing else has a gradient (`is_clocked`) the parts
    whose biases are in their mask are among them.
    """

    def __init__(self, operands: Operands, block: Block) -> None:
        self.call, self.rows = operands.call, block.rows
        self.is_clocked = all(isinstance(bias, Additive) and bias.is_clocked for bias in self.call.biases)
        parts = [part for part in block.parts if self.is_clocked or not part.whole]
        spans = [(part.keys.start, part.keys.stop) for part in parts] or [(0, 0)]
        self.keys = slice(min(start for start, _ in spans), max(stop for _, stop in spans))
        batch, heads = self.call.query.shape[:2]
        lengths = block.rows.stop - block.rows.start, self.keys.stop - self.keys.start
        self.by_query, self.by_key = (
            operands.query.new_zeros(batch, heads, length, operands.extra) for length in lengths
        )

    def add(self, part: Part, query: Tensor, key: Tensor) -> None:
        """Add the gradients of the coordinates of some heads and keys."""
        extra, start = self.by_key.shape[3], self.keys.start
        self.by_query[:, part.heads] += query[..., :extra]
        self.by_key[:, part.heads, part.keys.start - start : part.keys.stop - start] += key[..., :extra]

    def pull(self, sums: chunked.Sums) -> None:
        """Add the gradients of the biases: those of their factors and of the constants of the rows, pulled back."""
        if self.keys.start == self.keys.stop:
            return
        at, plain = 0, product_count(self.call)
        for number, bias in enumerate(self.call.biases):
            assert isinstance(bias, Additive), "only sums of factors come here"
            found = bias.factors(self.rows, self.keys, self.call.offset)
            cotangents = [(-self.by_query[..., plain + 1]).sum_to_size(found.shift.shape)]
            for factor in found.parts:
                column = plain
                if factor.by_query is not None:
                    by_query = self.by_query[..., at] / self.call.scale
                    cotangents.append(by_query.sum_to_size(factor.by_query.shape))
                    column, at = at, at + 1
                cotangents.append(self.by_key[..., column].sum_to_size(factor.by_key.shape))
            sums.add_bias(number, bias.pull(self._numbers, tuple(cotangents)))

    def _numbers(self, bias: Additive) -> tuple[Tensor, ...]:
        found = bias.factors(self.rows, self.keys, self.call.offset)
        pairs = ((factor.by_query, factor.by_key) for factor in found.parts)
        return (found.shift, *(each for pair in pairs for each in pair if each is not None))


def _padded(tensor: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor whose last axis has `size` coordinates, zeros at the end, contiguous along it."""
    have = tensor.shape[-1]
    if have == size:
        narrow = tensor.to(dtype)
        return narrow if narrow.stride(-1) == 1 else narrow.contiguous()
    wide = tensor.new_empty((*tensor.shape[:-1], size), dtype=dtype)
    wide[..., :have] = tensor
    wide[..., have:] = 0.0
    return wide
