"""Biases of padded batches: tables whose padding is filled in, distances of counted tokens cut off at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, causal, example, sharpen
from torch import Tensor, nn

from grape_compile import grape_compile, report

LOWEST = torch.finfo(torch.float32).min


class Padded(nn.Module):
    """Causal attention over x [B, T, hidden] whose scores `add` changes by what is `seen` [B, T]."""

    table: Tensor
    slopes: Tensor

    def __init__(self, add: Callable[[Padded, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.add = add
        slopes = torch.tensor([2.0**-2, 2.0**-4]).view(1, HEADS, 1, 1)
        self.register_buffer("slopes", slopes)
        self.register_buffer("table", slopes * torch.arange(-63.0, 1.0), persistent=False)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        scores = self.add(self, query @ key.mT / HEAD_DIM**0.5, seen)
        mixed: Tensor = scores.masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1) @ value
        return mixed


def filled(number: float) -> Callable[[Padded, Tensor, Tensor], Tensor]:
    """As MPT cuts its table to the mask, hides padding in it, and cuts it again to the scores."""

    def add(layer: Padded, scores: Tensor, seen: Tensor) -> Tensor:
        table = layer.table[..., max(0, layer.table.shape[-1] - seen.shape[-1]) :]
        table = table.masked_fill(~seen.view(-1, 1, 1, seen.shape[-1]), number)
        return scores + table[..., max(0, table.shape[-1] - scores.shape[-1]) :]

    return add


def cut_off(places: Callable[[Tensor], Tensor]) -> Callable[[Padded, Tensor, Tensor], Tensor]:
    """Distances between tokens as they are counted, none below zero."""

    def add(layer: Padded, scores: Tensor, seen: Tensor) -> Tensor:
        counted = places(seen)
        distance = (counted[:, None] - counted[..., None]).clamp(max=0)[:, None]
        return scores + layer.slopes * distance

    return add


def counted(seen: Tensor) -> Tensor:
    return (seen.cumsum(-1) - 1).clamp(min=0)


def counted_and_filled(seen: Tensor) -> Tensor:
    """A token that is padding stands at the start: places fall behind the last token."""
    return (seen.cumsum(-1) - 1).masked_fill(~seen, 0)


def counted_by_numbers(seen: Tensor) -> Tensor:
    """Nothing shows that whole numbers are no less than zero."""
    return seen.long().neg().cumsum(-1).neg() - 1


@pytest.mark.parametrize(
    ("add", "sites"),
    [
        (filled(LOWEST), 1),
        (filled(-5.0), 0),
        (cut_off(counted), 1),
        (cut_off(counted_and_filled), 0),
        (cut_off(counted_by_numbers), 0),
    ],
    ids=["filled", "filled by a number", "cut off", "places that fall", "numbers"],
)
def test_at_two_lengths(add: Callable[[Padded, Tensor, Tensor], Tensor], sites: int) -> None:
    """The example shows no padding, the next call does."""
    plain = sharpen(Padded(add))
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    for length, hidden in ((12, 0), (15, 4)):
        seen = torch.arange(length).expand(2, length) < torch.tensor([[length], [length - hidden]])
        with torch.no_grad():
            found, wanted = compiled(example(length), seen), plain(example(length), seen)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        told = report(compiled)
        assert (len(told.sites), bool(told.refusals)) == (sites, not sites), str(told)
