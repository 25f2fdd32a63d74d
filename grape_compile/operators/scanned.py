"""Attention with a path bias (GRAPE-AP), for every device: one scan over the keys, from the diagonal backwards.

The bias of a query at key j is the sum of the edges behind j, so walking the keys from the query back it is a running
sum, and with a running softmax nothing of size T_q x T_k is ever in memory. Where all edges are negative the bias falls
on the way, and a head is left behind when all its remaining keys together weigh less than a quarter of a rounding.

Keys stand in the order of the walk, the last one first, and each beside the edge of the token behind it: its sums are
plain cumulative sums. Products, edges, sums, logits and weights of a step of the forward pass are written over each
other, so that they stay in the cache. Logits and levels are logarithms to the base two.

The backward pass walks the same way, twice where it has to. The gradient of the edge at l sums those of the logits of
all j < l, which are walked after it: the first walk leaves a sum for each step. (As the logit gradients of a row sum to
zero it is also minus the sum of what has been walked, but far from the diagonal that is the rounding of large numbers.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Identity
from grape_compile.operators import chunked
from grape_compile.operators.bias import pull
from grape_compile.operators.call import AnyBias, AttendCall, Gradients
from grape_compile.operators.operands import LOG2E
from grape_compile.operators.path import Path, later

#: Keys in a step of the scan at least.
KEYS: Final = 256
#: Queries that walk together at most.
QUERIES: Final = 128
#: A number this low stays itself whatever logit is added to it.
LOWEST: Final = -1e38
#: Logits of a step at least, once heads have left: a megabyte, which caches hold.
LOGITS: Final = 1 << 18
#: Logits of the first step at most.
MAX_LOGITS: Final = 1 << 20


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls with one path bias whose mask has no gradient."""
    if sum(isinstance(bias, Path) for bias in call.biases) != 1:
        return "needs exactly one path bias"
    if call.cap is not None:
        return "a soft cap under a path bias"
    if call.wants_mask_gradient:
        return "the gradient of a mask needs every logit's gradient"
    if 0 in call.query.shape or 0 in call.value.shape or 0 in call.key.shape:
        return "needs at least one element"
    return True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    back = _Back(call)
    for rows in _row_chunks(call):
        wide, level = _attended(back, rows)
        output[:, :, rows], logsumexp[:, :, rows] = wide.to(output.dtype), level.squeeze(-1)
    return output, logsumexp


