"""The forget gate that trains: FoX as Additive GRAPE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from grape_compile.encoding import Absolute, Accumulated, Bias, Uniform, fox
from grape_compile.errors import OperandError
from grape_compile.nn.trainable import Projection, Slots, TrainableEncoding


class ForgetGate(TrainableEncoding):
    """FoX: b[t, j] = sum_{l = j+1 ... t} log f_l, f = sigmoid(W x + b), one gate for each head (GRAPE App. C).

    Without `slopes` W is normal with deviation 0.02 and b zero, as in the authors' models (Lin et al. 2025). With the
    positive slopes of ALiBi, W = 0 and b_h = -log(exp(slope_h) - 1), so that log f_h = -slope_h: exactly ALiBi at
    the start. `symmetric`: a later key is forgotten like an earlier one, by the gates between, l = t+1 ... j.
    From hidden states [B, T, C] to `log_forget` [B, H, T].
    """

    reads_hidden = True

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        slopes: Sequence[float] | Tensor | None = None,
        *,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.proj = Projection(hidden_size, heads)
        with torch.no_grad():
            if slopes is None:
                self.proj.weight.normal_(std=0.02)
                self.proj.bias.zero_()
            else:
                self.proj.weight.zero_()
                self.proj.bias.copy_(_constant(heads, torch.as_tensor(slopes, dtype=torch.float64)))
        self.encoding = fox()
        if symmetric:
            self.encoding = Bias(Uniform(1.0), Accumulated("log_forget", True), distance=Absolute())

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        return {"log_forget": F.logsigmoid(self.proj(hidden)).mT}


def _constant(heads: int, slopes: Tensor) -> Tensor:
    if slopes.shape != (heads,) or not bool((slopes > 0).all()):
        raise OperandError(
            f"forget gates of {heads} heads that start as slopes",
            f"slopes {slopes.tolist()}",
            "one positive slope for each head: a gate below one forgets",
        )
    return -slopes.expm1().log()
