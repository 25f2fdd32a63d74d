"""How an attention call with signed biases is cut: into blocks of queries, and each block into parts of its keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from grape_compile.operators import chunked
from grape_compile.operators.bias import Additive, Factor
from grape_compile.operators.call import AttendCall

#: Queries in a block: enough for the kernel's own tiles, few enough for a matrix [H, BLOCK, BLOCK].
BLOCK: Final = 256
#: Entries of a matrix of bias and mask in one part.
MAX_ENTRIES: Final = 1 << 23
#: An additive mask below this hides a key for good: no bias and no logit reach it.
HIDDEN: Final = -1e30


@dataclass(frozen=True, eq=False)
class Part:
    """One call of the kernel: some heads, some keys, the mask it reads, whether it is causal by itself.

    The `factors` act as coordinates and the mask holds the rest of the biases, or with `whole` all of them, and the
    user's mask as it is. The kernel's logits are those of the
    definition plus `shift` [1 or B, 1 or H, rows] (None: zero), a constant of each row. `gone` is True for rows
    that see none of these keys (the kernel gives them a logsumexp of 0); None: no such row.
    """

    heads: slice
    keys: slice
    mask: Tensor | None
    causal: bool = False
    factors: tuple[Factor, ...] = ()
    whole: bool = False
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


def blocks(call: AttendCall) -> Iterator[Block]:
    """Cut a call into query blocks and each block into parts."""
    hides = call.mask is not None or call.window is not None or call.segments is not None
    if hides or not call.is_signed:
        return _masked_blocks(call)
    if call.is_causal and call.query.shape[2] > 1:
        return _causal_blocks(call)
    return _open_blocks(call)


def _open_blocks(call: AttendCall) -> Iterator[Block]:
    """All queries see all keys, or there is one query."""
    batch, heads, queries, _ = call.query.shape
    keys, size = slice(0, call.key.shape[2]), BLOCK if call.biases else max(queries, 1)
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        yield Block(rows, () if 0 in (batch, heads, keys.stop) else (_factored(call, rows, keys),))


def _causal_blocks(call: AttendCall) -> Iterator[Block]:
    batch, heads, queries, _ = call.query.shape
    size = min(BLOCK, queries) if call.biases else queries
    first = max(0, -call.offset)
    if 0 in (batch, heads, queries):
        return
    if first:
        yield Block(slice(0, min(first, queries)), ())
    everyone = slice(0, heads)
    same_everywhere = all(
        bias.clock is None and not bias.product_count for bias in call.biases if isinstance(bias, Additive)
    )
    square: Tensor | None = None
    reach = _Reach(call)
    for start in range(first, queries, size):
        rows = slice(start, min(start + size, queries))
        at = slice(rows.start + call.offset, rows.stop + call.offset)
        if not call.biases:
            before = [Part(everyone, slice(0, at.start), None)] if at.start else []
            yield Block(rows, (Part(everyone, at, None, causal=True), *before))
            continue
        if square is None or not same_everywhere:
            square = call.bias_block(rows, at)
        length = at.stop - at.start
        diagonal = Part(everyone, at, square[..., :length, :length], causal=True, whole=True)
        past = _factored(call, rows, slice(0, at.start)) if at.start else None
        parts = [] if past is None else [_narrowed(past, *run) for run in reach.runs(rows, past)]
        yield Block(rows, (diagonal, *parts))


def _factored(call: AttendCall, rows: slice, keys: slice, mask: Tensor | None = None) -> Part:
    """Return a part for all heads whose biases are factors, added to `mask` where they are numbers of keys."""
    by_key: Tensor | None = None
    shift: Tensor | None = None
    products: list[Factor] = []
    for bias in call.biases:
        assert isinstance(bias, Additive), "only sums of factors come here"
        found = bias.factors(rows, keys, call.offset)
        shift = found.shift if shift is None else shift + found.shift
        for factor in found.parts:
            if factor.by_query is not None:
                products.append(factor)
            else:
                by_key = factor.by_key if by_key is None else by_key + factor.by_key
    gone = _gone(mask)
    if by_key is not None:
        mask = by_key.unsqueeze(2) if mask is None else by_key.unsqueeze(2) + mask
    return Part(slice(0, call.query.shape[1]), keys, mask, factors=tuple(products), shift=shift, gone=gone)


def _narrowed(part: Part, heads: slice, begin: int) -> Part:
    """Return a part for some heads and the keys from `begin` on."""
    keys = slice(begin, part.keys.stop)
    factors = tuple(Factor(factor.by_query, factor.by_key[..., keys]) for factor in part.factors)
    return replace(
        part,
        heads=heads,
        keys=keys,
        mask=None if part.mask is None else of_heads(part.mask, heads)[..., keys],
        factors=factors,
        shift=None if part.shift is None else of_heads(part.shift, heads),
    )


def product_count(call: AttendCall) -> int:
    """Return how many factors need a number of the query."""
    return sum(bias.product_count for bias in call.biases if isinstance(bias, Additive))


def of_heads(tensor: Tensor, heads: slice) -> Tensor:
    """Return some heads; an axis of size 1 broadcasts and stays whole."""
    return tensor if tensor.shape[1] == 1 else tensor[:, heads]


class _Reach:
    """How far back each head has to look: keys whose weights underflow are left out.

    With m = scale max|q| max|k| of a block, the logit of a key is at most m + b and the best of its row at least -m,
    reached at the query's own key where the bias is zero. Below b = ln(tiny) - 2 m the weight is zero to every digit of
    a sum that is at least 1.
    """

    def __init__(self, call: AttendCall) -> None:
        self.call = call
        self.size = call.query.shape[1]
        self.is_long = call.key.shape[2] > 2 * BLOCK
        self.depth = math.log(torch.finfo(call.dtype).tiny)
        if self.is_long:
            keys = torch.linalg.vector_norm(call.key, dim=-1, dtype=call.dtype).amax(-1)
            self.key_norms = keys.repeat_interleave(call.groups, 1)

    def runs(self, rows: slice, past: Part) -> Iterator[tuple[slice, int]]:
        """Group neighbouring heads with the same past: (heads, first key), first keys rounded down to blocks."""
        begins = self._begins(rows, past)
        start = 0
        for head in range(1, self.size + 1):
            if head == self.size or begins[head] != begins[start]:
                if begins[start] < past.keys.stop:
                    yield slice(start, head), begins[start]
                start = head

    def _begins(self, rows: slice, past: Part) -> list[int]:
        stop = past.keys.stop
        if not self.is_long or stop < 2 * BLOCK:
            return [0] * self.size
        query = self.call.query[:, :, rows]
        norms = torch.linalg.vector_norm(query, dim=-1, dtype=self.call.dtype).amax(-1) * self.key_norms
        alive = self._largest(past) >= (self.depth - 2 * abs(self.call.scale) * norms)[..., None]
        alive = alive.any(0).expand(self.size, stop)
        first = torch.where(alive.any(-1), alive.int().argmax(-1), stop)
        found: list[int] = (first // BLOCK * BLOCK).tolist()
        return [min(begin, stop) for begin in found]

    def _largest(self, past: Part) -> Tensor:
        """Return the largest bias of each key over the queries of a block, [1 or B, 1 or H, keys]."""
        assert past.shift is not None, "a block with a past has biases"
        total = -past.shift.amin(-1, keepdim=True)
        if past.mask is not None:
            total = total + past.mask[:, :, 0]
        for factor in past.factors:
            assert factor.by_query is not None, "factors of keys alone are in the mask"
            ends = factor.by_query.amin(-1, keepdim=True), factor.by_query.amax(-1, keepdim=True)
            total = total + torch.maximum(*(end * factor.by_key for end in ends))
        return total.nan_to_num(math.inf)


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
    usual = float(largest.min()) >= chunked.FAINT
    if not usual and bool(((largest < chunked.FAINT) & (largest > -math.inf)).any()):
        return Block(rows, (), plain=True)
    if keys.stop - keys.start > BLOCK:
        mask, keys = _trimmed(mask, keys)
    if not call.is_signed:
        return Block(rows, (_matrix_part(call, rows, keys, mask),))
    if mask.shape[2] == 1:
        return Block(rows, (_factored(call, rows, keys, mask),))
    start = rows.start + call.offset
    past = min(max(start, keys.start), keys.stop) - keys.start
    if not past or not bool((mask[..., :past] == mask[..., :1, :past]).all()):
        return Block(rows, (_matrix_part(call, rows, keys, mask),))
    before, after = slice(keys.start, keys.start + past), slice(keys.start + past, keys.stop)
    parts = [_matrix_part(call, rows, after, mask[..., past:])] if after.start < after.stop else []
    return Block(rows, (*parts, _factored(call, rows, before, mask[..., :1, :past])))


def _trimmed(mask: Tensor, keys: slice) -> tuple[Tensor, slice]:
    """Leave out keys at both ends that no row sees."""
    seen = (mask.amax((0, 1, 2)) > HIDDEN).nonzero()
    if not len(seen):
        return mask, keys
    inner = slice(int(seen[0]), int(seen[-1]) + 1)
    return mask[..., inner], slice(keys.start + inner.start, keys.start + inner.stop)


def _matrix_part(call: AttendCall, rows: slice, keys: slice, mask: Tensor | None) -> Part:
    """Return a part that reads biases + mask as a matrix [1 or B, 1 or H, rows, keys]."""
    matrix = mask
    if call.biases:
        bias = call.bias_block(rows, keys)
        matrix = bias if mask is None else bias + mask
    return Part(
        slice(0, call.query.shape[1]),
        keys,
        matrix,
        whole=True,
        gone=_gone(mask),
    )


def _gone(mask: Tensor | None) -> Tensor | None:
    """Return True for rows that see none of the keys, [1 or B, 1 or H, 1 or rows]; None for no such row."""
    if mask is None:
        return None
    gone = mask.amax(-1) == -math.inf
    return gone if bool(gone.any()) else None