def _attended(back: _Back, rows: slice) -> tuple[Tensor, Tensor]:
    """Return output [B, H, rows, D_v] and logsumexp [B, H, rows, 1] of some queries in the compute dtype."""
    call, walk = back.call, _Walk(back, rows)
    shape = (*call.query.shape[:2], rows.stop - rows.start, 1)
    # The largest of no logits is the lowest finite number, so that differences of it are numbers.
    largest = call.query.new_full(shape, torch.finfo(call.dtype).min, dtype=call.dtype)
    total = torch.zeros_like(largest)
    if call.sinks is not None:
        sinks = call.sinks[..., None, None] * LOG2E
        largest = torch.maximum(largest, sinks)
        total += (sinks - largest).exp2_()
    sums = call.query.new_zeros((*shape[:3], call.value.shape[3]), dtype=call.dtype)
    for step in walk:
        before = largest[:, step.heads]
        best = torch.maximum(before, step.logits.amax(-1, keepdim=True))
        weights = step.logits.sub_(best).exp2_()
        shrink = before.sub_(best).exp2_()
        total[:, step.heads].mul_(shrink).add_(weights.sum(-1, keepdim=True))
        sums[:, step.heads].mul_(shrink).add_(weights @ step.values)
        before.copy_(best)
        walk.leave(largest)
    level = torch.where(total == 0, -math.inf, (largest + total.log2()) / LOG2E)
    return sums / torch.where(total == 0, 1.0, total), level


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output; weights and edges are computed again."""
    sums, back = chunked.Sums(call), _Back(call)
    (number,) = (at for at, bias in enumerate(call.biases) if isinstance(bias, Path))
    for rows in _row_chunks(call):
        wide = gradient[:, :, rows].to(call.dtype)
        delta = (wide * output[:, :, rows].to(call.dtype)).sum(-1, keepdim=True)
        level = logsumexp[:, :, rows, None]
        if bool(((level < chunked.FAINT) & (level > -math.inf)).any()):
            for some in chunked.row_chunks(call, rows):
                chunked.Weights(call, some).add_gradients(gradient[:, :, some], sums)
            continue
        # A row without a key: weights exp(logit - inf) are zero.
        level = torch.where(level == -math.inf, math.inf, level * LOG2E)
        beyond = _beyond(back, rows, level, wide, delta) if call.wants_bias_gradients else []
        walk = _Walk(back, rows, level, keeps=True)
        for number_of_step, step in enumerate(walk):
            heads, keys = step.heads, step.keys
            weights = step.logits.sub_(level[:, heads]).exp2_()
            sums.value[:, heads, keys] += (weights.mT @ wide[:, heads]).flip(2)
            logits = (wide[:, heads] @ step.values.mT).sub_(delta[:, heads]).mul_(weights)
            sums.query[:, heads, rows] += (logits @ step.key).mul_(call.scale)
            sums.key[:, heads, keys] += (logits.mT @ step.query).mul_(call.scale).flip(2)
            if call.wants_bias_gradients:
                by_edge = logits.flip(-1).cumsum(-1).flip(-1).add_(beyond[number_of_step][:, heads])
                sums.add_bias(number, walk.path_gradients(step, logits, by_edge))
                for at, bias in enumerate(call.biases):
                    if at != number:
                        sums.add_bias(at, walk.bias_gradients(bias, step, logits))
    return sums.gradients()


def _beyond(back: _Back, rows: slice, level: Tensor, gradient: Tensor, delta: Tensor) -> list[Tensor]:
    """Return for each step the sum of the logit gradients of all keys that are walked after it, [B, H, rows, 1]."""
    sums = []
    for step in _Walk(back, rows, level):
        heads = step.heads
        weights = step.logits.sub_(level[:, heads]).exp2_()
        logits = (gradient[:, heads] @ step.values.mT).sub_(delta[:, heads]).mul_(weights)
        sums.append(torch.zeros_like(level))
        sums[-1][:, heads] = logits.sum(-1, keepdim=True)
    beyond = [torch.zeros_like(level)]
    for each in reversed(sums[1:]):
        beyond.append(beyond[-1] + each)
    return beyond[::-1]


def _row_chunks(call: AttendCall) -> Iterator[slice]:
    batch, heads, length, _ = call.query.shape
    size = max(1, min(QUERIES, MAX_LOGITS // max(1, batch * heads * KEYS)))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class _Back:
    """What a call has of each key, in the compute dtype and in the order of the walk."""

    def __init__(self, call: AttendCall) -> None:
        self.call, self.length = call, call.keys.shape[2]
        (self.path,) = (bias for bias in call.biases if isinstance(bias, Path))
        self.key, self.value = (part.to(call.dtype).flip(2) for part in (call.keys, call.values))
        self.norm = _norm(self.key).amax(-2, keepdim=True)
        edge = self.path.key.expand(*call.query.shape[:2], *self.path.key.shape[2:]).flip(2)
        # No edge is behind the last key.
        self.edge = torch.cat((torch.zeros_like(edge[:, :, :1]), edge[:, :, :-1]), dim=2)
        self.over = self.path.over
        self.room = call.query.new_empty(0, dtype=call.dtype)

    def at(self, keys: slice) -> slice:
        """Return where these keys stand in the order of the walk."""
        return slice(self.length - keys.stop, self.length - keys.start)

    def space(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory for a tensor of this shape: the same memory again, which a step is done with at the next."""
        size = math.prod(shape)
        if self.room.numel() < size:
            self.room = self.room.new_empty(size)
        return self.room[:size].view(shape)


@dataclass(frozen=True, eq=False)
class _Step:
    """Some keys and the heads that still look at them: operands and logits, keys in the order of the walk.

    Products of edges and their sums (but for the factor of the link) are there in a walk that keeps them.
    """

    heads: slice
    keys: slice
    query: Tensor
    key: Tensor
    values: Tensor
    logits: Tensor
    product: Tensor
    sums: Tensor


