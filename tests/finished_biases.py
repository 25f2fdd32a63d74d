"""ALiBi that lies finished in a buffer, as libraries keep it and cut it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, causal
from torch import Tensor, nn

KEPT = 64
SLOPES = torch.tensor([0.3, 0.07])
Cut = Callable[["Kept", Tensor, int], Tensor]
"""Scores [B, H, T, T] with the bias of T keys."""


class Kept(nn.Module):
    """Attention over [B, T, hidden] with a buffer `table`, and slopes that are trained where `learned`."""

    table: Tensor

    def __init__(self, table: Tensor, cut: Cut, *, persistent: bool = False, learned: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=persistent)
        self.slopes = nn.Parameter(SLOPES.clone()) if learned else None
        self.cut = cut
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        scores = self.cut(self, query @ key.transpose(-1, -2) / HEAD_DIM**0.5, length)
        mixed: Tensor = scores.softmax(-1) @ value
        return mixed.transpose(1, 2).flatten(-2)


@dataclass(frozen=True)
class FinishedBias:
    """A table of `size` tokens, and how it is cut; `learned` slopes are times a table of distances."""

    cut: Cut
    table: Callable[[int], Tensor]
    learned: bool = False

    def make(self, size: int = KEPT, *, persistent: bool = False) -> Kept:
        """A layer with a table of its own."""
        return Kept(self.table(size).clone(), self.cut, persistent=persistent, learned=self.learned)


def apart(size: int) -> Tensor:
    """[T, T]: the key less the query."""
    steps = torch.arange(size)
    return steps - steps[:, None]


def later(size: int) -> Tensor:
    """[T, T]: minus infinity at all later keys."""
    return torch.full((size, size), -torch.inf).triu(1)


def filled(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(scores.shape[-1]), -torch.inf)


# MPT keeps one row of distances to the last key and cuts it from its end.


def row_from_the_end(size: int) -> Tensor:
    return SLOPES.view(1, HEADS, 1, 1) * torch.arange(1 - size, 1)


def mpt(layer: Kept, scores: Tensor, length: int) -> Tensor:
    return filled(scores + layer.table[:, :, :, -length:])


# Baichuan's has the mask in it, and is repeated for every sample.


def with_its_mask(size: int) -> Tensor:
    return (SLOPES.view(HEADS, 1, 1) * torch.arange(size)).expand(HEADS, size, size) + later(size)


def baichuan(layer: Kept, scores: Tensor, length: int) -> Tensor:
    mask = layer.table[:HEADS, :length, :length].repeat(scores.shape[0], 1, 1)
    return scores + mask.view(scores.shape)


def press_table(size: int) -> Tensor:
    return SLOPES.view(HEADS, 1, 1) * apart(size) + later(size)


def press(layer: Kept, scores: Tensor, length: int) -> Tensor:
    return scores + layer.table[:, :length, :length].to(scores.dtype)


# Jina's is mirrored; nothing is hidden.


def mirrored(size: int) -> Tensor:
    return -SLOPES.view(1, HEADS, 1, 1) * apart(size).abs()


def jina(layer: Kept, scores: Tensor, length: int) -> Tensor:
    return scores + layer.table[:, :, :length, :length]


def jina_decoder(layer: Kept, scores: Tensor, length: int) -> Tensor:
    return filled(scores + layer.table[:, :, :length, :length])


# A row by the number of the key, and a mask that is made in the forward pass (fairseq).


def row(size: int) -> Tensor:
    return SLOPES.view(HEADS, 1, 1) * torch.arange(size)


def fairseq(layer: Kept, scores: Tensor, length: int) -> Tensor:
    return scores + (layer.table[:, :, :length] + later(length).to(scores.dtype))


# Distances in the buffer, slopes that are trained.


def distances(layer: Kept, scores: Tensor, length: int) -> Tensor:
    assert layer.slopes is not None
    return filled(scores + layer.table[:length, :length] * layer.slopes.view(HEADS, 1, 1))


def distances_both_ways(layer: Kept, scores: Tensor, length: int) -> Tensor:
    assert layer.slopes is not None
    return scores - layer.table[:length, :length] * layer.slopes.view(HEADS, 1, 1)


def steps(layer: Kept, scores: Tensor, length: int) -> Tensor:
    assert layer.slopes is not None
    return filled(scores + layer.table[:length] * layer.slopes.view(HEADS, 1, 1))


FINISHED_BIASES = (
    FinishedBias(mpt, row_from_the_end),
    FinishedBias(baichuan, with_its_mask),
    FinishedBias(press, press_table),
    FinishedBias(jina, mirrored),
    FinishedBias(jina_decoder, mirrored),
    FinishedBias(fairseq, row),
    FinishedBias(distances, apart, learned=True),
    FinishedBias(distances_both_ways, lambda size: apart(size).abs().float(), learned=True),
    FinishedBias(steps, lambda size: torch.arange(float(size)), learned=True),
)
BY_CUT = {each.cut.__name__: each for each in FINISHED_BIASES}
