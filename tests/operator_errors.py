"""What the tests of precision share: leaves, gradients for random cotangents, largest differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grape_compile.operators.samples import tensor

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [part.detach().requires_grad_(part.is_floating_point()) for part in tensors]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 21) -> tuple[Tensor, ...]:
    cotangents = [tensor(*output.shape, seed=seed + at).to(output.dtype) for at, output in enumerate(outputs)]
    wanted = [part for part in inputs if part.requires_grad]
    return torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True, materialize_grads=True)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max()) if found.numel() else 0.0
