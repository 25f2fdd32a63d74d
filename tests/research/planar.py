"""Tokens on a plane: b = alpha_x du + alpha_y dv with two slopes per head, or -beta_h |r_t - r_j|."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.parts import CONTEXT, HEAD_DIM, HEADS, Fused, alibi_slopes, future

WIDTH = 7


class TwoSlopes(Fused):
    """Row and column from the token's number on a grid; both slopes are learned; causal in raster order."""

    def __init__(self) -> None:
        super().__init__()
        self.slope_x = nn.Parameter(torch.full((HEADS,), 0.5))
        self.slope_y = nn.Parameter(torch.full((HEADS,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        steps = torch.arange(x.shape[1], device=x.device)
        u, v = steps % WIDTH, steps // WIDTH
        across, down = u[None, :] - u[:, None], v[None, :] - v[:, None]
        bias = self.slope_x.view(-1, 1, 1) * across + self.slope_y.view(-1, 1, 1) * down
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class Scattered(Fused):
    """Tokens at given places, [T, 2], in a buffer."""

    places: Tensor
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("places", torch.rand(CONTEXT, 2, generator=generator) * 8)
        self.register_buffer("slopes", alibi_slopes())


class TwoSlopesFloatMask(Scattered):
    """Given places and two fixed slopes, the axes contracted by name, through the fused attention."""

    both: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("both", torch.stack((alibi_slopes(), alibi_slopes().flip(0)), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        places = self.places[: x.shape[1]]
        apart = places[None, :, :] - places[:, None, :]
        bias = torch.einsum("ha,tja->htj", self.both, apart)
        bias = bias.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))


class Euclidean(Scattered):
    """Every token sees every token, weighed by the distance in the plane."""

    causal = False

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        places = self.places[: x.shape[1]]
        distance = torch.linalg.vector_norm(places[:, None] - places[None], dim=-1)
        bias = -self.slopes[:, None, None] * distance
        return self.merged((query @ key.mT / math.sqrt(HEAD_DIM) + bias).softmax(-1) @ value)


class EuclideanOfAxes(Scattered):
    """The distance from its two axes, through the fused attention."""

    causal = False

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        u, v = self.places[: x.shape[1]].unbind(-1)
        squared = (u[:, None] - u[None, :]) ** 2 + (v[:, None] - v[None, :]) ** 2
        bias = squared.sqrt() * -self.slopes.view(1, -1, 1, 1)
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
