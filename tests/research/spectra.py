"""Learned frequencies, theta = exp(log_theta / 16), and learned orthogonal bases to turn in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from research.parts import HEAD_DIM, HEADS, Fused, Separate, future, inverse_frequencies, rotate_half
from research.phases import turn_neighbours

#: The logarithm is learned this many times slower.
SLOWER = 16.0


class SharedSpectrum(Fused):
    """One spectrum for all heads, halves."""

    def __init__(self) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(inverse_frequencies().log() * SLOWER)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        theta = torch.exp(self.log_theta / SLOWER)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=x.dtype), theta)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        return self.merged(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class SpectrumPerHead(Separate):
    """A spectrum per head, neighbours, the logarithms in one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.log_theta = nn.Parameter((inverse_frequencies().log() * SLOWER).repeat(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in self.heads_last(x))
        theta = (self.log_theta / SLOWER).exp().view(HEADS, 1, HEAD_DIM // 2)
        steps = torch.arange(x.shape[1], device=x.device)
        angle = steps[:, None] * theta
        scores = turn_neighbours(query, angle) @ turn_neighbours(key, angle).mT / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        out: Tensor = self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return out


class SpectrumPerHeadLast(Separate):
    """A spectrum per head, halves, heads behind tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.log_theta = nn.Parameter((inverse_frequencies().log() * SLOWER).expand(HEADS, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads_last(x)
        theta = torch.exp(self.log_theta / SLOWER)
        angle = torch.einsum("t,hf->thf", torch.arange(x.shape[1], device=x.device, dtype=theta.dtype), theta)
        cos, sin = angle.cos(), angle.sin()
        turned = []
        for each in (query, key):
            first, second = each.split(HEAD_DIM // 2, dim=-1)
            turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
        scores = torch.einsum("bthd,bjhd->bhtj", turned[0], turned[1]) * HEAD_DIM**-0.5
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        out: Tensor = self.out(torch.einsum("bhtj,bjhd->bthd", scores.softmax(-1), value).flatten(2))
        return out


class OrthogonalBasis(Fused):
    """Queries and keys in a learned basis before they turn; one spectrum for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(inverse_frequencies().log() * SLOWER)
        self.basis = parametrizations.orthogonal(nn.Linear(HEAD_DIM, HEAD_DIM, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        query, key = self.basis(query), self.basis(key)
        angle = (
            torch.arange(x.shape[1], device=x.device).to(x.dtype)[:, None] * (self.log_theta / SLOWER).exp()
        )
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        return self.merged(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class CayleyBasis(Fused):
    """A learned basis per head, (I - A)^-1 (I + A) of a skew matrix, and a spectrum per head."""

    def __init__(self) -> None:
        super().__init__()
        self.log_theta = nn.Parameter((inverse_frequencies().log() * SLOWER).repeat(HEADS))
        self.generator = nn.Parameter(torch.randn(HEADS, HEAD_DIM, HEAD_DIM) / HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        skew = self.generator - self.generator.mT
        eye = torch.eye(HEAD_DIM, dtype=x.dtype, device=x.device)
        basis = torch.linalg.solve(eye - skew, eye + skew)
        query, key = query @ basis, key @ basis
        theta = (self.log_theta / SLOWER).exp().view(HEADS, 1, HEAD_DIM // 2)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * theta
        query, key = turn_neighbours(query, angle), turn_neighbours(key, angle)
        return self.merged(F.scaled_dot_product_attention(query, key, value, is_causal=True))
