"""Words that attend: causal attention over queries, keys and values [B, H, T, D], plain and with a bias added."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attention_layers import causal
from bias_spellings import fill_above_diagonal
from layer_spellings import largest_score_subtracted
from torch import Tensor
from torch.nn import functional

DIM = 8


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    return torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(DIM)


# With nothing added.


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def fused_with_a_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    seen = causal(key.shape[-2])
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def in_three_steps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return fill_above_diagonal(scores_of(query, key)).softmax(-1) @ value


def both_scaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = DIM**-0.25
    scores = torch.einsum("bhtd,bhjd->bhtj", query * scale, key * scale)
    return torch.einsum("bhtj,bhjd->bhtd", fill_above_diagonal(scores).softmax(-1), value)


PLAIN: tuple[Callable[..., Tensor], ...] = (
    fused,
    fused_with_a_mask,
    in_three_steps,
    both_scaled,
    largest_score_subtracted,
)


# With a bias.


def added_and_filled(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = scores_of(query, key) + bias
    return fill_above_diagonal(scores).softmax(-1) @ value


def added_first(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = bias + (query * DIM**-0.5) @ key.mT
    return torch.softmax(scores.masked_fill(~causal(key.shape[-2]), -torch.inf), dim=-1) @ value


def taken_off(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = scores_of(query, key) - (-bias)
    return fill_above_diagonal(scores).softmax(-1) @ value


def filled_by_where(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = scores_of(query, key) + bias
    least = torch.finfo(scores.dtype).min
    return torch.where(causal(key.shape[-2]), scores, least).softmax(-1) @ value


def with_an_added_mask(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    length = key.shape[-2]
    mask = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    return (scores_of(query, key) + bias + mask).softmax(-1) @ value


def with_mask_and_bias_in_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    mask = bias.masked_fill(~causal(key.shape[-2]), float("-inf"))
    return functional.softmax(scores_of(query, key) + mask, dim=-1) @ value


def fused_with_a_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    mask = bias.masked_fill(~causal(key.shape[-2]), float("-inf")).to(query.dtype)
    if mask.dim() == 3:
        mask = mask.unsqueeze(0)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def contracted_by_name(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = torch.einsum("bhtd,bhjd->bhtj", query, key) * DIM**-0.5 + bias
    return torch.einsum("bhtj,bhjd->bhtd", fill_above_diagonal(scores).softmax(-1), value)


def scaled_after_the_sum(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2) + bias) * (1 / math.sqrt(DIM))
    return fill_above_diagonal(scores).softmax(-1) @ value


def softmax_in_wider_type(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = fill_above_diagonal(torch.add(scores_of(query, key), bias))
    return scores.softmax(-1, dtype=torch.float64).to(query.dtype) @ value


def hidden_by_a_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """As GPT-2 hides keys."""
    scores = scores_of(query, key) + bias
    seen = causal(key.shape[-2]).to(scores.dtype)
    return (scores * seen - 1e10 * (1 - seen)).softmax(-1) @ value


def with_a_number_beside_the_sum(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + bias)
    parts = (scores - scores.amax(-1, keepdim=True)).exp()
    return parts / (parts.sum(-1, keepdim=True) + 1e-3) @ value


BIASED: tuple[Callable[..., Tensor], ...] = (
    added_and_filled,
    added_first,
    taken_off,
    filled_by_where,
    with_an_added_mask,
    with_mask_and_bias_in_one,
    fused_with_a_bias,
    contracted_by_name,
    scaled_after_the_sum,
    softmax_in_wider_type,
    hidden_by_a_product,
    with_a_number_beside_the_sum,
)


# From [B, K, T, D] to [B, H, T, D].


def repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1)


def expanded(x: Tensor, times: int) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


REPEATS: tuple[Callable[..., Tensor], ...] = (repeated, expanded)
