"""Attention with ALiBi in which one thing is wrong.

`refused`: what is added to the scores is not `slope * (j - t)` up to a constant per row, or the scores are
more than a scaled product: no site may name it. Otherwise it may be refused, or become an encoding that
equals it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, BiasedAttention, causal
from torch import Tensor, nn

Bias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BiasMutant:
    """One wrong bias: `make` builds an attention layer; `told`: its refusal needs a sentence."""

    name: str
    make: Callable[[], nn.Module]
    refused: bool = True
    told: bool = True


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    scale = 1 / math.sqrt(query.shape[-1])
    return torch.matmul(query, key.transpose(-1, -2)) * scale


def weights_of(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(scores.shape[-1]), float("-inf")).softmax(dim=-1)


def added(bias: Bias) -> Callable[[], nn.Module]:
    """A layer that adds `bias(slopes [H, 1, 1], t [T, 1], j [T])` to its scores."""

    def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        steps = torch.arange(key.shape[-2])
        bias_of = bias(slopes[:, None, None], steps[:, None], steps)
        return weights_of(scores_of(query, key) + bias_of) @ value

    return lambda: BiasedAttention(attention)


def linear(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The right bias."""
    return slopes * (key - query)


def bucketed(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * ((key - query) // 4)


def saturated(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (key - query).clamp(min=-6)


def slope_of_each_key(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (1 + 0.1 * key) * (key - query)


def slope_of_each_query(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (1 + 0.1 * query) * key


def quadratic(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return -slopes * (key - query).square()


def logarithmic(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return -slopes * (1 + (key - query).abs()).log()


def one_key_off(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Linear everywhere but at one key."""
    return slopes * (key - query) + 0.5 * (key == 3)


def one_row_off(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Linear in every row but one, whose slope is doubled."""
    return slopes * (key - query) * (1 + (query == 7).to(slopes.dtype))


def within_blocks(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (key % 8)


def saturated_beyond(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Linear for as long as the sequence it is captured with."""
    return slopes * (key - query).clamp(min=-15)


def saturated_by_where_beyond(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Linear in the key until the sixteenth."""
    return slopes * torch.where(key < 16, key, 16)


def bucketed_beyond(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """T5's buckets: exact for short distances, logarithmic for long ones."""
    distance = query - key
    far = 16 + (distance.clamp(min=1) / 16).log()
    return -slopes * torch.where(distance < 16, distance.to(far.dtype), far)


def slopes_as_given(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (key - query) + 3.0


def of_the_previous_key(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (key - 1 - query)


def rewarding_distance(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return slopes * (query - key)


def under_tanh(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    return weights_of(biased.tanh()) @ value


def under_a_soft_cap(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    return weights_of(5.0 * (biased / 5.0).tanh()) @ value


def moved_under_a_soft_cap(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The bias stands above the cap, as it should, but the product under it is moved by a number."""
    steps = torch.arange(key.shape[-2])
    capped = 2.0 * ((scores_of(query, key) + 0.5) / 2.0).tanh()
    return weights_of(capped + linear(slopes[:, None, None], steps[:, None], steps)) @ value


def two_soft_caps(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    capped = 2.0 * (3.0 * (scores_of(query, key) / 3.0).tanh() / 2.0).tanh()
    return weights_of(capped + linear(slopes[:, None, None], steps[:, None], steps)) @ value


def hidden_under_a_soft_cap(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """A key that is hidden below the cap still has a weight."""
    steps = torch.arange(key.shape[-2])
    scores = scores_of(query, key).masked_fill(~causal(key.shape[-2]), float("-inf"))
    capped = 2.0 * (scores / 2.0).tanh()
    return (capped + linear(slopes[:, None, None], steps[:, None], steps)).softmax(-1) @ value


def row_beside_a_sink(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi up to a number of each row, which softmax alone would not see and a sink does."""
    biased = scores_of(query, key) + slopes[:, None, None] * torch.arange(key.shape[-2])
    hidden = biased.masked_fill(~causal(key.shape[-2]), float("-inf"))
    return with_sinks(hidden, slopes) @ value


def sink_that_is_a_key(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The first key's weight is dropped, not the sink's."""
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    hidden = biased.masked_fill(~causal(key.shape[-2]), float("-inf"))
    column = slopes.reshape(1, -1, 1, 1).expand(*hidden.shape[:-1], 1)
    return torch.cat([hidden, column], -1).softmax(-1)[..., 1:] @ value


def with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """Weights beside a sink of each head."""
    column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def multiplied_by_halves(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """What looks like a mask that hides the future halves the score of one key as well."""
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    seen = causal(key.shape[-2]).to(query.dtype) * torch.where(steps == 3, 0.5, 1.0).to(query.dtype)
    return (biased * seen - 1e10 * (1 - seen)).softmax(dim=-1) @ value


def filled_beside_what_is_multiplied(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Scores are zero where one mask says so, and lowered where another does."""
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    seen, other = (causal(key.shape[-2]).roll(by, 0).to(query.dtype) for by in (0, 1))
    return (biased * seen - 1e10 * (1 - other)).softmax(dim=-1) @ value


def less_the_largest_of_all(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The number beside the sum is a sink that moves with scores of other rows, hardly to be seen in most."""
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    hidden = biased.masked_fill(~causal(key.shape[-2]), float("-inf"))
    parts = (hidden - biased.max()).exp()
    return parts / (parts.sum(-1, keepdim=True) + 1e-14) @ value


def scaled_by_the_scores(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    bias = linear(slopes[:, None, None], steps[:, None], steps)
    return weights_of(scores_of(query, key) * (1 + bias)) @ value


def after_the_softmax(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    bias = linear(slopes[:, None, None], steps[:, None], steps)
    return (weights_of(scores_of(query, key)) + bias.tril()) @ value


def softmax_over_queries(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    biased = scores_of(query, key) + linear(slopes[:, None, None], steps[:, None], steps)
    return biased.masked_fill(~causal(biased.shape[-1]), -1e9).softmax(dim=-2) @ value


def both_ways_signed(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    bias = linear(slopes[:, None, None], steps[:, None], steps)
    return (scores_of(query, key) + bias).softmax(dim=-1) @ value


def both_ways_by_distance(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    bias = -slopes[:, None, None] * (steps[:, None] - steps).abs()
    return (scores_of(query, key) + bias).softmax(dim=-1) @ value


class KeptTable(nn.Module):
    """The right bias, mask included, in a buffer that anybody may write to after it was looked at."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        steps = torch.arange(64)
        bias = linear(torch.tensor([0.25, 0.0625])[:, None, None], steps[:, None], steps)
        self.register_buffer("table", bias.masked_fill(~causal(64), float("-inf")))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        scores = scores_of(query, key) + self.table[:, :length, :length]
        return torch.matmul(scores.softmax(-1), value).transpose(1, 2).flatten(-2)


def _layer(attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: BiasedAttention(attention)


NOT_LINEAR: tuple[Bias, ...] = (
    bucketed,
    saturated,
    slope_of_each_key,
    slope_of_each_query,
    quadratic,
    logarithmic,
    one_key_off,
    one_row_off,
    within_blocks,
)
NOT_PLAIN = (
    under_tanh,
    under_a_soft_cap,
    moved_under_a_soft_cap,
    two_soft_caps,
    hidden_under_a_soft_cap,
    row_beside_a_sink,
    multiplied_by_halves,
    filled_beside_what_is_multiplied,
    less_the_largest_of_all,
)
# Nothing is added to a score that a softmax over the keys reads: there is no place to tell of.
NOT_ADDED = (scaled_by_the_scores, softmax_over_queries, after_the_softmax, sink_that_is_a_key)

BIAS_MUTANTS: tuple[BiasMutant, ...] = (
    *(BiasMutant(wrong.__name__, added(wrong)) for wrong in NOT_LINEAR),
    *(BiasMutant(wrong.__name__, _layer(wrong)) for wrong in NOT_PLAIN),
    *(BiasMutant(wrong.__name__, _layer(wrong), told=False) for wrong in NOT_ADDED),
    BiasMutant("both_ways_signed", _layer(both_ways_signed), refused=False),
    BiasMutant("both_ways_by_distance", _layer(both_ways_by_distance), refused=False),
    BiasMutant("kept_table", KeptTable, refused=False),
    BiasMutant("constant_added", added(slopes_as_given), refused=False),
    BiasMutant("of_the_previous_key", added(of_the_previous_key), refused=False),
    BiasMutant("rewarding_distance", added(rewarding_distance), refused=False),
)

# Linear for as long as the sequence the graph was captured with: see the rotations of the same kind.
LATE_MUTANTS: tuple[BiasMutant, ...] = (
    BiasMutant("saturated_beyond", added(saturated_beyond), refused=False),
    BiasMutant("saturated_by_where_beyond", added(saturated_by_where_beyond), refused=False),
    BiasMutant("bucketed_beyond", added(bucketed_beyond), refused=False),
)
