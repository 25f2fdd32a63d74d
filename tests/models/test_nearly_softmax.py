"""Weights that are nearly a softmax: what is added to their scores is found, and they stay as the model makes them."""

import copy
from collections.abc import Callable

import pytest
import torch
from attention_layers import BiasedAttention, assert_trains_alike, example, sharpen
from bias_spellings import by_distance, by_key, fill_above_diagonal, scores_of
from torch import Tensor

from grape_compile import grape_compile, inspect, report, rewrite

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def biased(query: Tensor, key: Tensor, slopes: Tensor) -> Tensor:
    return fill_above_diagonal(scores_of(query, key) + by_key(slopes, key.shape[-2]))


def epsilon(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = biased(query, key, slopes)
    parts = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return parts / (parts.sum(-1, keepdim=True) + 1e-3) @ value


def one(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The largest score is taken off, so that the one is no sink of a known logit."""
    scores = biased(query, key, slopes)
    parts = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return parts / (1 + parts.sum(dim=-1, keepdim=True)) @ value


def raised(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = biased(query, key, slopes)
    parts = torch.exp(scores - scores.amax(-1, keepdim=True))
    return parts / parts.sum(dim=-1, keepdim=True).clamp(min=1.5) @ value


@pytest.mark.parametrize("attention", [epsilon, one, raised])
def test_its_bias_is_rewritten_alone(attention: Attention) -> None:
    """Outputs and gradients in float64, at a second length too, and of an exported program."""
    plain = sharpen(BiasedAttention(attention)).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    assert_trains_alike(plain, compiled, (12, 19))
    x = example().double()
    (site,) = report(compiled).sites
    assert (site.kind, site.lowering, report(compiled).refusals) == ("bias", "grape::logit_bias", ())
    program, found = rewrite(torch.export.export(plain, (x,), strict=False))
    assert len(found.sites) == 1
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-10, atol=1e-10)


def not_taken_off(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """What is added to a whole row is seen here."""
    parts = biased(query, key, slopes).exp()
    return parts / parts.sum(dim=-1, keepdim=True).clamp(min=1.5) @ value


def read_elsewhere(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = biased(query, key, slopes)
    parts = torch.exp(scores - scores.amax(-1, keepdim=True))
    return parts / (1 + parts.sum(dim=-1, keepdim=True)) @ value + scores.amax(-1, keepdim=True).sigmoid()


def hidden_afterwards(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The largest score may be one that is hidden."""
    scores = scores_of(query, key) + by_distance(slopes, key.shape[-2])
    parts = torch.exp(scores - scores.amax(-1, keepdim=True)).tril()
    return parts / (1 + parts.sum(dim=-1, keepdim=True)) @ value


def of_another_largest(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    scores = biased(query, key, slopes)
    parts = torch.exp(scores - scores.flip(1).amax(-1, keepdim=True))
    return parts / (1 + parts.sum(dim=-1, keepdim=True)) @ value


@pytest.mark.parametrize("attention", [not_taken_off, read_elsewhere, hidden_afterwards, of_another_largest])
def test_what_would_see_a_number_of_each_row_is_told(attention: Attention) -> None:
    plain = sharpen(BiasedAttention(attention)).double()
    found = inspect(plain, (example().double(),))
    assert found.sites == (), str(found)
    assert found.refusals
