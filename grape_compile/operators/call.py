"""One attention call with everything checked: what a provider is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from grape_compile.encoding import Rotation
from grape_compile.errors import OperandError
from grape_compile.operators.bias import Additive
from grape_compile.operators.operands import (
    check_broadcast,
    check_device,
    check_floating,
    compute_dtype,
)
from grape_compile.operators.path import Path

AnyBias = Additive | Path


@dataclass(frozen=True, eq=False)
class QueryTurn:
    """The way queries have still to turn, in halves or in neighbours of the whole head.

    Cosines and sines are [1 or B, 1 or H, 1 or T_q, planes], in the compute dtype.
    """

    rotation: Rotation
    cos: Tensor
    sin: Tensor

    def growth(self) -> Tensor:
        """Return by how much a query may grow at most, at least one."""
        return (self.cos.square() + self.sin.square()).amax().sqrt().clamp(min=1.0)


@dataclass(frozen=True, eq=False)
class AttendCall:
    """Queries [B, H, T_q, D], keys [B, H_kv, T_k, D], values [B, H_kv, T_k, D_v], biases, mask of one call.

    Query t stands at key number t + `offset`. `mask` has four axes that broadcast to [B, H, T_q, T_k]. `cap` bends the
    scaled products, `sinks` [1 or B, 1 or H] (compute dtype) are logits in the denominators, `segments` [1 or B, T_k]
    hide keys whose number is not the query's. Where `turn` is there, queries are not turned yet; keys are. A backward
    call says whether the gradients of the biases or of the mask are wanted.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    biases: tuple[AnyBias, ...]
    mask: Tensor | None
    is_causal: bool
    scale: float
    window: int | None
    cap: float | None = None
    sinks: Tensor | None = None
    segments: Tensor | None = None
    turn: QueryTurn | None = None
    wants_bias_gradients: bool = False
    wants_mask_gradient: bool = False

    @property
    def offset(self) -> int:
        """Key number of query 0: the queries are the last of the keys."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def is_signed(self) -> bool:
        """Whether the biases are sums of factors: a number of the query times a number of the key."""
        return all(bias.is_signed for bias in self.biases)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, softmax and logsumexp."""
        return compute_dtype(self.query)

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @cached_property
    def keys(self) -> Tensor:
        """Keys with one head for each query head."""
        return repeat_heads(self.key, self.groups)

    @cached_property
    def values(self) -> Tensor:
        """Values with one head for each query head."""
        return repeat_heads(self.value, self.groups)

    def capped(self, products: Tensor) -> Tensor:
        """Return cap * tanh(products / cap) of scaled products, in place; themselves without a cap."""
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def with_sinks(self, output: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B, H, rows, D_v] and logsumexp [B, H, rows] with the sinks in the denominators."""
        if self.sinks is None:
            return output, logsumexp
        both = torch.logaddexp(logsumexp, self.sinks[..., None])
        share = (logsumexp - both).exp_().nan_to_num_(0.0)  # -inf of -inf: neither keys nor a sink
        return (output * share[..., None]).to(output.dtype), both

    def key_range(self, rows: slice) -> slice:
        """Return the keys that some query of `rows` may see by `is_causal` and `window`."""
        length = self.key.shape[2]
        stop = min(max(rows.stop + self.offset, 0), length) if self.is_causal else length
        start = 0 if self.window is None else min(max(rows.start + self.offset - self.window + 1, 0), stop)
        return slice(start, stop)

    def hidden(self, rows: slice, keys: slice) -> Tensor | None:
        """Return True where `is_causal`, `window` or `segments` hide key j from query t, or None.

        [rows, keys], or [1 or B, 1, rows, keys] by segments.
        """
        last = rows.start + self.offset  # the key of the first row
        # Of sizes that are symbols only what holds for all.
        is_early = not self.is_causal or statically_known_true(keys.stop - 1 <= last)
        is_close = self.window is None or statically_known_true(
            rows.stop - 1 + self.offset - keys.start < self.window
        )
        if is_early and is_close and self.segments is None:
            return None
        device = self.query.device
        at = torch.arange(rows.start, rows.stop, device=device) + self.offset
        behind = at[:, None] - torch.arange(keys.start, keys.stop, device=device)
        hidden = behind < 0 if self.is_causal else torch.zeros_like(behind, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (behind >= self.window)
        if self.segments is not None:
            own = self.segments[:, None, rows.start + self.offset : rows.stop + self.offset, None]
            hidden = hidden | (own != self.segments[:, None, None, keys])
        return hidden

    def mask_block(self, rows: slice, keys: slice) -> Tensor | None:
        """Return the mask of a block as numbers to add, -inf for hidden keys."""
        hidden = self.hidden(rows, keys)
        block = None if self.mask is None else cut(cut(self.mask, 2, rows), 3, keys)
        if block is None and hidden is None:
            return None
        if block is None:
            block = torch.zeros((1, 1, 1, 1), dtype=self.dtype, device=self.query.device)
        elif block.dtype == torch.bool:
            block = torch.where(block, 0.0, -math.inf).to(self.dtype)
        block = block.to(self.dtype)
        return block if hidden is None else block.masked_fill(hidden, -math.inf)

    def logit_block(self, rows: slice, keys: slice) -> Tensor | None:
        """Return biases + mask of a block, broadcastable to [B, H, rows, keys]; None where there is neither."""
        mask = self.mask_block(rows, keys)
        if not self.biases:
            return mask
        bias = self.bias_block(rows, keys)
        return bias if mask is None else bias + mask

    def bias_block(self, rows: slice, keys: slice) -> Tensor:
        """Return the sum of the biases of a block."""
        first, *others = (bias.block(rows, keys, self.offset) for bias in self.biases)
        for block in others:
            first = first + block
        return first


@dataclass(frozen=True)
class Gradients:
    """What a backward call returns: of queries, keys, values (shape and dtype theirs), and what was asked.

    `biases` holds for each bias those of its `tensors()`, `mask` has the shape of the mask; in the compute dtype.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    biases: tuple[tuple[Tensor, ...], ...] = ()
    mask: Tensor | None = None


