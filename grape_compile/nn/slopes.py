"""Slopes and gates that train: Additive GRAPE from ALiBi."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grape_compile.encoding import Absolute, AlibiSlopes, Bias, Gate, Learned, Signed, Steps
from grape_compile.errors import OperandError
from grape_compile.nn.trainable import Slots, TrainableEncoding, WideBuffers, wide


class SlopeFactors(WideBuffers):
    """w_h = softplus(omega_h) * slope_h, [heads], softplus(omega) = `factor` at the start (the authors' models).

    `slopes` are ALiBi's by default. Never negative where they are not: the bias falls with the distance.
    """

    slopes: Tensor

    def __init__(
        self, heads: int, slopes: Sequence[float] | Tensor | None = None, factor: float = 1.0
    ) -> None:
        super().__init__()
        values = torch.as_tensor(AlibiSlopes(heads).values() if slopes is None else slopes).detach().clone()
        if values.shape != (heads,):
            raise OperandError(
                f"slopes of {heads} heads",
                f"a shape of {tuple(values.shape)}",
                f"({heads},), one for each head",
            )
        if not factor > 0.0:
            raise OperandError("slopes times a factor at the start", f"the factor {factor}", "a positive one")
        self.register_buffer("slopes", values.to(torch.get_default_dtype()))
        self.omega = nn.Parameter(torch.full((heads,), factor + math.log(-math.expm1(-factor))))

    def forward(self) -> Tensor:
        return F.softplus(wide(self.omega)) * self.slopes


class LearnedSlopes(TrainableEncoding):
    """ALiBi with slopes that train: b[t, j] = w_h (j - t), w by `SlopeFactors` (GRAPE 4.2)."""

    def __init__(self, heads: int, slopes: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self.factors = SlopeFactors(heads, slopes)
        self.encoding = Bias(Learned("slopes"), Steps())

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        return {"slopes": self.factors()}


class GatedSlopes(TrainableEncoding):
    """GRAPE-A-Q, -K, -QK: b[t, j] = (j - t) w_h (lam_q[t] + lam_k[j]), or one gate alone (GRAPE 4.6).

    lam_q = softplus(v_h . q_t / sqrt(d)), lam_k = softplus(u_h . k_j / sqrt(d)); `v` and `u` are [heads, head_dim], w
    by `SlopeFactors`. Whether q and k are taken before a norm or after it is the caller's choice; several heads
    may share a key. `unit` (the authors' models): v and u are divided by their length, w_h is the slope at the start.
    Without it v = u = 0 and w_h = slope_h / (gates * log 2): exactly the bias slope_h (j - t) at the start.
    `symmetric`: -|j - t| in place of j - t, the same for earlier keys and its mirror image for later ones.
    """

    reads_heads = True

    def __init__(
        self,
        heads: int,
        head_dim: int,
        slopes: Sequence[float] | Tensor | None = None,
        *,
        query: bool = True,
        key: bool = True,
        unit: bool = True,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if not (query or key):
            raise OperandError(
                "gated slopes", "neither a gate of the query nor one of the key", "one or both"
            )
        self.unit = unit
        self.factors = SlopeFactors(heads, slopes, 1.0 if unit else 1.0 / ((query + key) * math.log(2.0)))
        std = head_dim**-0.5 if unit else 0.0
        self.v = nn.Parameter(std * torch.randn(heads, head_dim)) if query else None
        self.u = nn.Parameter(std * torch.randn(heads, head_dim)) if key else None
        gate = Gate("gate_query" if query else None, "gate_key" if key else None)
        distance = Absolute() if symmetric else Signed()
        self.encoding = Bias(Learned("slopes"), Steps(), gate=gate, distance=distance)

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        """Return slopes [H], gates [B, H, T_q] and [B, H, T_k]; OperandError where queries or keys are missing."""
        slots = {"slopes": self.factors()}
        for name, direction, tokens in (("gate_query", self.v, query), ("gate_key", self.u, key)):
            if direction is not None:
                slots[name] = self._gate(name, tokens, direction)
        return slots

    def carried(self, hidden: Tensor) -> Slots:
        found = {"gate_query": self.v, "gate_key": self.u}
        directions = {name: self._direction(each) for name, each in found.items() if each is not None}
        return {"slopes": self.factors(), **directions}

    def _direction(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=-1) if self.unit else weight

    def _gate(self, name: str, tokens: Tensor | None, direction: Tensor) -> Tensor:
        direction = self._direction(direction)
        heads, size = direction.shape
        if tokens is None or tokens.dim() != 4 or tokens.shape[-1] != size or heads % tokens.shape[1]:
            found = "none" if tokens is None else f"shape {tuple(tokens.shape)}"
            raise OperandError(
                f"{name} of {heads} heads",
                f"{found} to read it from",
                f"[B, heads, T, {size}], or fewer key heads",
            )
        return gate(tokens, direction)


def gate(tokens: Tensor, direction: Tensor) -> Tensor:
    """Return softplus(direction_h . x / sqrt(d)), [B, H, T], of queries or keys [B, H or H_kv, T, d] (GRAPE 4.6)."""
    groups = direction.to(tokens.dtype).unflatten(0, (tokens.shape[1], -1))
    product = tokens @ groups.mT
    return F.softplus(wide(product) / math.sqrt(tokens.shape[-1])).mT.flatten(1, 2)
