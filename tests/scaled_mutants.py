"""Turns whose length depends on the token, as in xPos: no rotations, and refused as what they are."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from attention_layers import HEAD_DIM, RotaryAttention, inverse_frequencies
from rotation_mutants import HALF, RotationMutant, halves, wide
from torch import Tensor, nn


def zeta(x: Tensor, sign: float) -> Tensor:
    """The scale of xPos, [T, planes] (Sun et al. 2022, arXiv 2212.10554, eq. 12)."""
    steps = torch.arange(x.shape[-2], device=x.device).to(x.dtype) - x.shape[-2] // 2
    base = (torch.arange(0, HEAD_DIM, 2, device=x.device).to(x.dtype) + 0.4 * HEAD_DIM) / (1.4 * HEAD_DIM)
    return base ** (sign * steps[:, None] / 8)


def xpos(x: Tensor, angle: Tensor, sign: float = 1.0) -> Tensor:
    """Scale folded into tables of neighbours (torchscale)."""
    tables = (table * zeta(x, sign) for table in (angle.cos(), angle.sin()))
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in tables)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def xpos_by_products(x: Tensor, angle: Tensor, sign: float = 1.0) -> Tensor:
    """The scale as one more product of each of the two."""
    (cos, sin), scale = wide(angle), torch.cat((zeta(x, sign), zeta(x, sign)), dim=-1)
    first, second = halves(x)
    return x * cos * scale + torch.cat((-second, first), dim=-1) * sin * scale


def xpos_by_radius(x: Tensor, angle: Tensor, sign: float = 1.0) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], HALF, 2))
    return torch.view_as_real(pairs * torch.polar(zeta(x, sign), angle)).flatten(-2)


class XposTables(nn.Module):
    """Tables [limit, planes] that hold the scale already."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        steps = torch.arange(64.0)[:, None]
        angle, scale = steps * inverse_frequencies(HALF), zeta(torch.empty(64, HEAD_DIM), sign)
        self.register_buffer("cos", angle.cos() * scale)
        self.register_buffer("sin", angle.sin() * scale)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = (torch.cat((table, table), -1)[: x.shape[-2]] for table in (self.cos, self.sin))
        first, second = halves(x)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


def temperature_in_the_tables(x: Tensor, angle: Tensor) -> Tensor:
    """A scale of its own for each token (Llama 4), inside of cosine and sine."""
    steps = torch.arange(x.shape[-2], device=x.device).to(x.dtype)
    scale = torch.log1p(torch.floor((steps + 1) / 4))[:, None] * 0.1 + 1.0
    (cos, sin), (first, second) = wide(angle), halves(x)
    return x * (cos * scale) + torch.cat((-second, first), dim=-1) * (sin * scale)


def _row(query: Callable[..., Tensor], key: Callable[..., Tensor]) -> RotationMutant:
    return RotationMutant(query.__name__, lambda: RotaryAttention(query, key, expose=True), refused=True)


SCALED_MUTANTS: tuple[RotationMutant, ...] = (
    *(
        _row(scaled, functools.partial(scaled, sign=-1.0))
        for scaled in (xpos, xpos_by_products, xpos_by_radius)
    ),
    RotationMutant(
        "xpos_tables", lambda: RotaryAttention(XposTables(), XposTables(-1.0), expose=True), refused=True
    ),
    _row(temperature_in_the_tables, temperature_in_the_tables),
)
