"""Attention with a bias through the fused attention of the CPU, without a bias matrix.

The softmax of a query block is the merger of two softmaxes, through their logsumexp:

* its *past*, all keys before the block: there a signed bias is one number per key up to a constant of each
row,
  slope * (clock_j - clock_origin) with the origin at the block's first query, so the kernel reads a [H, keys]
  mask;
* its *diagonal*, the keys of the block itself, under the causal mask and one small matrix of slope * (j - t).

Biases formed relative to the block are as accurate as slope * (j - t) written out (a bias centred once for
the whole sequence has nine times the error). Keys so far in the past that their weights underflow are skipped
head by head. With a mask operand, a window, or a distance that is not signed, each block gets its own matrix.
The backward pass walks the same parts with the logsumexp of the whole row, as ring attention does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from grape_compile.operators import chunked
from grape_compile.operators.bias import is_signed
from grape_compile.operators.call import AttendCall, Gradients

#: Queries in a block: enough for the kernel's own tiles, few enough for a matrix [H, BLOCK, BLOCK].
BLOCK: Final = 256
#: Entries of a matrix of bias and mask in one part.
MAX_ENTRIES: Final = 1 << 23
#: An additive mask below this hides a key for good: no bias and no logit reach it.
HIDDEN: Final = -1e30
#: A row whose largest mask entry is below this is left to `chunked`: the sum rounds away what its logits
#: say, and a logsumexp of that size could not give the weights back.
FAINT: Final = -64.0

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls on the CPU whose gradients do not need the matrix of logit gradients."""
    if call.wants_mask_gradient:
        return "the gradient of a mask needs every logit's gradient"
    if call.wants_bias_gradient and not is_signed(call.bias):
        return "the gradient of an unsigned distance needs every logit's gradient"
    if call.wants_bias_gradient and call.query.dtype not in (torch.float32, torch.float64):
        return f"sums over keys would be rounded to {call.query.dtype}"
    if call.query.shape[3] == 0 or call.value.shape[3] == 0:
        return "heads of size 0"
    return True


@dataclass(frozen=True)
class Part:
    """One call of the kernel: some heads, some keys, the mask it reads, whether it is causal by itself.

    The kernel's logits are those of the definition plus `shift` [1 or B, H, rows] (None: zero), a constant of
    each row. `gone` is True for rows that see none of these keys (the kernel gives them a logsumexp of 0);
    None: no such row.
    """

    heads: slice
    keys: slice
    mask: Tensor | None
    causal: bool = False
    shift: Tensor | None = None
    gone: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Some queries and the parts whose merger is their softmax; the first part has all heads.

    `plain` leaves the block to `chunked`, as do no parts.
    """

    rows: slice
    parts: tuple[Part, ...]
    plain: bool = False


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    operands = Operands.of(call)
    for block in blocks(call):
        if block.plain or not block.parts:
            weights = chunked.Weights(call, block.rows)
            output[:, :, block.rows], logsumexp[:, :, block.rows] = weights.output(), weights.logsumexp
            continue
        merged, total = _merged(operands, block, call.scale)
        output[:, :, block.rows] = merged[..., : output.shape[-1]]
        logsumexp[:, :, block.rows] = total
    return output, logsumexp


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output, from its output and logsumexp."""
    operands = Operands.of(call, gradient, output)
    sums = chunked.Sums(call)
    for block in blocks(call):
        if block.plain or not block.parts:
            chunked.Weights(call, block.rows).add_gradients(gradient[:, :, block.rows], sums)
            continue
        total = logsumexp[:, :, block.rows]
        if any(part.gone is not None for part in block.parts):
            total = total.masked_fill(total == -math.inf, math.inf)  # no key: weights exp(logit - inf) = 0
        for part in block.parts:
            _add_part(call, operands, block, part, total, sums)
    return sums.gradients()


