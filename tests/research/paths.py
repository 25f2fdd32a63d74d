"""GRAPE-AP: b[t, j] = sum over l = j+1 ... t of alpha_h logsigmoid(<p_t, R_l r_l> / 8), r = p / rms(p)."""

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
    Rotary,
    Separate,
    alibi_slopes,
    future,
    root_mean_square,
    rotary,
)
from research.phases import turn_neighbours

PATH_DIM = 8


class Path(Fused):
    """Attention with a small path vector p per head and ALiBi's slopes."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Linear(HIDDEN, HEADS * PATH_DIM, bias=False)
        self.register_buffer("slopes", alibi_slopes())

    def paths(self, x: Tensor) -> Tensor:
        """The path vectors p, [B, H, T, 8]."""
        p: Tensor = self.path(x).view(*x.shape[:2], HEADS, PATH_DIM).transpose(1, 2)
        return p


def turn_halves(x: Tensor) -> Tensor:
    """Every plane (i, i + 4) of [B, H, T, 8] turned by l radians at token l."""
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class TotalMinusCumulative(Path):
    """Raw queries, halves; the whole row's sum less the sum up to j."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        p = self.paths(x)
        hidden = future(x.shape[1], x.device)
        edges = F.logsigmoid(p @ turn_halves(root_mean_square(p)).mT / PATH_DIM)
        edges = (self.slopes.view(1, -1, 1, 1) * edges).masked_fill(hidden, 0.0)
        bias = edges.sum(-1, keepdim=True) - edges.cumsum(-1)
        scores = (query @ key.mT / math.sqrt(HEAD_DIM) + bias).masked_fill(hidden, float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class FlipCumulativeFlip(Path):
    """Both sides normalised, neighbours; the sum from the end, less the edge at j itself."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        p = root_mean_square(self.paths(x))
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        turned = turn_neighbours(p, steps[:, None].expand(-1, PATH_DIM // 2))
        edges = F.logsigmoid(torch.matmul(p, turned.transpose(-1, -2)) / PATH_DIM).tril()
        sums = torch.flip(torch.cumsum(torch.flip(edges, (-1,)), dim=-1), (-1,)) - edges
        bias = self.slopes[:, None, None] * sums
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class FloatMask(Path):
    """Raw queries, neighbours, normalised by torch; through the fused attention."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        p = self.paths(x)
        seen = ~future(x.shape[1], x.device)
        steps = torch.arange(x.shape[1], device=x.device).to(x.dtype)
        turned = turn_neighbours(F.rms_norm(p, (PATH_DIM,), eps=1e-5), steps[:, None])
        edges = torch.where(seen, F.logsigmoid(torch.einsum("bhtd,bhld->bhtl", p, turned) / PATH_DIM), 0.0)
        running = edges.cumsum(dim=-1)
        bias = (running[..., -1:] - running) * self.slopes.view(-1, 1, 1)
        bias = bias.masked_fill(~seen, float("-inf"))
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))


class HeadsLast(Separate):
    """Raw queries, halves, [B, T, H, D] contracted by name; log sigmoid as -softplus(-x)."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Linear(HIDDEN, HEADS * PATH_DIM, bias=False)
        self.register_buffer("slopes", alibi_slopes())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads_last(x)
        p = self.path(x).unflatten(-1, (HEADS, PATH_DIM))
        seen = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype).tril()
        first, second = root_mean_square(p).chunk(2, dim=-1)
        angle = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        product = torch.einsum("bthd,blhd->bhtl", p, turned) / PATH_DIM
        edges = -F.softplus(-product) * seen
        edges = torch.einsum("h,bhtl->bhtl", self.slopes, edges)
        bias = edges.flip(-1).cumsum(-1).flip(-1) - edges
        scores = torch.einsum("bthd,bjhd->bhtj", query, key) * HEAD_DIM**-0.5 + bias
        scores = scores.masked_fill(seen == 0, float("-inf"))
        out: Tensor = self.out(torch.einsum("bhtj,bjhd->bthd", scores.softmax(-1), value).flatten(2))
        return out


class WithRope(Path):
    """GRAPE-M and GRAPE-AP together: queries and keys turn too."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        cos, sin = self.rotary(x)
        query, key = rotary(query, cos, sin), rotary(key, cos, sin)
        p = self.paths(x)
        hidden = future(x.shape[1], x.device)
        edges = F.logsigmoid(p @ turn_halves(root_mean_square(p)).mT / PATH_DIM).masked_fill(hidden, 0.0)
        bias = self.slopes.view(-1, 1, 1) * (edges.sum(-1, keepdim=True) - edges.cumsum(-1))
        scores = (query @ key.mT / math.sqrt(HEAD_DIM) + bias).masked_fill(hidden, float("-inf"))
        return self.merged(scores.softmax(-1) @ value)
