"""What tests of operators share: samples by name, operands, gradients for random cotangents, largest differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grape_compile.operators.samples import BATCH, HEAD_DIM, LENGTH, Sample, tensor

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def named(samples: tuple[Sample, ...], *names: str) -> list[Sample]:
    return [sample for sample in samples if sample.name in names]


def heads(count: int, length: int = LENGTH, number: int = 3) -> list[Tensor]:
    return [tensor(BATCH, count, length, HEAD_DIM, seed=seed) for seed in range(number)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [part.detach().requires_grad_(part.is_floating_point()) for part in tensors]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 21) -> tuple[Tensor, ...]:
    cotangents = [tensor(*output.shape, seed=seed + at).to(output) for at, output in enumerate(outputs)]
    wanted = [part for part in inputs if part.requires_grad]
    return torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True, materialize_grads=True)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max()) if found.numel() else 0.0
