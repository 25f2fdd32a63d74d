"""Small attention layers into which hand-written position encodings are put, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 32
HEADS = 2
HEAD_DIM = 16
BASE = 10000.0

Turn = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def inverse_frequencies(planes: int, base: float = BASE) -> Tensor:
    """`base^(-j / planes)`, radians per position."""
    return base ** (-torch.arange(planes, dtype=torch.float32) / planes)


def causal(length: int) -> Tensor:
    """True where a query may look: on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention with nothing added."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


class Angles(nn.Module):
    """Angle of every position in every plane, [T, planes]."""

    inv_freq: Tensor

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(planes))

    def forward(self, x: Tensor, length: int) -> Tensor:
        positions = torch.arange(length, device=x.device)
        return torch.outer(positions.to(x.dtype), self.inv_freq)


class RotaryAttention(nn.Module):
    """Attention over [B, T, hidden] that gives queries and keys, [B, H, T, D], to `turn` with their angles.

    `key_turn` turns the keys where they differ. With `expose` the turned queries and keys are returned too,
    as a cache would keep them: an error that cancels in the scores shows there.
    """

    def __init__(
        self,
        turn: Turn,
        key_turn: Turn | None = None,
        *,
        angles: nn.Module | None = None,
        kv_heads: int = HEADS,
        expose: bool = False,
        attention: Score = attend,
    ) -> None:
        super().__init__()
        self.turn, self.key_turn = turn, key_turn or turn
        self.angles = angles or Angles(HEAD_DIM // 2)
        self.kv_heads, self.expose, self.attention = kv_heads, expose, attention
        self.query = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(HIDDEN, kv_heads * HEAD_DIM, bias=False)
        self.value = nn.Linear(HIDDEN, kv_heads * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        key = self.key(x).view(batch, length, self.kv_heads, HEAD_DIM).transpose(1, 2)
        value = self.value(x).view(batch, length, self.kv_heads, HEAD_DIM).transpose(1, 2)
        angle = self.angles(x, length)
        query, key = self.turn(query, angle), self.key_turn(key, angle)
        repeats = HEADS // self.kv_heads
        mixed = self.attention(query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))
        return (out, query, key) if self.expose else out


class BiasedAttention(nn.Module):
    """Attention over [B, T, hidden] whose scores, weights and masks are the business of `attention`."""

    slopes: Tensor

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("slopes", torch.tensor([2.0**-2, 2.0**-4])[:HEADS])
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        mixed = self.attention(heads[0], heads[1], heads[2], self.slopes)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))
        return out


def example(length: int = 12, batch: int = 2, seed: int = 0) -> Tensor:
    """Input for the layers above, [B, T, hidden]."""
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def sharpen(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the projections so that attention is sharp: a wrong angle must be seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise * 1.5 / module.in_features**0.5)
    return layer.eval()


def assert_trains_alike(
    plain: nn.Module, compiled: nn.Module, lengths: Iterable[int], gradient_tolerance: float = 1e-9
) -> None:
    """Outputs and gradients of two layers in float64, at every length."""
    for length in lengths:
        x, gradients = example(length).double(), []
        for layer in (plain, compiled):
            layer.zero_grad()
            torch.autograd.backward(layer(x), example(length, seed=1).double())
            gradients.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(*gradients[::-1], rtol=gradient_tolerance, atol=gradient_tolerance)