class _Walk:
    """The way of some queries over their keys, from the last one back."""

    def __init__(self, back: _Back, rows: slice, level: Tensor | None = None, *, keeps: bool = False) -> None:
        self.back, self.call, self.path, self.rows, self.level = back, back.call, back.path, rows, level
        self.keeps, call = keeps, self.call
        self.others = tuple(bias for bias in call.biases if bias is not self.path)
        self.query = call.query[:, :, rows].to(call.dtype)
        edges = self.path.query.expand(*call.query.shape[:2], *self.path.query.shape[2:])
        self.edge_query = edges[:, :, rows]
        self.slopes = self.path.slopes.expand(call.query.shape[:2])[..., None, None]
        self.steep = self.slopes * (back.over.after * LOG2E)
        self.first = 0
        self.carry = call.query.new_zeros((*self.query.shape[:3], 1), dtype=call.dtype)
        self.reach = self._reach()

    def __iter__(self) -> Iterator[_Step]:
        span = self.call.key_range(self.rows)
        stop = span.stop
        while stop > span.start and self.first < self.query.shape[1]:
            heads = slice(self.first, self.query.shape[1])
            width = max(KEYS, LOGITS // self.carry[:, heads].numel())
            keys = slice(max(span.start, stop - width), stop)
            yield self._step(heads, keys)
            stop = keys.start
            if self.level is not None:
                self.leave(self.level)

    def _step(self, heads: slice, keys: slice) -> _Step:
        call, back, at = self.call, self.back, self.back.at(keys)
        query, key = self.query[:, heads], back.key[:, heads, at]
        product = back.space((*query.shape[:3], keys.stop - keys.start))
        edge_query, edge = self.edge_query[:, heads].flatten(0, 1), back.edge[:, heads, at].flatten(0, 1)
        factor = 1.0 if self.keeps else back.over.before
        product.flatten(0, 1).baddbmm_(edge_query, edge.mT, beta=0.0, alpha=factor)
        sums = product * back.over.before if self.keeps else product
        back.over.write(sums)
        hidden = self._later(keys)
        if hidden is not None:
            sums[..., : hidden.shape[-1]].masked_fill_(hidden, 0.0)
        carry = self.carry[:, heads]
        sums[..., :1].add_(carry)
        carry.copy_(sums.cumsum_(-1)[..., -1:])
        steep, scale = self.steep[:, heads], call.scale * LOG2E
        logits = sums * steep if self.keeps else sums.mul_(steep)
        logits.flatten(0, 1).baddbmm_(query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale)
        added = call.mask_block(self.rows, keys)
        for bias in self.others:
            block = bias.block(self.rows, keys, call.offset)
            added = block if added is None else added + block
        if added is not None:
            added = added.flip(-1)
            # The lowest numbers are as low in powers of two: scaled they would be minus infinity, which hides for good.
            added = torch.where(added < LOWEST, added, added * LOG2E)
            logits.add_(added[:, heads] if added.shape[1] > 1 else added)
        return _Step(heads, keys, query, key, back.value[:, heads, at], logits, product, sums)

    def _later(self, keys: slice) -> Tensor | None:
        """Return which of the first edges of a step a row does not have, and no others; None where all have all."""
        stop = keys.stop + 1
        first = max(keys.start + 1, self.rows.start + self.call.offset + 1)
        if first >= stop:
            return None
        return later(self.rows, slice(first, stop), self.call.offset, self.query.device).flip(-1)

    def path_gradients(self, step: _Step, logits: Tensor, by_edge: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of slopes, query and key from those of the logits and of the sums up to each edge."""
        slopes = self.slopes[:, step.heads]
        hidden = self._later(step.keys)
        if hidden is not None:
            by_edge[..., : hidden.shape[-1]].masked_fill_(hidden, 0.0)
        (product,) = pull(self.path.linked, (step.product,), by_edge.mul_(slopes))
        found = {name: torch.zeros_like(tensor) for name, tensor in self.path.tensors().items()}
        edge = self.back.edge[:, step.heads, self.back.at(step.keys)]
        _add(found["query"], product @ edge, step.heads, self.rows)
        # Of the token behind each key.
        behind = slice(step.keys.start + 1, min(step.keys.stop + 1, self.back.length))
        by_key = (product.mT @ self.edge_query[:, step.heads]).flip(2)
        _add(found["key"], by_key[:, :, : behind.stop - behind.start], step.heads, behind)
        if "slopes" in found:
            _add(found["slopes"], (logits * step.sums).sum((-2, -1)) * self.back.over.after, step.heads)
        return tuple(found.values())

    def bias_gradients(self, bias: AnyBias, step: _Step, logits: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of another bias; heads that were left have none."""
        whole = logits.new_zeros((*self.call.query.shape[:2], *logits.shape[2:]))
        whole[:, step.heads] = logits.flip(-1)
        return chunked.block_gradients(bias, whole, self.rows, step.keys, self.call.offset)

    def _reach(self) -> Tensor | None:
        """Return how far below the row's level a bias makes T_k weights add up to nothing, [B, H, rows, 1].

        Nothing is a quarter of the rounding of the row's sum: weights of T_k eps / 4 of it together.

        None where no bound is known: edges of either sign, other biases or a mask that could raise a logit.
        """
        call = self.call
        if isinstance(self.path.link, Identity) or self.others or bool((self.path.slopes < 0).any()):
            return None
        if call.mask is not None and call.mask.dtype != torch.bool:
            return None
        largest = abs(call.scale) * _norm(self.query) * self.back.norm
        return math.log2(torch.finfo(call.dtype).eps / (4 * self.back.length)) - largest * LOG2E

    def leave(self, level: Tensor) -> None:
        """Leave the first heads behind whose keys further back have no weight; `level` is a row's best logit."""
        if self.reach is None:
            return
        heads = slice(self.first, self.query.shape[1])
        steep = self.steep[:, heads]
        done = (
            (steep * self.carry[:, heads] - level[:, heads] < self.reach[:, heads]).all(-2).all(0).flatten()
        )
        for finished in done.tolist():
            if not finished:
                return
            self.first += 1


def _norm(vectors: Tensor) -> Tensor:
    """Return the norm over the last axis, which stays. (Not by `vector_norm`, which is slow along short axes.)"""
    return vectors.square().sum(-1, keepdim=True).sqrt_()


def _add(total: Tensor, part: Tensor, heads: slice, axis: slice | None = None) -> None:
    """Add to some heads (and tokens) of a gradient, summed over the axes that were broadcast."""
    target = total if total.shape[1] == 1 else total[:, heads]
    if axis is not None:
        target = target[:, :, axis]
    target += part.sum_to_size(target.shape)
