"""Whole layers that rotate: what stands around the rotation, and which tensors it turns."""

from __future__ import annotations

import torch
from attention_layers import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    RotaryAttention,
    attend,
    causal,
    example,
    inverse_frequencies,
)
from rotation_spellings import (
    HALF,
    NEIGHBOURS,
    Spelling,
    every_two,
    plain,
    rotate_half,
    wide,
)
from torch import Tensor, nn


class HeadsLast(nn.Module):
    """Everything in [B, T, H, D] until the scores, with queries, keys and values from one projection."""

    inv_freq: Tensor

    def __init__(self, *, turn_value: bool = False) -> None:
        super().__init__()
        self.turn_value = turn_value
        self.register_buffer("inv_freq", inverse_frequencies(HALF))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        steps = torch.arange(length, device=x.device).to(x.dtype)
        angle = (steps[:, None] * self.inv_freq)[None, :, None, :]
        parts = self.qkv(x).view(batch, length, -1, 3 * HEAD_DIM).chunk(3, dim=-1)
        query, key, value = plain(parts[0], angle), plain(parts[1], angle), parts[2]
        if self.turn_value:
            value = plain(value, angle)
        heads = (part.transpose(1, 2) for part in (query, key, value))
        out: Tensor = self.out(attend(*heads).transpose(1, 2).reshape(batch, length, HIDDEN))
        return out


class BeforeTheProjection(nn.Module):
    """Hidden states turned before they are projected: one rotated tensor feeds queries and keys."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HALF))
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        angle = torch.arange(length, device=x.device).to(x.dtype)[:, None, None] * self.inv_freq
        heads = x.view(batch, length, HEADS, HEAD_DIM)
        turned = plain(heads, angle).flatten(-2)
        query, key = (project(turned).view(heads.shape) for project in (self.query, self.key))
        return attend(*(part.transpose(1, 2) for part in (query, key, heads)))


def largest_score_subtracted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax made safe by hand: what is the same along a row is no bias."""
    scores = query @ key.mT / HEAD_DIM**0.5
    scores = scores.masked_fill(~causal(scores.shape[-1]), -torch.inf)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


def heads_of(x: Tensor, count: int = HEADS) -> Tensor:
    """[B, T, hidden] as [B, H, T, D]."""
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


class Latent(nn.Module):
    """Queries and keys of which a part alone turns; the turned part of the keys is one for all heads (DeepSeek-V2)."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HALF // 2))
        self.query = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.down = nn.Linear(HIDDEN, HALF + HALF, bias=False)
        self.up = nn.Linear(HALF, HEADS * (HALF + HEAD_DIM), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        angle = torch.outer(torch.arange(length, device=x.device).to(x.dtype), self.inv_freq)
        still, turning = heads_of(self.query(x)).split([HALF, HALF], dim=-1)
        latent, shared = self.down(x).split([HALF, HALF], dim=-1)
        key, value = heads_of(self.up(latent)).split([HALF, HEAD_DIM], dim=-1)
        query = torch.cat((still, self.turn(turning, angle)), dim=-1)
        shared = self.turn(shared[:, None], angle)
        key = torch.cat((key, shared.expand(-1, HEADS, -1, -1)), dim=-1)
        return attend(query, key, value).transpose(1, 2).flatten(2)

    @staticmethod
    def turn(x: Tensor, angle: Tensor) -> Tensor:
        pairs = torch.unflatten(x, -1, (HALF // 2, 2)).transpose(-1, -2).flatten(-2)
        return plain(pairs, angle)


class CrossAttention(nn.Module):
    """Queries and keys of two sequences, each at its own positions; the keys start at position 3."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HALF))
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        query, key = heads_of(self.query(x)), heads_of(self.key(other))
        here = torch.arange(x.shape[1], device=x.device).to(x.dtype)
        there = torch.arange(other.shape[1], device=x.device).to(x.dtype) + 3
        query = plain(query, torch.outer(here, self.inv_freq))
        key = plain(key, torch.outer(there, self.inv_freq))
        mixed = nn.functional.scaled_dot_product_attention(query, key, heads_of(other))
        return mixed.transpose(1, 2).flatten(2)


class ThetaOfEachLayer(nn.Module):
    """Two layers whose frequencies have a base of their own, all tables computed before the first (Gemma 3)."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "inv_freq", torch.stack([inverse_frequencies(HALF, base) for base in (1e4, 1e6)])
        )
        self.projections = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device).to(x.dtype)
        tables = {number: wide(torch.outer(steps, self.inv_freq[number])) for number in range(2)}
        for number, project in enumerate(self.projections):
            query, key, value = map(heads_of, project(x).chunk(3, dim=-1))
            query, key = by_tables(query, tables[number]), by_tables(key, tables[number])
            x = x + attend(query, key, value).transpose(1, 2).flatten(2)
        return x


def by_tables(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables
    return x * cos + rotate_half(x) * sin


def temperature(x: Tensor) -> Tensor:
    """A scale of its own for each token (Llama 4), [T, 1]."""
    steps = torch.arange(x.shape[-2], device=x.device).to(x.dtype)
    scale: Tensor = torch.log1p(torch.floor((steps + 1) / 4)) * 0.1 + 1.0
    return scale[:, None]


def cooled_after(x: Tensor, angle: Tensor) -> Tensor:
    return plain(x, angle) * temperature(x)


def cooled_before(x: Tensor, angle: Tensor) -> Tensor:
    return every_two(x * temperature(x), angle)


def xpos_around(x: Tensor, angle: Tensor) -> Tensor:
    """xPos whose scale stands apart: the rotation inside of it is one."""
    steps = torch.arange(x.shape[-2], device=x.device).to(x.dtype)
    zeta = torch.linspace(0.3, 1.0, HALF).to(x.dtype)
    return plain(x, angle) * torch.cat((zeta, zeta)) ** ((steps - 6)[:, None] / 8)


def two_sequences(length: int) -> tuple[Tensor, ...]:
    return example(length), example(length + 5, seed=1)


LAYER_SPELLINGS = (
    Spelling("grouped_queries", lambda: RotaryAttention(plain, kv_heads=1)),
    Spelling("safe_softmax", lambda: RotaryAttention(plain, attention=largest_score_subtracted)),
    Spelling("heads_last_fused_qkv", HeadsLast),
    Spelling("values_turned_as_well", lambda: HeadsLast(turn_value=True), rotations=3),
    Spelling("before_the_projection", BeforeTheProjection, rotations=1),
    Spelling("latent", Latent, None),
    Spelling("cross_attention", CrossAttention, inputs=two_sequences, proved=True),
    Spelling("theta_of_each_layer", ThetaOfEachLayer, rotations=4, proved=True),
    Spelling("cooled_after", lambda: RotaryAttention(cooled_after, plain), proved=True),
    Spelling("cooled_before", lambda: RotaryAttention(cooled_before, every_two), NEIGHBOURS, proved=True),
    Spelling("xpos_around", lambda: RotaryAttention(xpos_around), proved=True),
)