@dataclass(frozen=True)
class Operands:
    """The tensors as the kernel wants them: one head size, repeated key heads, contiguous heads.

    For gradients of the bias the heads have one more coordinate, 1/scale in the queries and 0 in the keys:
    the kernel then returns the sum of the logit gradients of each key as the gradient of that coordinate.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None = None
    output: Tensor | None = None

    @staticmethod
    def of(call: AttendCall, gradient: Tensor | None = None, output: Tensor | None = None) -> Operands:
        """Pad the operands of a call, and of its backward call, to one head size."""
        extra = 1 if call.wants_bias_gradient else 0
        size = max(call.query.shape[3] + extra, call.value.shape[3])
        query = _padded(call.query, size)
        if extra:
            query[..., call.query.shape[3]] = 1.0 / call.scale
        return Operands(
            query,
            _padded(call.keys, size),
            _padded(call.values, size),
            None if gradient is None else _padded(gradient, size),
            None if output is None else _padded(output, size),
        )


def blocks(call: AttendCall) -> Iterator[Block]:
    """Cut a call into query blocks and each block into parts."""
    if call.mask is not None or call.window is not None or not is_signed(call.bias):
        return _masked_blocks(call)
    if call.is_causal and call.query.shape[2] > 1:
        return _causal_blocks(call)
    return _open_blocks(call)


def _open_blocks(call: AttendCall) -> Iterator[Block]:
    """All queries see all keys, or there is one query: one number per key, relative to the last key."""
    batch, heads, queries, _ = call.query.shape
    rows, keys = slice(0, queries), slice(0, call.key.shape[2])
    if 0 in (batch, heads, queries, keys.stop):
        yield Block(rows, ())
        return
    yield Block(rows, (_key_part(call, rows, keys, keys.stop - 1, None),))


def _causal_blocks(call: AttendCall) -> Iterator[Block]:
    batch, heads, queries, _ = call.query.shape
    size = queries if call.bias is None else min(BLOCK, queries)
    first = max(0, -call.offset)
    if 0 in (batch, heads, queries):
        return
    if first:
        yield Block(slice(0, min(first, queries)), ())
    everyone = slice(0, heads)
    square = None
    if call.bias is not None and call.bias.clock is None:
        square = call.bias.block(slice(0, size), slice(0, size))
    reaches = _reaches(call)
    for start in range(first, queries, size):
        rows = slice(start, min(start + size, queries))
        at = slice(rows.start + call.offset, rows.stop + call.offset)
        length = at.stop - at.start
        diagonal, shift = None, None
        if square is not None:
            diagonal = square[..., :length, :length]
        elif call.bias is not None:
            diagonal = call.bias.block(at, at)
        parts = [Part(everyone, at, diagonal, causal=True)]
        if call.bias is not None and at.start:
            shift = call.bias.by_key(at, at.start)
        for some, begin in _head_runs(reaches, at.start):
            keys = slice(begin, at.start)
            if call.bias is None or shift is None:
                parts.append(Part(some, keys, None))
                continue
            mask = call.bias.by_key(keys, at.start)[:, some].unsqueeze(2)
            parts.append(Part(some, keys, mask, shift=shift[:, some]))
        yield Block(rows, tuple(parts))


def _reaches(call: AttendCall) -> list[float]:
    """Return for each head how many steps back a key can be and still have a weight that does not underflow.

    A weight is at most exp(2 scale max|q| max|k| - slope * steps) of the largest in its row; below the
    smallest normal number it is zero to every digit of a sum that is at least 1. Only steps with positive
    slopes are bounded.
    """
    heads = call.query.shape[1]
    unbounded = [math.inf] * heads
    if call.bias is None or call.bias.clock is not None or call.key.shape[2] <= BLOCK:
        return unbounded
    depth = -math.log(torch.finfo(call.dtype).tiny)
    slopes = call.bias.slopes.amin(0)
    if depth / max(float(slopes.max()), 1e-30) > call.key.shape[2]:
        return unbounded
    norms = [
        torch.linalg.vector_norm(part, dim=-1, dtype=call.dtype).amax((0, 2))
        for part in (call.query, call.keys)
    ]
    largest = 2 * abs(call.scale) * norms[0] * norms[1]
    reach = torch.where(slopes > 0, (largest + depth) / slopes, math.inf)
    return [math.inf if math.isnan(steps) else steps for steps in reach.tolist()]


def _head_runs(reaches: list[float], stop: int) -> Iterator[tuple[slice, int]]:
    """Group neighbouring heads with the same past: (heads, first key), first keys rounded down to blocks."""
    begins = [0 if reach >= stop else (stop - math.ceil(reach)) // BLOCK * BLOCK for reach in reaches]
    start = 0
    for head in range(1, len(begins) + 1):
        if head == len(begins) or begins[head] != begins[start]:
            if begins[start] < stop:
                yield slice(start, head), begins[start]
            start = head


def _masked_blocks(call: AttendCall) -> Iterator[Block]:
    """Each block reads its part of the mask: a matrix, or one number per key where all rows agree."""
    batch, heads, queries, _ = call.query.shape
    size = max(1, min(BLOCK, MAX_ENTRIES // max(1, batch * heads * call.key.shape[2])))
    for start in range(0, queries, size):
        yield _masked_block(call, slice(start, min(start + size, queries)))


def _masked_block(call: AttendCall, rows: slice) -> Block:
    keys = call.key_range(rows)
    if keys.start >= keys.stop or 0 in call.query.shape[:2]:
        return Block(rows, ())
    mask = call.mask_block(rows, keys)
    if mask is None:
        return Block(rows, (_matrix_part(call, rows, keys, None),))
    mask = mask.expand(*mask.shape[:3], keys.stop - keys.start)
    largest = mask.amax(-1)
    # One look decides the usual case: every row has a key that is not pushed down, so none is faint or gone.
    usual = float(largest.min()) >= FAINT
    if not usual and bool(((largest < FAINT) & (largest > -math.inf)).any()):
        return Block(rows, (), plain=True)
    if keys.stop - keys.start > BLOCK:
        mask, keys = _trimmed(mask, keys)
    if not is_signed(call.bias):
        return Block(rows, (_matrix_part(call, rows, keys, mask),))
    if mask.shape[2] == 1:
        return Block(rows, (_key_part(call, rows, keys, keys.stop - 1, mask),))
    start = rows.start + call.offset
    past = min(max(start, keys.start), keys.stop) - keys.start
    if not past or not bool((mask[..., :past] == mask[..., :1, :past]).all()):
        return Block(rows, (_matrix_part(call, rows, keys, mask),))
    before, after = slice(keys.start, keys.start + past), slice(keys.start + past, keys.stop)
    parts = [_matrix_part(call, rows, after, mask[..., past:])] if after.start < after.stop else []
    return Block(rows, (*parts, _key_part(call, rows, before, start, mask[..., :1, :past])))


def _trimmed(mask: Tensor, keys: slice) -> tuple[Tensor, slice]:
    """Leave out keys at both ends that no row sees."""
    seen = (mask.amax((0, 1, 2)) > HIDDEN).nonzero()
    if not len(seen):
        return mask, keys
    inner = slice(int(seen[0]), int(seen[-1]) + 1)
    return mask[..., inner], slice(keys.start + inner.start, keys.start + inner.stop)


def _matrix_part(call: AttendCall, rows: slice, keys: slice, mask: Tensor | None) -> Part:
    """Return a part that reads bias + mask as a matrix [1 or B, 1 or H, rows, keys]."""
    matrix = mask
    if call.bias is not None:
        bias = call.bias.block(slice(rows.start + call.offset, rows.stop + call.offset), keys)
        matrix = bias if mask is None else bias + mask
    return Part(slice(0, call.query.shape[1]), keys, matrix, gone=_gone(mask))


def _key_part(call: AttendCall, rows: slice, keys: slice, origin: int, mask: Tensor | None) -> Part:
    """Return a part that reads bias + mask as one number per key, [1 or B, 1 or H, 1, keys]."""
    shift = None
    gone = _gone(mask)
    if call.bias is not None:
        bias = call.bias.by_key(keys, origin).unsqueeze(2)
        mask = bias if mask is None else bias + mask
        shift = call.bias.by_key(slice(rows.start + call.offset, rows.stop + call.offset), origin)
    return Part(slice(0, call.query.shape[1]), keys, mask, shift=shift, gone=gone)


def _gone(mask: Tensor | None) -> Tensor | None:
    """Return True for rows that see none of the keys, [1 or B, 1 or H, 1 or rows]; None for no such row."""
    if mask is None:
        return None
    gone = mask.amax(-1) == -math.inf
    return gone if bool(gone.any()) else None


def _merged(operands: Operands, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """Return output and logsumexp of one block: the parts weighted by their share of the whole softmax."""
    rows, first, *others = block.rows, *block.parts
    output, total = _run(operands, rows, first, scale)
    for part in others:
        more, their = _run(operands, rows, part, scale)
        ours = total[:, part.heads]
        both = torch.logaddexp(ours, their)
        share = (their - both).exp_().unsqueeze(-1).to(output.dtype)
        if part.gone is not None:
            share.nan_to_num_(0.0)  # -inf of -inf: no key here, and none before
        target = output[:, part.heads]
        target.lerp_(more, share)
        ours.copy_(both)
    return output, total


def _run(operands: Operands, rows: slice, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    output, logsumexp = _flash(
        operands.query[:, part.heads, rows],
        operands.key[:, part.heads, part.keys],
        operands.value[:, part.heads, part.keys],
        0.0,
        part.causal,
        attn_mask=part.mask,
        scale=scale,
    )
    if part.shift is not None:
        logsumexp = logsumexp - part.shift
    return output, logsumexp if part.gone is None else logsumexp.masked_fill(part.gone, -math.inf)


def _add_part(
    call: AttendCall, operands: Operands, block: Block, part: Part, total: Tensor, sums: chunked.Sums
) -> None:
    rows, heads, keys = block.rows, part.heads, part.keys
    assert operands.gradient is not None, "a backward call has a cotangent"
    assert operands.output is not None, "a backward call has an output"
    logsumexp = total[:, heads] if part.shift is None else total[:, heads] + part.shift
    query, key, value = _flash_backward(
        operands.gradient[:, heads, rows],
        operands.query[:, heads, rows],
        operands.key[:, heads, keys],
        operands.value[:, heads, keys],
        operands.output[:, heads, rows],
        logsumexp,
        0.0,
        part.causal,
        attn_mask=part.mask,
        scale=call.scale,
    )
    head_dim, value_dim = call.query.shape[3], call.value.shape[3]
    sums.query[:, heads, rows] += query[..., :head_dim]
    sums.key[:, heads, keys] += key[..., :head_dim]
    sums.value[:, heads, keys] += value[..., :value_dim]
    if call.wants_bias_gradient:
        _add_bias_gradients(call, rows, part, key[..., head_dim], sums)


def _add_bias_gradients(
    call: AttendCall, rows: slice, part: Part, by_key: Tensor, sums: chunked.Sums
) -> None:
    """Add the gradients of slopes and clock from each key's sum of logit gradients, [B, heads, keys].

    The logit gradients of a row sum to zero over the parts of its block, so any constant of the row drops
    out: times count from the block's first query, which keeps the terms small.
    """
    bias, origin = call.bias, max(rows.start + call.offset, 0)
    assert bias is not None, "no bias has a gradient where there is none"
    since = (bias.times(part.keys) - bias.times(slice(origin, origin + 1)))[0].unsqueeze(1)
    sums.slopes[:, part.heads] += (by_key * since).sum(-1)
    sums.clock[0, :, part.keys] += (by_key * bias.slopes[:, part.heads, None]).sum(1)


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor whose last axis has `size` coordinates, zeros at the end, contiguous along it."""
    if tensor.shape[-1] < size:
        return torch.nn.functional.pad(tensor, (0, size - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
