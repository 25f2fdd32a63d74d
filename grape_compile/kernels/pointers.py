"""How tensors of attention become arguments of kernels: pointers, and the strides of the axes that are walked."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

#: What a mask holds: nothing is masked, bytes that are zero where a key is hidden, numbers that are added.
NONE: Final = 0
BYTES: Final = 1
NUMBERS: Final = 2


def in_line(tensor: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded(size: int) -> int:
    """Return the power of two that holds an axis of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Return the strides of batch, head and token, zero where one entry stands for all of batch or head."""
    batch, head = (0 if tensor.shape[at] == 1 else tensor.stride(at) for at in (0, 1))
    return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": tensor.stride(2)}


def broadcast(name: str, tensor: Tensor | None, axes: tuple[str, ...]) -> dict[str, int]:
    """Return the strides of some axes, zero where one entry stands for all, but never of an axis of rows."""
    if tensor is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    return {
        f"{name}_{axis}": tensor.stride(at) if tensor.shape[at] > 1 or axis == "row" else 0
        for at, axis in enumerate(axes)
    }


def mask_arguments(mask: Tensor | None, nothing: Tensor) -> dict[str, Any]:
    """Return a mask of four axes, its kind and its strides; `nothing` is the tensor handed over where there is none."""
    axes = ("batch", "head", "query", "key")
    if mask is None:
        return {"MASK": nothing, "MASKED": NONE, **broadcast("mask", None, axes)}
    kind = BYTES if mask.dtype == torch.bool else NUMBERS
    numbers = mask.view(torch.uint8) if kind == BYTES else mask
    return {"MASK": numbers, "MASKED": kind, **broadcast("mask", numbers, axes)}