def repeat_heads(tensor: Tensor, groups: int) -> Tensor:
    """Return [B, H_kv * groups, T, D] with each head `groups` times; the tensor itself for one."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def sum_heads(tensor: Tensor, groups: int) -> Tensor:
    """Return the gradient of `repeat_heads`: the sum over each group of heads."""
    return tensor if groups == 1 else tensor.unflatten(1, (-1, groups)).sum(2)


def cut(tensor: Tensor, axis: int, part: slice) -> Tensor:
    """Return a part of one axis; an axis of size 1 broadcasts and stays whole."""
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, part.start, part.stop - part.start)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise OperandError unless these are queries, keys and values of one attention layer."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        check_device(name, tensor, query)
        if tensor.dim() != 4:
            raise OperandError(
                f"{name} of four axes", f"shape {tuple(tensor.shape)}", "[batch, heads, tokens, head_dim]"
            )
        if tensor.dtype != query.dtype:
            raise OperandError(
                "query, key and value of one dtype",
                f"query {query.dtype}, {name} {tensor.dtype}",
                "casting one of them",
            )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise OperandError(
            "attention", shapes, "query [B, H, T_q, D], key [B, H_kv, T_k, D], value [B, H_kv, T_k, D_v]"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise OperandError(
            "grouped heads", shapes, "a number of query heads that is a multiple of the key heads"
        )


def checked_sinks(sinks: Tensor, query: Tensor) -> Tensor:
    """Return sinks as [1 or B, 1 or H] in the compute dtype; OperandError for some that do not fit."""
    check_floating("sinks", sinks)
    check_device("sinks", sinks, query)
    check_broadcast("sinks", sinks.shape, query.shape[:2], "[batch, heads]")
    return sinks.to(compute_dtype(query)).reshape((1,) * (2 - sinks.dim()) + tuple(sinks.shape))


def checked_segments(segments: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return segments as [1 or B, T_k]; OperandError for some that do not fit."""
    if segments.dtype == torch.bool or segments.is_floating_point() or segments.is_complex():
        raise OperandError(
            "segments as whole numbers", f"segments are {segments.dtype}", "the number of each key's segment"
        )
    check_device("segments", segments, query)
    check_broadcast("segments", segments.shape, (key.shape[0], key.shape[2]), "[batch, keys]")
    if query.shape[2] > key.shape[2]:
        raise OperandError(
            "segments of queries and keys",
            f"{query.shape[2]} queries over {key.shape[2]} keys",
            "queries that are the last of the keys",
        )
    two = segments.reshape((1,) * (2 - segments.dim()) + tuple(segments.shape))
    return two.expand(two.shape[0], key.shape[2])


def checked_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask with four axes; OperandError for one that does not fit."""
    if mask.dtype != torch.bool:
        check_floating("mask", mask)
    check_device("mask", mask, query)
    check_broadcast(
        "mask",
        mask.shape,
        (query.shape[0], query.shape[1], query.shape[2], key.shape[2]),
        "[batch, heads, T_q, T_k]",
    )
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
