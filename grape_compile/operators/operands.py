"""What both operators ask of their operands, and the one error they raise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import Encoding, parse
from grape_compile.errors import OperandError

#: Element types that an encoding acts on; 8-bit floats and complex numbers have no rounding to promise.
FLOATING: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: What makes logits powers of two. A CPU takes a third of the time of exp for exp2, which does not stumble over weights
#: close to the smallest number either.
LOG2E: Final = math.log2(math.e)

#: `parse` with a memory: an operator reads the same few texts at every call.
parse_encoding = lru_cache(maxsize=1024)(parse)


@lru_cache(maxsize=1024)
def slot_names(encoding: Encoding) -> tuple[str, ...]:
    """Return `encoding.slots`, with a memory: it walks the whole value."""
    return encoding.slots


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a tensor is computed in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise OperandError unless the tensor holds real floating numbers of 16, 32 or 64 bits."""
    if tensor.dtype not in FLOATING:
        raise OperandError(
            f"{name} as real floating numbers",
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}",
            "float16, bfloat16, float32 or float64",
        )


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raise OperandError unless the tensor holds whole or real numbers."""
    if (
        tensor.is_complex()
        or tensor.dtype == torch.bool
        or (tensor.is_floating_point() and tensor.dtype not in FLOATING)
    ):
        raise OperandError(
            f"{name} as whole or real numbers",
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}",
            "integers, float16, bfloat16, float32 or float64",
        )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise OperandError unless both tensors are on one device; a number without axes may stay on the CPU."""
    if tensor.device != like.device and tensor.dim() > 0:
        raise OperandError(
            f"{name} on {like.device}", f"{name} is on {tensor.device}", f"{name}.to({str(like.device)!r})"
        )


def check_broadcast(name: str, shape: Sequence[int], target: Sequence[int], meaning: str) -> None:
    """Raise OperandError unless `shape` broadcasts to `target` without making it larger."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(found not in (1, wanted) for found, wanted in pairs):
        raise OperandError(
            f"{name} over {meaning} = {tuple(target)}",
            f"{name} has shape {tuple(shape)}",
            f"a shape that broadcasts to {tuple(target)}",
        )


def slot_mapping(encoding: Encoding, slots: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name the tensors of an operator call; OperandError for a wrong number of them."""
    names = slot_names(encoding)
    if len(slots) != len(names):
        raise OperandError(
            f"the tensors of {encoding}",
            f"{len(slots)} tensors",
            f"{len(names)} tensors, in this order: {', '.join(names) or 'none'}",
        )
    return dict(zip(names, slots, strict=True))


def slot_list(encoding: Encoding, slots: Mapping[str, Tensor]) -> list[Tensor]:
    """Put named tensors in the order of the operator; OperandError for a name that is missing."""
    missing = [name for name in encoding.slots if name not in slots]
    if missing:
        raise OperandError(
            f"the tensors of {encoding}",
            f"no tensor named {', '.join(missing)} among {', '.join(slots) or 'none'}",
            f"a mapping with {', '.join(encoding.slots)}",
        )
    return [slots[name] for name in encoding.slots]
