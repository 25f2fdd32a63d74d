"""A decoder as a researcher writes it, with a forget gate or a path-integral bias: dense, tokens by tokens.

Nothing in it knows of this library; it is what FoX and GRAPE-AP cost in plain torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATH_DIM = 8

#: What a layer keeps of the tokens it has seen: keys, values, and running sums or path vectors.
Kept = tuple[Tensor, Tensor, Tensor]


@dataclass
class Output:
    """Logits [B, T, vocabulary], and what each layer keeps."""

    logits: Tensor
    past_key_values: list[Kept]


class Attention(nn.Module):
    """Causal attention with an additive bias made of what the tokens say."""

    def __init__(self, hidden: int, heads: int, extra: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.extra = nn.Linear(hidden, heads * extra)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H * D] to [B, H, T, D]."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def forward(self, x: Tensor, past: Kept | None, seen: Tensor) -> tuple[Tensor, Kept]:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        bias, kept = self.bias(x, None if past is None else past[2], seen)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim) + bias
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        mixed: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return mixed, (key, value, kept)

    def bias(self, x: Tensor, past: Tensor | None, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The bias [B, H, T, keys], and what is kept for later tokens."""
        raise NotImplementedError


class Forgetting(Attention):
    """The Forgetting Transformer: b[t, j] = U[t] - U[j], U the running sum of log f over tokens."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads, 1)
        nn.init.constant_(self.extra.bias, 4.0)

    def bias(self, x: Tensor, past: Tensor | None, seen: Tensor) -> tuple[Tensor, Tensor]:
        total = F.logsigmoid(self.extra(x)).transpose(1, 2).cumsum(-1)
        keys = total
        if past is not None:
            total = total + past[..., -1:]
            keys = torch.cat((past, total), dim=-1)
        return total[..., :, None] - keys[..., None, :], keys


class AlongPaths(Attention):
    """GRAPE-AP: b[t, j] = sum over l = j+1 ... t of alpha_h logsigmoid(<p_t, R_l r_l> / 8), r = p / rms(p)."""

    slopes: Tensor

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads, PATH_DIM)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))

    def bias(self, x: Tensor, past: Tensor | None, seen: Tensor) -> tuple[Tensor, Tensor]:
        p = self.split(self.extra(x))
        start = 0 if past is None else past.shape[2]
        steps = torch.arange(start, start + x.shape[1], device=x.device)
        turned = turn(F.rms_norm(p, (PATH_DIM,), eps=1e-6), steps)
        keys = turned if past is None else torch.cat((past, turned), dim=2)
        edges = F.logsigmoid(p @ keys.transpose(-1, -2) / PATH_DIM)
        edges = (self.slopes.view(1, -1, 1, 1) * edges).masked_fill(~seen, 0.0)
        return edges.sum(-1, keepdim=True) - edges.cumsum(-1), keys


def turn(x: Tensor, steps: Tensor) -> Tensor:
    """Every plane (i, i + 4) of [B, H, T, 8] turned by l radians at token l."""
    angle = steps.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and a gated feed-forward."""

    def __init__(self, attention: Attention, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = attention
        self.gate, self.up = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.down = nn.Linear(3 * hidden, hidden)

    def forward(self, x: Tensor, past: Kept | None, seen: Tensor) -> tuple[Tensor, Kept]:
        mixed, kept = self.attention(self.attention_norm(x), past, seen)
        x = x + mixed
        normed = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), kept


class Decoder(nn.Module):
    """Token ids [B, T] to logits, called as the models of transformers are."""

    def __init__(
        self, attention: type[Forgetting | AlongPaths], hidden: int, heads: int, layers: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(attention(hidden, heads), hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(
        self, input_ids: Tensor, past_key_values: list[Kept] | None = None, use_cache: bool = True
    ) -> Output:
        x = self.embed(input_ids)
        tokens = x.shape[1]
        before = past_key_values[0][0].shape[2] if past_key_values else 0
        seen = torch.ones(tokens, before + tokens, dtype=torch.bool, device=x.device).tril(before)
        all_kept = []
        for index, block in enumerate(self.blocks):
            x, kept = block(x, past_key_values[index] if past_key_values else None, seen)
            all_kept.append(kept)
        return Output(self.head(self.norm(x)), all_kept if use_cache else [])
