"""Phases that accumulate from content: as a bias, -theta_h (Phi_t - Phi_j), and as the angle of a rotation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.parts import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    Fused,
    Separate,
    future,
    inverse_frequencies,
    rotate_half,
)


class PhaseBias(Fused):
    """One phase per token for all heads, the sum of softplus rates up to and with t; theta is learned per head."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(HIDDEN, 1)
        self.theta = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        phase = F.softplus(self.rate(x)).squeeze(-1).cumsum(-1)
        theta = F.softplus(self.theta).view(1, -1, 1, 1)
        bias = -theta * (phase[:, None, :, None] - phase[:, None, None, :])
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class PhaseBiasPerHead(Separate):
    """A phase per head from exp of a rate, theta taken into the difference, through the fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(HIDDEN, HEADS)
        self.log_theta = nn.Parameter(torch.full((HEADS,), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in self.heads_last(x))
        phase = torch.cumsum(torch.exp(self.rate(x) / 4), dim=1).transpose(1, 2)
        drift = self.log_theta.exp()[:, None] * phase
        bias = drift.unsqueeze(-2) - drift.unsqueeze(-1)
        bias = bias.masked_fill(future(x.shape[1], x.device), float("-inf"))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Contextual(Fused):
    """GRAPE-M-ctx: phase = sum over l < t of sigmoid((W x + b) / 16), times the frequencies of RoPE."""

    inv_freq: Tensor

    def __init__(self, rates: int) -> None:
        super().__init__()
        self.rate = nn.Linear(HIDDEN, rates)
        nn.init.constant_(self.rate.bias, math.log(math.expm1(1e-3)))
        self.register_buffer("inv_freq", inverse_frequencies())


class ContextualHalves(Contextual):
    """One phase per token, halves."""

    def __init__(self) -> None:
        super().__init__(rates=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        omega = torch.sigmoid(self.rate(x) / 16.0)
        phase = torch.cumsum(omega, dim=1) - omega
        angle = phase * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        cos, sin = angle.cos(), angle.sin()
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
        return self.merged(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class ContextualNeighbours(Contextual):
    """One phase per token, neighbours, the sum shifted in by a zero."""

    def __init__(self) -> None:
        super().__init__(rates=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        omega = torch.sigmoid(self.rate(x) / 16.0).squeeze(-1)
        phase = F.pad(torch.cumsum(omega, dim=-1)[:, :-1], (1, 0))
        angle = torch.einsum("bt,f->btf", phase, self.inv_freq)[:, None]
        query, key = turn_neighbours(query, angle), turn_neighbours(key, angle)
        return self.merged(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class ContextualHalvesPerHead(Contextual):
    """A phase per head and token, halves written out."""

    def __init__(self) -> None:
        super().__init__(rates=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        omega = torch.sigmoid(self.rate(x) / 16.0).transpose(1, 2)
        phase = omega.cumsum(-1) - omega
        angle = phase.unsqueeze(-1) * self.inv_freq
        cos, sin = torch.cos(angle), torch.sin(angle)
        turned = []
        for each in (query, key):
            first, second = each[..., : HEAD_DIM // 2], each[..., HEAD_DIM // 2 :]
            turned.append(torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1))
        scores = turned[0] @ turned[1].mT / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class ContextualNeighboursPerHead(Contextual):
    """A phase per head and token, neighbours as complex numbers, heads behind tokens, a zero put before."""

    def __init__(self) -> None:
        super().__init__(rates=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).unbind(2)
        omega = torch.sigmoid(self.rate(x) / 16.0)
        sums = torch.cumsum(omega, dim=1)
        phase = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), dim=1)
        angle = phase[..., None] * self.inv_freq
        factor = torch.polar(torch.ones_like(angle), angle)
        query, key = (
            torch.view_as_real(torch.view_as_complex(each.reshape(*each.shape[:-1], -1, 2)) * factor).flatten(
                3
            )
            for each in (query, key)
        )
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return self.merged(F.scaled_dot_product_attention(query, key, value, is_causal=True))


def turn_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate coordinates (2j, 2j+1) by `angle` [..., planes]."""
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
