"""A row of sample operands: an encoding, how to fill its slots, and the numbers to fill them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Bias,
    Compose,
    Encoding,
    Gate,
    PathBias,
)

BATCH: Final = 2
HEADS: Final = 4
LENGTH: Final = 9
HEAD_DIM: Final = 8

Random = torch.Generator
Fill = Callable[[Random], Tensor]


@dataclass(frozen=True)
class Sample:
    """An encoding and how to fill its slots, for tensors [BATCH, HEADS, LENGTH, HEAD_DIM].

    Slots are made in float64 (positions of whole numbers in int64); `slots` casts the floating ones.
    """

    name: str
    encoding: Encoding
    fills: tuple[tuple[str, Fill], ...] = ()

    def slots(
        self, dtype: torch.dtype = torch.float64, seed: int = 0, queries: int = LENGTH
    ) -> dict[str, Tensor]:
        """Return tensors for all slots, floating ones in `dtype`, for the last `queries` of LENGTH tokens."""
        random = torch.Generator().manual_seed(seed)
        made = {name: fill(random) for name, fill in self.fills}
        for name, axis in query_axes(self.encoding).items():
            made[name] = made[name].narrow(axis, LENGTH - queries, queries)
        return {name: slot.to(dtype) if slot.is_floating_point() else slot for name, slot in made.items()}


def query_axes(encoding: Encoding) -> dict[str, int]:
    """Return the slots that have one entry for each query, not for each key, and their axis of tokens."""
    match encoding:
        case Compose(parts):
            return {name: axis for part in parts for name, axis in query_axes(part).items()}
        case PathBias():
            return {encoding.query: -2}
        case Bias(gate=Gate(query=str(name))):
            return {name: -1}
        case _:
            return {}


def tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return normal numbers of unit variance, drawn in float64 and rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normal(*shape: int) -> Fill:
    """Return normal numbers of unit variance."""
    return lambda random: torch.randn(shape, generator=random, dtype=torch.float64)


def between(low: float, high: float, *shape: int) -> Fill:
    """Return real numbers between two."""
    return lambda random: low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)


def whole(high: int, *shape: int) -> Fill:
    """Return whole numbers from 0 to below `high`."""
    return lambda random: torch.randint(high, shape, generator=random)


def orthonormal(*shape: int) -> Fill:
    """Return orthonormal columns [..., size, count]."""
    return lambda random: torch.linalg.qr(normal(*shape)(random)).Q


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return float(torch.finfo(dtype).eps) / 2
