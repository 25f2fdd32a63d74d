"""`torch.vmap` of attention: the mapped axis becomes part of the batch, or is walked where slots are mapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Dim = int | None


def attend_vmap(
    info: Any, in_dims: tuple[Any, ...], *operands: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped axis into the batch, attend once, and take it out again."""
    operator = torch.ops.grape.attend
    (query, key, value, slots, text, *rest), dims = _filled(operands, in_dims)
    mask, *rest = rest
    if not (_shared(slots, dims[3]) and _shared_options(rest, dims[6:])):
        outputs, sums = zip(*_walked(operator, info.batch_size, operands, in_dims), strict=True)
        return (torch.stack(outputs), torch.stack(sums)), (0, 0)
    fold = _Fold(info.batch_size, _batch(query, dims[0]))
    tensors = [fold.tensor(part, dim) for part, dim in zip((query, key, value), dims, strict=False)]
    folded = None if mask is None else fold.mask(mask, dims[5])
    output, logsumexp = operator(*tensors, slots, text, folded, *rest)
    return (fold.back(output), fold.back(logsumexp)), (0, 0)


def backward_vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[list[Tensor], list[int]]:
    """Fold the mapped axis of all operands of the backward call into the batch; slot gradients stay apart."""
    operator = torch.ops.grape.attend_backward
    tensors, (slots, text, mask, *rest, slot_gradients, mask_gradient) = operands[:6], operands[6:]
    shared = _shared(slots, in_dims[6]) and _shared_options(rest, in_dims[9:])
    if slot_gradients or mask_gradient or not shared:
        rows = _walked(operator, info.batch_size, operands, in_dims)
        results = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return results, [0] * len(results)
    dims = in_dims[: len(tensors)]
    fold = _Fold(info.batch_size, _batch(tensors[0], dims[0]))
    parts = [fold.tensor(part, dim) for part, dim in zip(tensors, dims, strict=True)]
    folded = None if mask is None else fold.mask(mask, in_dims[8])
    found = operator(*parts, slots, text, folded, *rest, False, False)
    return [fold.back(part) for part in found], [0] * len(found)


def _shared(slots: Sequence[Tensor], dims: Sequence[Dim]) -> bool:
    """Return whether all of a mapped axis, and of the batch, see the same slots."""
    return all(
        dim is None and all(size == 1 for size in slot.shape[:-1])
        for slot, dim in zip(slots, dims, strict=True)
    )


def _shared_options(options: Sequence[Any], dims: Sequence[Dim]) -> bool:
    """Return whether all of a mapped axis, and of the batch, see the same sinks and segments."""
    pairs = zip(options, dims, strict=False)
    tensors = [(option, dim) for option, dim in pairs if isinstance(option, Tensor)]
    return all(dim is None and (option.dim() < 2 or option.shape[0] == 1) for option, dim in tensors)


def _walked(operator: Any, size: int, operands: Sequence[Any], dims: Sequence[Any]) -> list[Any]:
    """Return the results of the operator for each place of the mapped axis."""

    def at(operand: Any, dim: Any, place: int) -> Any:
        if isinstance(operand, list | tuple):
            return [at(each, own, place) for each, own in zip(operand, dim, strict=True)]
        return operand if dim is None else operand.select(dim, place)

    return [
        operator(*(at(operand, dim, place) for operand, dim in zip(operands, dims, strict=True)))
        for place in range(size)
    ]


def _filled(operands: tuple[Any, ...], dims: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Add the arguments of `grape::attend` that were left at their defaults."""
    defaults = (None, False, None, None, None, None, None)
    missing = 5 + len(defaults) - len(operands)
    added = defaults[len(defaults) - missing :] if missing else ()
    return (*operands, *added), (*dims, *(None for _ in added))


def _batch(tensor: Tensor, dim: Dim) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


class _Fold:
    """Joins a mapped axis of `size` with a batch axis of `batch`, and parts them again."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch = size, batch

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.size, self.batch, *tensor.shape[1:])

    def tensor(self, tensor: Tensor, dim: Dim) -> Tensor:
        """Join the axes of [B, ...], repeating a tensor that is not mapped."""
        front = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return front.flatten(0, 1)

    def mask(self, mask: Tensor, dim: Dim) -> Tensor:
        """Join the axes of a mask."""
        own = mask if dim is None else mask.movedim(dim, 0)[0]
        four = (1,) * (4 - own.dim()) + tuple(own.shape)
        if dim is None and four[0] == 1:
            return mask
        front = mask.expand(self.size, *mask.shape) if dim is None else mask.movedim(dim, 0)
        spread = front.reshape(self.size, *four).expand(self.size, self.batch, *four[1:])
        return spread.flatten(0, 1)
