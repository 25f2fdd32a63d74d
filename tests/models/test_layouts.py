"""Attention whose axes stand in another order, and near misses of it: found at every length, or left as it is."""

import copy

import pytest
import torch
from attention_layers import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    BiasedAttention,
    causal,
    example,
    inverse_frequencies,
    sharpen,
)
from bias_spellings import BiasSpelling, by_distance, fill_above_diagonal, scores_of
from layout_spellings import LAYOUT_SPELLINGS, apart, by_distances
from torch import Tensor, nn
from torch.export import Dim

from grape_compile import Report, rewrite

EXACT = 1e-10


def rewritten(layer: nn.Module) -> Report:
    """What is found in a layer of open length that then computes what it did."""
    plain = sharpen(layer).double()
    x = example().double()
    program = torch.export.export(
        copy.deepcopy(plain), (x,), dynamic_shapes=({1: Dim.DYNAMIC},), strict=False
    )
    new, found = rewrite(program)
    for length in (12, 17):
        x = example(length).double()
        torch.testing.assert_close(new.module()(x), plain(x), rtol=EXACT, atol=EXACT)
    return found


@pytest.mark.parametrize("spelling", LAYOUT_SPELLINGS, ids=lambda row: row.name)
def test_a_bias_at_every_length(spelling: BiasSpelling) -> None:
    found = rewritten(spelling.make())
    assert found.refusals == (), str(found)
    assert [str(site.encoding) for site in found.sites] == ["bias(constant((0.25, 0.0625)), steps)"], str(
        found
    )


class ChannelsFirst(nn.Module):
    """Heads of [channels, tokens], as convolutions make them."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HEAD_DIM // 2))
        self.qkv = nn.Conv1d(HIDDEN, 3 * HIDDEN, 1, bias=False)

    def turn(self, x: Tensor) -> Tensor:
        angle = self.inv_freq[:, None] * torch.arange(x.shape[-1]).to(x.dtype)
        cos, sin = (torch.cat((table, table)) for table in (angle.cos(), angle.sin()))
        first, second = x.chunk(2, dim=-2)
        return x * cos + torch.cat((-second, first), dim=-2) * sin

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x.mT).view(x.shape[0], 3, HEADS, HEAD_DIM, -1).unbind(1)
        scores = torch.einsum("bhdt,bhdj->bhtj", self.turn(query), self.turn(key)) / HEAD_DIM**0.5
        weights = scores.masked_fill(~causal(x.shape[1]), float("-inf")).softmax(-1)
        return torch.einsum("bhtj,bhdj->bthd", weights, value).flatten(2)


def test_channels_before_tokens() -> None:
    found = rewritten(ChannelsFirst())
    assert [str(site.encoding) for site in found.sites] == [
        "rotation(half(16), geometric(10000.0), steps)"
    ] * 2


def cut_on_the_other_side(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    return by_distances(slopes, apart(key).clamp(min=0), query, key, value)


def cut_without_a_mask(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    return (scores_of(query, key) + slopes.view(-1, 1, 1) * apart(key).tril()).softmax(-1) @ value


def cut_below(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    return by_distances(slopes, apart(key).tril(-1) + apart(key).tril(-3), query, key, value)


def mask_of_the_other_axes(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = scores_of(query, key) + slopes.view(-1, 1, 1) * apart(key).tril()
    return scores.masked_fill(~causal(key.shape[-2]).T, -1e9).softmax(-1) @ value


def more_than_the_sum(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    weights = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2])).exp()
    mixed: Tensor = weights / (weights.sum(-1, keepdim=True) + 1.0) @ value
    return mixed


def sum_of_other_exponentials(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    mixed: Tensor = scores.exp() / (2 * scores).exp().sum(-1, keepdim=True) @ value
    return mixed


def softmax_along_queries(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = fill_above_diagonal(scores_of(query, key) + by_distance(slopes, key.shape[-2]))
    return scores.softmax(-2).nan_to_num() @ value


@pytest.mark.parametrize(
    "attention",
    [
        cut_on_the_other_side,
        cut_without_a_mask,
        cut_below,
        mask_of_the_other_axes,
        more_than_the_sum,
        sum_of_other_exponentials,
        softmax_along_queries,
    ],
    ids=lambda attention: attention.__name__,
)
def test_near_misses_stay_and_are_told(attention) -> None:  # type: ignore[no-untyped-def] # parametrised
    found = rewritten(BiasedAttention(attention))
    assert found.sites == (), str(found)
    assert found.refusals
