"""What the tuner asks of a family of kernels: the cases of a shape, their configurations, their launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from grape_compile.kernels.launch import Launch

#: Modules that define `FAMILIES`, a tuple of `Family`.
MODULES: Final = (
    "grape_compile.kernels.attention_space",
    "grape_compile.kernels.path_space",
    "grape_compile.kernels.decoding_space",
    "grape_compile.kernels.turning_space",
)


@dataclass(frozen=True)
class Shape:
    """One attention layer: [batch, heads, tokens, head_dim] queries and key_heads of keys."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One thing to tune: its name in the records, what it could be, and how it is launched on a device.

    A configuration is what its record holds. `default` is what runs without a record, at a compute capability.
    """

    name: str
    space: Sequence[Mapping[str, Any]]
    default: Callable[[int], Mapping[str, Any]]
    launch: Callable[[Mapping[str, Any], torch.device], Launch]


@dataclass(frozen=True)
class Family:
    """Kernels tuned alike; an encoding they do not know has no cases."""

    name: str
    cases: Callable[[Shape, Any], Sequence[Case]]
