"""ALiBi where scores have their axes in another order, softmax is written out, and distances are cut off."""

from __future__ import annotations

import torch
from attention_layers import HEAD_DIM, BiasedAttention, causal
from bias_spellings import (
    Attention,
    BiasSpelling,
    by_distance,
    fill_above_diagonal,
    scores_of,
)
from torch import Tensor

# Softmax written out.


def exponentials_over_their_sum(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed: Tensor = weights / weights.sum(-1, keepdim=True) @ value
    return mixed


def masked_behind_the_exponential(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    weights = (scores_of(query, key) + by_distance(slopes, key.shape[-2])).exp()
    weights = torch.where(causal(key.shape[-2]), weights, 0.0) * causal(key.shape[-2])
    mixed: Tensor = weights / weights.sum(-1).unsqueeze(-1) @ value
    return mixed


def divided_at_the_end(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    weights = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2])).exp()
    mixed: Tensor = weights @ value / weights.sum(-1, keepdim=True)
    return mixed


def less_the_logarithm_of_the_sum(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    mixed: Tensor = (scores - scores.logsumexp(-1, keepdim=True)).exp() @ value
    return mixed


def exponential_of_log_softmax(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    mixed: Tensor = scores.log_softmax(-1).exp() @ value
    return mixed


# Axes in another order.


def keys_before_queries(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    scores = key @ query.mT / HEAD_DIM**0.5 + by_distance(slopes, length).mT
    weights: Tensor = scores.masked_fill(~causal(length).T, float("-inf")).softmax(-2)
    return weights.mT @ value


def values_before_weights(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = (key @ query.mT / HEAD_DIM**0.5).mT + by_distance(slopes, key.shape[-2])
    return (value.mT @ fill_above_diagonal(scores).softmax(-1).mT).mT


def heads_behind_keys(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    scores = torch.einsum("bhtd,bhjd->btjh", query, key) / HEAD_DIM**0.5
    scores = scores + by_distance(slopes, length).permute(1, 2, 0)
    weights = scores.masked_fill(~causal(length)[..., None], float("-inf")).softmax(2)
    return torch.einsum("btjh,bhjd->bhtd", weights, value)


def heads_behind_queries(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    scores = torch.einsum("bhtd,bhjd->bthj", query, key) / HEAD_DIM**0.5
    scores = scores + by_distance(slopes, length).transpose(0, 1)
    weights = scores.masked_fill(~causal(length)[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bthj,bhjd->bhtd", weights, value)


def groups_that_share_a_key(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    batch, heads, length, width = query.shape
    key, value = key[:, :1, None], value[:, :1, None]
    scores = scores_of(query.view(batch, 1, heads, length, width), key)
    scores = scores + by_distance(slopes, length).unflatten(0, (1, heads))
    return (fill_above_diagonal(scores).softmax(-1) @ value).view(query.shape)


def groups_among_the_queries(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Heads that share a key are more queries of it."""
    batch, heads, length, width = query.shape
    scores = query.reshape(batch, 1, heads * length, width) @ key[:, :1].mT / HEAD_DIM**0.5
    scores = scores.view(batch, heads, length, length) + by_distance(slopes, length)
    weights = fill_above_diagonal(scores).softmax(-1).view(batch, 1, heads * length, length)
    return (weights @ value[:, :1]).view(query.shape)


def groups_by_name(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    batch, heads, length, width = query.shape
    groups = query.view(batch, 1, heads, length, width)
    scores = torch.einsum("bkgtd,bkjd->bkgtj", groups, key[:, :1]) / HEAD_DIM**0.5
    weights = fill_above_diagonal(scores + by_distance(slopes, length)[None]).softmax(-1)
    return torch.einsum("bkgtj,bkjd->bkgtd", weights, value[:, :1]).reshape(query.shape)


def folded_to_the_end(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Heads stay folded into the batch."""
    batch, heads, length, width = query.shape
    bias = by_distance(slopes, length).expand(batch, -1, -1, -1).reshape(-1, length, length).to(query.dtype)
    query, key, value = (part.reshape(-1, length, width) for part in (query, key, value))
    scores = torch.baddbmm(bias, query, key.mT, alpha=width**-0.5)
    return (fill_above_diagonal(scores).softmax(-1) @ value).view(batch, heads, length, width)


# Distances that are cut off where no query looks.


def by_distances(slopes: Tensor, distance: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = scores_of(query, key) + slopes.view(-1, 1, 1) * distance
    return fill_above_diagonal(scores).softmax(-1) @ value


def apart(key: Tensor) -> Tensor:
    steps = torch.arange(key.shape[-2])
    return steps - steps[:, None]


def below_the_diagonal(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    return by_distances(slopes, apart(key).tril(), query, key, value)


def never_above_zero(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    return by_distances(slopes, apart(key).clamp(max=0), query, key, value)


def where_seen(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    distance = apart(key)
    return by_distances(slopes, torch.where(distance <= 0, distance, 0), query, key, value)


def times_the_mask(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    distance = apart(key).to(query.dtype)
    return by_distances(slopes, distance * causal(key.shape[-2]), query, key, value)


def in_a_window(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    length = key.shape[-2]
    hidden = torch.where(causal(length) & causal(length).triu(-4), 0.0, float("-inf")).to(query.dtype)
    return (scores_of(query, key) + slopes.view(-1, 1, 1) * apart(key).tril() + hidden).softmax(-1) @ value


def _row(attention: Attention) -> BiasSpelling:
    return BiasSpelling(attention.__name__, lambda: BiasedAttention(attention))


LAYOUT_SPELLINGS = tuple(
    map(
        _row,
        (
            exponentials_over_their_sum,
            masked_behind_the_exponential,
            divided_at_the_end,
            less_the_logarithm_of_the_sum,
            exponential_of_log_softmax,
            keys_before_queries,
            values_before_weights,
            heads_behind_keys,
            heads_behind_queries,
            groups_that_share_a_key,
            groups_among_the_queries,
            groups_by_name,
            folded_to_the_end,
            below_the_diagonal,
            never_above_zero,
            where_seen,
            times_the_mask,
            in_a_window,
        ),
    )
)
