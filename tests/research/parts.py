"""What the hand-written models share: the language model around an attention layer, and its projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LAYERS = 2
HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
VOCABULARY = 100
CONTEXT = 128
BASE = 10000.0


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values, one after the other."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, H, T, D]."""
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).split(HIDDEN, dim=2)
        return (
            query.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2),
            key.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2),
            value.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2),
        )

    def merged(self, mixed: Tensor) -> Tensor:
        """From [B, H, T, D] back to [B, T, hidden]."""
        batch, _, length, _ = mixed.shape
        out: Tensor = self.out(mixed.transpose(1, 2).contiguous().view(batch, length, HIDDEN))
        return out


class Separate(nn.Module):
    """Attention with a projection each for queries, keys and values."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.value = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def heads_last(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, T, H, D]."""
        shape = (*x.shape[:2], HEADS, HEAD_DIM)
        return self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)


class Block(nn.Module):
    """Pre-norm attention and feed-forward; what the model shares among its layers is handed on."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(HIDDEN)
        self.attention = attention
        self.feed_norm = nn.LayerNorm(HIDDEN)
        self.feed = nn.Sequential(nn.Linear(HIDDEN, 96), nn.GELU(), nn.Linear(96, HIDDEN))

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *shared)
        out: Tensor = x + self.feed(self.feed_norm(x))
        return out


class LanguageModel(nn.Module):
    """Token ids [B, T] to logits [B, T, vocabulary].

    `shared` makes once per forward pass what all layers use: the bias of ALiBi, cosines and sines.
    """

    def __init__(
        self, attention: Callable[[], nn.Module], shared: nn.Module | None = None, layers: int = LAYERS
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.shared = shared
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        shared = () if self.shared is None else (self.shared(x),)
        for block in self.blocks:
            x = block(x, *shared)
        logits: Tensor = self.head(self.norm(x))
        return logits


def future(length: int, device: torch.device) -> Tensor:
    """True where a query may not look, [T, T]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def inverse_frequencies(planes: int = HEAD_DIM // 2, base: float = BASE) -> Tensor:
    """`base^(-j / planes)`, radians per position."""
    return base ** (-torch.arange(planes, dtype=torch.float32) / planes)


def alibi_slopes() -> Tensor:
    """The slopes of ALiBi for a number of heads that is a power of two."""
    return 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Rotary(nn.Module):
    """Cosines and sines, [T, D], in two equal halves."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(x.shape[1], device=x.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(steps, self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over halves of the last axis."""
    return x * cos + rotate_half(x) * sin


def root_mean_square(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x` over the root of its mean square, without a learned scale."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
