"""ALiBi as different people wrote it: one bias site each, found and equal to itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, HEADS, BiasedAttention, causal
from torch import Tensor, nn
from torch.nn import functional

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BiasSpelling:
    """One way to write attention with a linear bias: `make` builds a layer over [B, T, hidden]."""

    name: str
    make: Callable[[], nn.Module]


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    return torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(HEAD_DIM)


def by_distance(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return slopes[:, None, None] * (steps - steps[:, None])


def by_key(slopes: Tensor, length: int) -> Tensor:
    return slopes[:, None, None] * torch.arange(length)


def fill_above_diagonal(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(scores.shape[-1]), float("-inf"))


# How the bias is formed.


def distance_then_masked_fill(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = scores_of(query, key) + by_distance(slopes, key.shape[-2])
    return fill_above_diagonal(scores).softmax(-1) @ value


def key_position_only(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = scores_of(query, key) + by_key(slopes, key.shape[-2])
    return fill_above_diagonal(scores).softmax(-1) @ value


def distance_to_the_last_key(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    bias = torch.arange(1 - key.shape[-2], 1).view(1, 1, 1, -1) * slopes.view(1, -1, 1, 1)
    return fill_above_diagonal(scores_of(query, key) + bias).softmax(-1) @ value


def distance_subtracted(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    scores = scores_of(query, key) - slopes.view(-1, 1, 1) * (steps[:, None] - steps[None, :])
    return fill_above_diagonal(scores).softmax(-1) @ value


def bias_less_negated_scores(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = by_distance(slopes, key.shape[-2]) - (-scores_of(query, key))
    return fill_above_diagonal(scores).softmax(-1) @ value


def negated_as_a_whole(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    against = -scores_of(query, key) - by_distance(slopes, key.shape[-2])
    return (-against.masked_fill(~causal(key.shape[-2]), float("inf"))).softmax(-1) @ value


def mask_that_hides_itself(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """As BLT writes its masks: what is not zero is filled."""
    hidden = 1.0 - causal(key.shape[-2]).float()
    hidden = hidden.masked_fill(hidden.to(torch.bool), torch.finfo(torch.float32).min)
    return (scores_of(query, key) + by_distance(slopes, key.shape[-2]) + hidden).softmax(-1) @ value


def absolute_distance_below_the_diagonal(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    scores = scores_of(query, key) - slopes.view(-1, 1, 1) * (steps[:, None] - steps[None, :]).abs()
    return fill_above_diagonal(scores).softmax(-1) @ value


def product_of_rows_and_columns(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2]).to(slopes.dtype)
    scores = scores_of(query, key) + torch.einsum("h,j->hj", slopes, steps)[:, None]
    return fill_above_diagonal(scores).softmax(-1) @ value


def slopes_from_a_list(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    written_out = torch.tensor([0.25, 0.0625], dtype=query.dtype)
    return key_position_only(query, key, value, written_out)


# How it meets the scores.


def batched_multiply_add(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    bias = by_key(slopes, length).expand(HEADS, length, length).repeat(query.shape[0], 1, 1).to(query.dtype)
    scores = torch.baddbmm(
        bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), beta=1.0, alpha=1 / math.sqrt(HEAD_DIM)
    )
    weights = fill_above_diagonal(scores.view(*query.shape[:3], length)).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(query.shape)


def scaled_after_the_sum(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) + by_key(slopes, key.shape[-2])
    return fill_above_diagonal(scores * (1 / math.sqrt(HEAD_DIM))).softmax(-1) @ value


def query_scaled_before(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = (query * HEAD_DIM**-0.5) @ key.transpose(-1, -2) + by_distance(slopes, key.shape[-2])
    return fill_above_diagonal(scores).softmax(-1) @ value


def contracted_by_name(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = torch.einsum("bhtd,bhjd->bhtj", query, key) / math.sqrt(HEAD_DIM)
    weights = fill_above_diagonal(scores + by_distance(slopes, key.shape[-2])).softmax(-1)
    return torch.einsum("bhtj,bhjd->bhtd", weights, value)


def bias_first(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = by_key(slopes, key.shape[-2]) + scores_of(query, key)
    return fill_above_diagonal(scores).softmax(-1) @ value


# How the mask is written.


def mask_by_where(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = scores_of(query, key) + by_distance(slopes, key.shape[-2])
    least = torch.finfo(scores.dtype).min
    return torch.where(causal(key.shape[-2]), scores, least).softmax(-1) @ value


def mask_by_a_tensor_of_one(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = scores_of(query, key) + by_distance(slopes, key.shape[-2])
    hidden = torch.tensor(float("-inf"), dtype=scores.dtype)
    return torch.where(causal(key.shape[-2]), scores, hidden).softmax(-1) @ value


def added_and_filled_in_place(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = scores_of(query, key)
    scores += by_distance(slopes, key.shape[-2])
    scores.masked_fill_(~causal(key.shape[-2]), float("-inf"))
    return scores.softmax(-1) @ value


def mask_added(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    mask = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    return (scores_of(query, key) + by_key(slopes, length) + mask).softmax(-1) @ value


def mask_and_bias_in_one(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    mask = fill_above_diagonal(by_distance(slopes, key.shape[-2]))
    return (scores_of(query, key) + mask).softmax(-1) @ value


def fused_attention_with_a_mask(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    mask = fill_above_diagonal(by_distance(slopes, key.shape[-2]))[None].to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def fused_attention_by_key(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    least = torch.finfo(query.dtype).min
    mask = torch.where(causal(key.shape[-2]), by_key(slopes, key.shape[-2]), least).to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=0.2)


def sliding_window(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    seen = causal(length) & ~causal(length).tril(-5)
    scores = scores_of(query, key) + by_distance(slopes, length)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def softmax_in_wider_type(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    return scores.softmax(-1, dtype=torch.float64).to(query.dtype) @ value


def through_axes_of_one(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    mask = fill_above_diagonal(by_distance(slopes, key.shape[-2])).to(query.dtype)
    mask = mask.unsqueeze(0).reshape(1, *mask.shape) * 1.0
    scores = torch.cat((scores_of(query, key) + mask,), dim=-1)
    return scores[None][0].softmax(-1) @ value


def raised_to_the_lowest(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """As OPT and Baichuan keep minus infinity out of their scores."""
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    return torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).softmax(-1) @ value


def mask_multiplied(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """As GPT-2 hides keys."""
    scores = scores_of(query, key) + by_distance(slopes, key.shape[-2])
    seen = causal(key.shape[-2]).to(scores.dtype)
    return (scores * seen - 1e10 * (1 - seen)).softmax(-1) @ value


class MaskKept(nn.Module):
    """As OpenAI's GPT hides keys, by ones and zeros in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = BiasedAttention(self.hidden)
        self.register_buffer("seen", causal(64).float().view(1, 1, 64, 64), persistent=False)

    def hidden(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        length = key.shape[-2]
        seen = self.seen[:, :, :length, :length]
        scores = scores_of(query, key) + by_distance(slopes, length)
        return (scores * seen + -1e4 * (1 - seen)).softmax(-1) @ value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class LearnedSlopes(nn.Module):
    """Slopes that are trained."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.inner = BiasedAttention(self.with_own_slopes)
        self.attention = attention
        self.log_slopes = nn.Parameter(torch.tensor([-1.0, -2.0]))

    def with_own_slopes(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        return self.attention(query, key, value, self.log_slopes.exp())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


# What stands beside the bias.


def above_a_soft_cap(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """As Gemma 2 caps its scores."""
    scores = scores_of(query, key) / 2.0
    scores = torch.tanh(scores) * 2.0
    return fill_above_diagonal(scores + by_distance(slopes, key.shape[-2])).softmax(-1) @ value


def beside_sinks(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """As gpt-oss adds its sinks."""
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    sinks = (1.0 - 3.0 * slopes).reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    combined = torch.cat([scores, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    weights = functional.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
    return functional.dropout(weights, p=0.0, training=False) @ value


def one_beside_the_sum(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """A sink of logit zero ("softmax off by one")."""
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    parts = scores.exp()
    return parts / (1 + parts.sum(-1, keepdim=True)) @ value


def two_beside_the_sum(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The same of logit log 2, the largest score taken off."""
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    largest = scores.amax(-1, keepdim=True)
    parts = (scores - largest).exp()
    return parts / (parts.sum(-1, keepdim=True) + 2 * (-largest).exp()) @ value


def _row(attention: Attention) -> BiasSpelling:
    return BiasSpelling(attention.__name__, lambda: BiasedAttention(attention))


BIAS_SPELLINGS: tuple[BiasSpelling, ...] = (
    _row(distance_then_masked_fill),
    _row(key_position_only),
    _row(distance_to_the_last_key),
    _row(distance_subtracted),
    _row(bias_less_negated_scores),
    _row(negated_as_a_whole),
    _row(mask_that_hides_itself),
    _row(absolute_distance_below_the_diagonal),
    _row(product_of_rows_and_columns),
    _row(slopes_from_a_list),
    _row(batched_multiply_add),
    _row(scaled_after_the_sum),
    _row(query_scaled_before),
    _row(contracted_by_name),
    _row(bias_first),
    _row(mask_by_where),
    _row(mask_by_a_tensor_of_one),
    _row(added_and_filled_in_place),
    _row(mask_added),
    _row(mask_and_bias_in_one),
    _row(fused_attention_with_a_mask),
    _row(fused_attention_by_key),
    _row(sliding_window),
    _row(softmax_in_wider_type),
    _row(through_axes_of_one),
    _row(raised_to_the_lowest),
    _row(mask_multiplied),
    _row(above_a_soft_cap),
    _row(beside_sinks),
    _row(one_beside_the_sum),
    _row(two_beside_the_sum),
    BiasSpelling("mask_kept", MaskKept),
    BiasSpelling("learned_slopes", lambda: LearnedSlopes(distance_then_masked_fill)),
)
