"""One call of `grape::rotate` with everything checked: what a provider is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Multiplicative

#: Where a norm stands beside the rotation.
Place = Literal["before", "after", "across"]


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm of heads in the same pass: x / sqrt(mean(x^2) + epsilon) * (weight + offset), in the compute dtype.

    `place` is "before" the rotation, "after" it, or "across": before it, the mean over all heads of tensors
    [..., H, T, D]. One weight for each tensor, [D], or [H * D] across heads.
    """

    weights: tuple[Tensor, ...]
    epsilon: float
    place: Place = "before"
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class TurnCall:
    """Tensors [..., head_dim] and the slots of the encoding that turns them.

    `places` names for each output, where one is given, the rows [T] along axis -2 that its tokens are written to.
    `notes` are for providers, who are asked first and called then: what one found out about the call.
    """

    tensors: tuple[Tensor, ...]
    encoding: Multiplicative
    slots: Mapping[str, Tensor]
    norm: Norm | None = None
    places: tuple[Tensor | None, ...] = ()
    notes: dict[object, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return self.tensors[0].device

    def place(self, number: int) -> Tensor | None:
        """Return the rows that output `number` takes tokens in, or None where it has a row for each."""
        return self.places[number] if self.places else None
