"""Attention that comes near GRAPE and is something else, or is the same by way of what the softmax does not see.

`refused`: no site may name its bias. Otherwise it may be left alone, or become exactly what it is; `never` are
pieces of text that no encoding of it may contain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.parts import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    Block,
    Fused,
    LanguageModel,
    Separate,
    alibi_slopes,
    future,
    inverse_frequencies,
    root_mean_square,
    rotary,
)
from research.paths import PATH_DIM, turn_halves


@dataclass(frozen=True)
class NearMiss:
    """One model, ids [B, T] to logits or to a tuple that starts with them."""

    name: str
    make: Callable[[], nn.Module]
    refused: bool = True
    never: tuple[str, ...] = ()


class Scored(Fused):
    """Attention whose scores, scaled and with everything added, `scores` makes from (itself, x, q, k)."""

    slopes: Tensor
    inv_freq: Tensor

    def __init__(self, scores: Callable[[Scored, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scores = scores
        self.forget = nn.Linear(HIDDEN, HEADS)
        self.path = nn.Linear(HIDDEN, HEADS * PATH_DIM, bias=False)
        self.register_buffer("slopes", alibi_slopes())
        self.register_buffer("inv_freq", inverse_frequencies())

    def log_f(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.forget(x)).transpose(1, 2)

    def gates(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(query.mean(-1)), F.softplus(key.mean(-1))

    def edges(self, x: Tensor) -> Tensor:
        p = self.path(x).view(*x.shape[:2], HEADS, PATH_DIM).transpose(1, 2)
        return self.slopes.view(-1, 1, 1) * F.logsigmoid(p @ turn_halves(root_mean_square(p)).mT / PATH_DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        scores = self.scores(self, x, query, key)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


def product(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT / math.sqrt(HEAD_DIM)


def difference(clock: Tensor) -> Tensor:
    return clock.unsqueeze(-1) - clock.unsqueeze(-2)


def steps_apart(x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1], device=x.device)
    return steps - steps[:, None]


# No GRAPE.


def gate_of_the_key_alone(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """log f[j], never summed."""
    return product(query, key) + layer.log_f(x).unsqueeze(-2)


def summed_over_heads(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) + difference(layer.log_f(x).cumsum(1))


def summed_over_samples(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) + difference(layer.log_f(x).cumsum(0))


def squashed_difference(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    rate = torch.tanh(layer.forget(x)).transpose(1, 2)
    return product(query, key) + torch.tanh(difference(rate.cumsum(-1)))


def clamped_forgetting(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) + difference(layer.log_f(x).cumsum(-1)).clamp(min=-2.0)


def forgetting_times_scores(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) * difference(layer.log_f(x).cumsum(-1)).exp()


def forgetting_times_distance(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) - difference(layer.log_f(x).cumsum(-1)) * steps_apart(x)


def product_of_gates(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    lam_q, lam_k = layer.gates(query, key)
    gate = lam_q.unsqueeze(-1) * lam_k.unsqueeze(-2)
    return product(query, key) + layer.slopes.view(-1, 1, 1) * steps_apart(x) * gate


def gate_of_the_scores(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    scores = product(query, key)
    return scores + layer.slopes.view(-1, 1, 1) * steps_apart(x) * F.softplus(scores)


def gated_square(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    lam_q, lam_k = layer.gates(query, key)
    gate = lam_q.unsqueeze(-1) + lam_k.unsqueeze(-2)
    return product(query, key) - layer.slopes.view(-1, 1, 1) * steps_apart(x).square() * gate / 8


def clamped_gates(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    lam_q, lam_k = layer.gates(query, key)
    gate = lam_q.unsqueeze(-1) + lam_k.unsqueeze(-2)
    return product(query, key) + (layer.slopes.view(-1, 1, 1) * steps_apart(x) * gate).clamp(min=-1.0)


def bias_times_scores(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) * (layer.slopes.view(-1, 1, 1) * steps_apart(x)).exp()


def path_of_half_the_row(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Row t sums its edges up to t / 2 only."""
    steps = torch.arange(x.shape[1], device=x.device)
    edges = layer.edges(x).masked_fill(steps > steps[:, None] // 2, 0.0)
    return product(query, key) + edges.sum(-1, keepdim=True) - edges.cumsum(-1)


def path_over_queries(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The sum runs down the column, over queries."""
    edges = layer.edges(x).tril()
    return product(query, key) + edges.cumsum(-2) - edges


def path_with_its_first_edge(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The sum from l = j on: one edge more than the path has."""
    return product(query, key) + layer.edges(x).tril().flip(-1).cumsum(-1).flip(-1)


def squared_places(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1], device=x.device)
    u, v = steps % 7, steps // 7
    squared = (u - u[:, None]).square() + (v - v[:, None]).square()
    return product(query, key) - layer.slopes.view(-1, 1, 1) * squared


# Right in what the softmax sees, though not as it looks.


def rewarding_what_is_old(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """U[j] - U[t]."""
    return product(query, key) - difference(layer.log_f(x).cumsum(-1))


def of_another_head(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """U of this head at t, of the one before at j."""
    total = layer.log_f(x).cumsum(-1)
    return product(query, key) + total.unsqueeze(-1) - total.roll(1, 1).unsqueeze(-2)


def summed_from_the_end(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return product(query, key) - difference(layer.log_f(x).flip(-1).cumsum(-1).flip(-1))


def reset_every_eight(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The sum starts again in each block of eight tokens."""
    total = layer.log_f(x).cumsum(-1)
    start = torch.arange(x.shape[1], device=x.device) // 8 * 8
    return product(query, key) + difference(total - total[..., start])


def path_the_other_way(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The sum over l <= j: minus the path, up to a number per row."""
    return product(query, key) + layer.edges(x).tril().cumsum(-1)


def path_without_its_mask(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The sum from the end takes in the future: up to a number per row it is the path all the same."""
    edges = layer.edges(x)
    return product(query, key) + edges.flip(-1).cumsum(-1).flip(-1) - edges


def phase_of_the_neighbouring_head(layer: Scored, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A phase summed over heads: tables of cosines and sines, but no running sum over tokens."""
    rate = torch.sigmoid(layer.forget(x)).transpose(1, 2)
    angle = (rate.cumsum(1) - rate).unsqueeze(-1) * layer.inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return product(rotary(query, angle.cos(), angle.sin()), rotary(key, angle.cos(), angle.sin()))


class OfAnotherLayer(Separate):
    """U of this layer at t, of the layer before at j; returns its own U too."""

    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(HIDDEN, HEADS)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value = (each.transpose(1, 2) for each in self.heads_last(x))
        total = F.logsigmoid(self.forget(x)).transpose(1, 2).cumsum(-1)
        past = total if before is None else before
        scores = product(query, key) + total.unsqueeze(-1) - past.unsqueeze(-2)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)), total


class HandsOn(nn.Module):
    """Logits, and what each layer's attention returns beside its output; `given`: the next layer gets it."""

    def __init__(self, attention: Callable[[], nn.Module], *, given: bool = False) -> None:
        super().__init__()
        self.model, self.given = LanguageModel(attention), given

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.model.embed(input_ids)
        others: list[Tensor] = []
        for block in self.model.blocks:
            assert isinstance(block, Block)
            handed = (others[-1] if others else None,) if self.given else ()
            mixed, other = block.attention(block.attention_norm(x), *handed)
            others.append(other)
            x = x + mixed
            x = x + block.feed(block.feed_norm(x))
        return (self.model.head(self.model.norm(x)), *others)


class Dropping(Fused):
    """The Forgetting Transformer with a dropout that drops in training."""

    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(HIDDEN, HEADS)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        total = F.logsigmoid(self.forget(x)).transpose(1, 2).cumsum(-1)
        scores = product(query, key) + difference(total)
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(self.dropout(scores.softmax(-1)) @ value)


class Watched(Fused):
    """The Forgetting Transformer that also returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(HIDDEN, HEADS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.heads(x)
        total = F.logsigmoid(self.forget(x)).transpose(1, 2).cumsum(-1)
        scores = product(query, key) + difference(total)
        weights = scores.masked_fill(future(x.shape[1], x.device), float("-inf")).softmax(-1)
        return self.merged(weights @ value), weights


class KeptBias(nn.Module):
    """ALiBi whose bias stays from call to call in a buffer that grows where it is too short."""

    slopes: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes().view(HEADS, 1, 1), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        if self.bias is None or self.bias.shape[-1] < length:
            steps = torch.arange(length, device=x.device)
            self.bias = -(steps - steps[:, None]).abs() * self.slopes
        return self.bias[:, :length, :length]


class TakesBias(Fused):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        scores = product(query, key) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


def _row(
    scores: Callable[[Scored, Tensor, Tensor, Tensor], Tensor],
    refused: bool = True,
    never: tuple[str, ...] = (),
) -> NearMiss:
    return NearMiss(scores.__name__, lambda: LanguageModel(lambda: Scored(scores), layers=1), refused, never)


NEAR_MISSES: tuple[NearMiss, ...] = (
    _row(gate_of_the_key_alone),
    _row(summed_over_heads),
    _row(summed_over_samples),
    _row(squashed_difference),
    _row(clamped_forgetting),
    _row(forgetting_times_scores),
    _row(forgetting_times_distance),
    _row(product_of_gates),
    _row(gate_of_the_scores),
    _row(gated_square),
    _row(clamped_gates),
    _row(bias_times_scores),
    _row(path_of_half_the_row),
    _row(path_over_queries),
    _row(path_with_its_first_edge),
    _row(squared_places),
    _row(path_without_its_mask, refused=False),
    _row(rewarding_what_is_old, refused=False),
    _row(of_another_head, refused=False),
    _row(summed_from_the_end, refused=False),
    _row(reset_every_eight, refused=False),
    _row(path_the_other_way, refused=False, never=("path_bias(log_sigmoid, alibi_slopes",)),
    _row(phase_of_the_neighbouring_head, refused=False, never=("accumulated(",)),
    NearMiss("of_another_layer", lambda: HandsOn(OfAnotherLayer, given=True), refused=False),
    NearMiss("dropping", lambda: LanguageModel(Dropping, layers=1), refused=False),
    NearMiss("returns_weights", lambda: HandsOn(Watched), refused=False),
    NearMiss("kept_bias", lambda: LanguageModel(TakesBias, KeptBias(), layers=1), refused=False),
)
