"""One attention call with everything checked: what a provider is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grape_compile.encoding import Encoding
from grape_compile.errors import OperandError
from grape_compile.operators.bias import LogitBias, logit_bias
from grape_compile.operators.operands import (
    check_broadcast,
    check_device,
    check_floating,
    compute_dtype,
    slot_mapping,
)


@dataclass(frozen=True, eq=False)
class AttendCall:
    """Queries [B, H, T_q, D], keys [B, H_kv, T_k, D], values [B, H_kv, T_k, D_v], bias, mask of one call.

    Query t stands at key number t + `offset`. `mask` has four axes that broadcast to [B, H, T_q, T_k]. A
    backward call says whether the gradients of the bias or of the mask are wanted.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: LogitBias | None
    mask: Tensor | None
    is_causal: bool
    scale: float
    window: int | None
    wants_bias_gradient: bool = False
    wants_mask_gradient: bool = False

    @property
    def offset(self) -> int:
        """Key number of query 0: the queries are the last of the keys."""
        return self.key.shape[2] - self.query.shape[2]

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

    def key_range(self, rows: slice) -> slice:
        """Return the keys that some query of `rows` may see by `is_causal` and `window`."""
        length = self.key.shape[2]
        stop = min(max(rows.stop + self.offset, 0), length) if self.is_causal else length
        start = 0 if self.window is None else min(max(rows.start + self.offset - self.window + 1, 0), stop)
        return slice(start, stop)

    def hidden(self, rows: slice, keys: slice) -> Tensor | None:
        """Return True where `is_causal` or `window` hide key j from query t, [rows, keys], or None."""
        if not self.is_causal and self.window is None:
            return None
        device = self.query.device
        at = torch.arange(rows.start, rows.stop, device=device) + self.offset
        behind = at[:, None] - torch.arange(keys.start, keys.stop, device=device)
        hidden = behind < 0 if self.is_causal else torch.zeros_like(behind, dtype=torch.bool)
        return hidden if self.window is None else hidden | (behind >= self.window)

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
        """Return bias + mask of a block, broadcastable to [B, H, rows, keys]; None where there is neither."""
        mask = self.mask_block(rows, keys)
        if self.bias is None:
            return mask
        at = slice(rows.start + self.offset, rows.stop + self.offset)
        bias = self.bias.block(at, keys)
        return bias if mask is None else bias + mask


@dataclass(frozen=True)
class Gradients:
    """What a backward call returns: of queries, keys, values (shape and dtype theirs), and what was asked.

    `slopes` [1 or B, H], `clock` [A, 1 or B, T_k], `mask` (shape of the mask) in the compute dtype.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor | None = None
    clock: Tensor | None = None
    mask: Tensor | None = None


def attend_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: list[Tensor],
    encoding: Encoding,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
) -> AttendCall:
    """Check the operands of a call against each other and return them as one value, or raise OperandError."""
    _check_tensors(query, key, value)
    if mask is not None:
        mask = _checked_mask(mask, query, key)
    if window is not None and window < 1:
        raise OperandError("a window of keys", f"window = {window}", "a window of at least 1, or None")
    named = slot_mapping(encoding, slots)
    bias = logit_bias(encoding, named, query, key, is_causal)
    factor = 1.0 / math.sqrt(max(query.shape[3], 1)) if scale is None else scale
    return AttendCall(query, key, value, bias, mask, is_causal, factor, window)


def repeat_heads(tensor: Tensor, groups: int) -> Tensor:
    """Return [B, H_kv * groups, T, D] with each head `groups` times; the tensor itself for one."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def sum_heads(tensor: Tensor, groups: int) -> Tensor:
    """Return the gradient of `repeat_heads`: the sum over each group of heads."""
    return tensor if groups == 1 else tensor.unflatten(1, (-1, groups)).sum(2)


def cut(tensor: Tensor, axis: int, part: slice) -> Tensor:
    """Return a part of one axis; an axis of size 1 broadcasts and stays whole."""
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, part.start, part.stop - part.start)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
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


def _checked_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
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
