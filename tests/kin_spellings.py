"""Biases that need more than one idea at once: sums of biases, other links and paths, gates over mirrored distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, causal
from torch import Tensor, nn
from torch.nn import functional


class Kin(nn.Module):
    """Causal attention over [B, T, hidden] whose bias `bias` makes from (itself, x, queries, keys)."""

    slopes: Tensor

    def __init__(self, bias: Callable[[Kin, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.bias = bias
        self.register_buffer("slopes", torch.tensor([2.0**-2, 2.0**-4]))
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM, bias=False)
        self.rate = nn.Linear(HIDDEN, HEADS)
        self.path = nn.Linear(HIDDEN, HEADS * 4, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / HEAD_DIM**0.5 + self.bias(self, x, query, key)
        mixed = scores.masked_fill(~causal(length), float("-inf")).softmax(-1) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))
        return out

    def rates(self, x: Tensor) -> Tensor:
        return functional.logsigmoid(self.rate(x)).transpose(1, 2)

    def edges(self, x: Tensor) -> Tensor:
        p = self.path(x).view(*x.shape[:2], HEADS, 4).transpose(1, 2)
        product: Tensor = p @ p.mT / 4
        return product


@dataclass(frozen=True)
class KinSpelling:
    """One bias: every piece of `text` stands in its encoding."""

    make: Callable[[], nn.Module]
    name: str
    text: tuple[str, ...]


def apart(clock: Tensor) -> Tensor:
    """clock_j - clock_t."""
    return clock.unsqueeze(-2) - clock.unsqueeze(-1)


def alibi_and_forgetting(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1])
    return layer.slopes[:, None, None] * apart(steps) - apart(layer.rates(x).cumsum(-1))


def two_runnings_sums(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    rates = layer.rates(x)
    before = torch.cat((torch.zeros_like(rates[..., :1]), rates.cumsum(-1)[..., :-1]), dim=-1)
    return -apart(before) - 0.5 * apart(functional.softplus(layer.rate(x)).transpose(1, 2).cumsum(-1))


def shifted_rates(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return -apart(functional.pad(layer.rates(x)[..., :-1], (1, 0)).cumsum(-1))


def padded_by_none(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As code has it that makes room for memories where there are none."""
    return functional.pad(-apart(layer.rates(x).cumsum(-1)), (0, 0))


def gates_of_a_mirrored_distance(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    distance = apart(torch.arange(x.shape[1])).abs()
    gate = functional.softplus(query.mean(-1)).unsqueeze(-1) + functional.softplus(key.mean(-1)).unsqueeze(-2)
    return -layer.slopes[:, None, None] * distance * gate


def exponential_path(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    edges = -layer.edges(x).exp().tril()
    return layer.slopes[:, None, None] * (edges.sum(-1, keepdim=True) - edges.cumsum(-1))


def exponential_path_by_name(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    p = layer.path(x).unflatten(-1, (HEADS, 4))
    edges = -(torch.einsum("bthd,blhd->bhtl", p, p) / 4).exp().tril()
    return layer.slopes[:, None, None] * (edges.sum(-1, keepdim=True) - edges.cumsum(-1))


def path_moved_on(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    sums = functional.logsigmoid(layer.edges(x)).tril().flip(-1).cumsum(-1).flip(-1)
    return functional.pad(sums[..., 1:], (0, 1)) * layer.slopes[:, None, None]


def path_and_alibi(layer: Kin, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1])
    return exponential_path(layer, x, query, key) + layer.slopes[:, None, None] * apart(steps)


def _row(bias: Callable[[Kin, Tensor, Tensor, Tensor], Tensor], *text: str) -> KinSpelling:
    return KinSpelling(lambda: Kin(bias), bias.__name__, text)


KIN_SPELLINGS: tuple[KinSpelling, ...] = (
    _row(alibi_and_forgetting, "compose(", "constant(", "steps", 'accumulated("log_forget", true)'),
    _row(two_runnings_sums, "compose(", 'accumulated("log_forget", false)', "uniform(-0.5)", ", true)"),
    _row(shifted_rates, 'accumulated("log_forget", false)'),
    _row(padded_by_none, 'accumulated("log_forget", true)'),
    _row(gates_of_a_mirrored_distance, "steps", "gate(query=", ", key="),
    _row(exponential_path, "path_bias(negative_exp"),
    _row(exponential_path_by_name, "path_bias(negative_exp"),
    _row(path_moved_on, "path_bias(log_sigmoid"),
    _row(path_and_alibi, "compose(", "path_bias(negative_exp", "steps"),
)
