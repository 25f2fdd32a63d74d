"""ALiBi: b[t, j] = beta_h (j - t), or -beta_h |t - j| where attention looks both ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from research.parts import HEAD_DIM, HEADS, HIDDEN, Fused, Separate, alibi_slopes, future


class Sloped(Fused):
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes())


class FloatMask(Sloped):
    """Bias and -inf in one float mask of the fused attention."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        positions = torch.arange(x.shape[1], device=x.device)
        bias = self.slopes.view(1, -1, 1, 1) * (positions[None, :] - positions[:, None])
        bias = bias.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype)))


class BatchedMultiplyAdd(Sloped):
    """Scale, product and bias in one baddbmm over batch times heads."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.heads(x)
        bias = self.slopes[:, None] * torch.arange(length, device=x.device, dtype=x.dtype)
        bias = bias.repeat(batch, 1).view(batch * HEADS, 1, length)
        query, key = query.reshape(-1, length, HEAD_DIM), key.reshape(-1, length, HEAD_DIM)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), beta=1.0, alpha=1.0 / math.sqrt(HEAD_DIM))
        scores = scores.view(batch, HEADS, length, length)
        scores = scores.masked_fill(future(length, x.device), torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1).view(batch * HEADS, length, length)
        mixed = torch.bmm(weights, value.reshape(batch * HEADS, length, HEAD_DIM))
        return self.merged(mixed.view(batch, HEADS, length, HEAD_DIM))


class BeforeScaling(Sloped):
    """Added before the scores are scaled: the slopes are divided by sqrt(d) with them."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        steps = torch.arange(x.shape[1], device=x.device)
        scores = query @ key.transpose(-2, -1) + self.slopes[:, None, None] * (steps - steps[:, None])
        scores = scores / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class AfterScaling(Sloped):
    """Added to scaled scores; the slopes are worked out in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        ratio = 2.0 ** (-8.0 / HEADS)
        slopes = torch.tensor([ratio ** (head + 1) for head in range(HEADS)], device=x.device, dtype=x.dtype)
        behind = torch.arange(x.shape[1], device=x.device).view(-1, 1) - torch.arange(
            x.shape[1], device=x.device
        )
        scores = query @ key.transpose(-2, -1) * HEAD_DIM**-0.5
        scores = scores - slopes.view(1, HEADS, 1, 1) * behind
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class BothWays(Sloped):
    """Every token sees every token."""

    causal = False

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        steps = torch.arange(x.shape[1], device=x.device)
        bias = -self.slopes[:, None, None] * (steps[:, None] - steps[None, :]).abs()
        return self.merged((query @ key.mT / math.sqrt(HEAD_DIM) + bias).softmax(-1) @ value)


class BothWaysFloatMask(Sloped):
    """Every token sees every token, through the fused attention."""

    causal = False

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        positions = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        bias = torch.abs(positions[None] - positions[:, None]).mul(-1) * self.slopes.view(1, HEADS, 1, 1)
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))


class NormalisedQueriesAndKeys(Sloped):
    """Root-mean-square norms on queries and keys; the bias reads neither."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.key_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        query, key = self.query_norm(query), self.key_norm(key)
        steps = torch.arange(x.shape[1], device=x.device)
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + self.slopes.view(-1, 1, 1) * (steps - steps[:, None])
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class HeadsLast(Separate):
    """[B, T, H, D] as flash attention has it, the bias by the key alone."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads_last(x)
        bias = einsum("h,j->hj", self.slopes, torch.arange(x.shape[1], device=x.device, dtype=x.dtype))
        scores = einsum("bthd,bshd->bhts", query, key * HEAD_DIM**-0.5) + bias.unsqueeze(1)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        out: Tensor = self.out(einsum("bhts,bshd->bthd", scores.softmax(-1), value).flatten(2))
        return out


class PositionalBias(nn.Module):
    """The bias of all layers, made once per forward pass, as a module of its own [H, T, T]."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes().view(HEADS, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        i = j = x.shape[-2]
        rows, columns = torch.arange(j - i, j, device=x.device), torch.arange(j, device=x.device)
        bias = -torch.abs(columns[None, None, :] - rows[None, :, None])
        return bias * self.slopes


class TakesBias(Separate):
    """Takes the bias as an argument, names its axes i and j."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.heads_last(x))
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * (HEAD_DIM**-0.5)
        dots = dots + bias
        i, j = dots.shape[-2:]
        causal_mask = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        dots = dots.masked_fill(causal_mask, -torch.finfo(dots.dtype).max)
        attn = dots.softmax(dim=-1)
        mixed = einsum("b h i j, b h j d -> b h i d", attn, v)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], HIDDEN))
        return out
