"""One call of `grape::rotate` with everything checked: what a provider is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import Multiplicative


@dataclass(frozen=True, eq=False)
class TurnCall:
    """Tensors [..., head_dim] and the slots of the encoding that turns them."""

    tensors: tuple[Tensor, ...]
    encoding: Multiplicative
    slots: Mapping[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return self.tensors[0].device
