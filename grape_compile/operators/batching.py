"""`torch.vmap` of attention: the mapped axis becomes part of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Encoding, Learned, Table
from grape_compile.operators.operands import parse_encoding

Dim = int | None


def attend_vmap(
    info: Any, in_dims: tuple[Any, ...], *operands: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped axis into the batch, attend once, and take it out again."""
    (query, key, value, slots, text, mask, *rest), dims = _filled(operands, in_dims)
    fold = _Fold(info.batch_size, query.dim() - (dims[0] is not None), _batch(query, dims[0]))
    tensors = [fold.tensor(part, dim) for part, dim in zip((query, key, value), dims, strict=False)]
    named = fold.slots(slots, dims[3], parse_encoding(text))
    folded_mask = None if mask is None else fold.mask(mask, dims[5])
    output, logsumexp = torch.ops.grape.attend(*tensors, named, text, folded_mask, *rest)
    return (fold.back(output), fold.back(logsumexp)), (0, 0)


def backward_vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[list[Tensor], list[int]]:
    """Fold the mapped axis of all operands of the backward call into the batch."""
    *tensors, slots, text, mask, is_causal, scale, window, bias_gradient, mask_gradient = operands
    dims = in_dims[: len(tensors)]
    fold = _Fold(info.batch_size, 4, _batch(tensors[0], dims[0]))
    folded = [fold.tensor(part, dim) for part, dim in zip(tensors, dims, strict=True)]
    named = fold.slots(slots, in_dims[6], parse_encoding(text))
    full_mask = None if mask is None else fold.mask(mask, in_dims[8], entire=mask_gradient)
    results = torch.ops.grape.attend_backward(
        *folded, named, text, full_mask, is_causal, scale, window, bias_gradient, mask_gradient
    )
    parts = [fold.back(part) for part in results[:3]]
    if bias_gradient:
        slopes, clock = results[3:5]
        parts += [fold.back(slopes), clock.unflatten(1, (fold.size, fold.batch)).movedim(1, 0)]
    if mask_gradient:
        part = fold.back(results[-1])
        own = mask.shape if in_dims[8] is None else mask.movedim(in_dims[8], 0).shape[1:]
        shared_batch = len(own) < 4 or own[0] == 1
        parts.append(part.sum(1, keepdim=True) if shared_batch else part)
    return parts, [0] * len(parts)


def _filled(operands: tuple[Any, ...], dims: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Add the arguments of `grape::attend` that were left at their defaults."""
    defaults = (None, False, None, None)
    missing = 9 - len(operands)
    added = defaults[len(defaults) - missing :] if missing else ()
    return (*operands, *added), (*dims, *(None for _ in added))


def _batch(tensor: Tensor, dim: Dim) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


class _Fold:
    """Joins a mapped axis of `size` with a batch axis of `batch`, and parts them again."""

    def __init__(self, size: int, rank: int, batch: int) -> None:
        self.size, self.rank, self.batch = size, rank, batch

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.size, self.batch, *tensor.shape[1:])

    def tensor(self, tensor: Tensor, dim: Dim) -> Tensor:
        """Join the axes of [B, ...], repeating a tensor that is not mapped."""
        front = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return front.flatten(0, 1)

    def slots(self, slots: list[Tensor], dims: list[Dim], encoding: Encoding) -> list[Tensor]:
        """Join the axes of slopes [B, H] and clocks [B, T_k] or [A, B, T_k]; what all share stays."""
        slopes = encoding.slopes if isinstance(encoding, Bias) else None
        slopes_name = slopes.slot if isinstance(slopes, Learned | Table) else None
        return [
            self._slot(slot, dim, name == slopes_name)
            for slot, dim, name in zip(slots, dims, encoding.slots, strict=True)
        ]

    def _slot(self, slot: Tensor, dim: Dim, is_slopes: bool) -> Tensor:
        own = slot if dim is None else slot.movedim(dim, 0)[0]
        if dim is None and (own.dim() < 2 or own.shape[-2] == 1):
            return slot
        front = slot.expand(self.size, *slot.shape) if dim is None else slot.movedim(dim, 0)
        missing = 2 - own.dim()
        front = front.reshape(self.size, *(1,) * missing, *own.shape)
        if is_slopes or own.dim() < 3:
            return front.expand(self.size, self.batch, front.shape[-1]).flatten(0, 1)
        spread = front.movedim(1, 0).expand(own.shape[0], self.size, self.batch, own.shape[-1])
        return spread.flatten(1, 2)

    def mask(self, mask: Tensor, dim: Dim, entire: bool = False) -> Tensor:
        """Join the axes of a mask; `entire` repeats one that all share, so that its gradient stays apart."""
        own = mask if dim is None else mask.movedim(dim, 0)[0]
        four = (1,) * (4 - own.dim()) + tuple(own.shape)
        if dim is None and four[0] == 1 and not entire:
            return mask
        front = mask.expand(self.size, *mask.shape) if dim is None else mask.movedim(dim, 0)
        spread = front.reshape(self.size, *four).expand(self.size, self.batch, *four[1:])
        return spread.flatten(0, 1)
