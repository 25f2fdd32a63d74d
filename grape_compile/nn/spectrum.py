"""Frequencies that train: on a logarithmic scale, from where a model has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grape_compile.nn.trainable import WideBuffers, wide

#: theta changes by the exp of a sixteenth of what its logarithm's parameter changes by (the authors' models).
SLOWNESS = 16.0


class LearnedSpectrum(WideBuffers):
    """theta_j = start_j * exp(log_theta_j / 16) in radians per position, log_theta = 0 at the start (GRAPE 3.1).

    The authors' exp(log_theta / 16) with its origin moved to the given frequencies, so that those are reproduced to
    the bit, and frequencies of zero stay zero. `log_theta` and the result are [planes], or [heads, 1, planes].

    >>> LearnedSpectrum((1.0, 0.1))()
    tensor([1.0000, 0.1000], grad_fn=<MulBackward0>)
    """

    start: Tensor

    def __init__(self, frequencies: Sequence[float] | Tensor, heads: int | None = None) -> None:
        super().__init__()
        start = torch.as_tensor(frequencies, dtype=torch.get_default_dtype()).detach().clone()
        self.register_buffer("start", start)
        lead = () if heads is None else (heads, 1)
        self.log_theta = nn.Parameter(torch.zeros(*lead, start.shape[-1], device=start.device))

    def forward(self) -> Tensor:
        return self.start * (wide(self.log_theta) / SLOWNESS).exp()
