"""Words that are added to the scores: biases [.., H, T, T] of queries and keys [B, H, T, D], right ones and wrong ones.

The names of a word's parameters say what it is given: `slopes` [H], `x` [B, T, hidden], `query` and `key`, `rates`
[B, T, H] (numbers an activation of x makes), `path` [B, H, T, 4].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEADS, causal
from kin_spellings import apart
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class BiasWord:
    """One bias; every piece of `text` stands in its encoding. `wrong`: it is none of ours, and no site may name it."""

    function: Callable[..., Tensor]
    text: tuple[str, ...] = ()
    wrong: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__


# ALiBi.


def by_distance(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return slopes[:, None, None] * (steps - steps[:, None])


def by_distance_of_floats(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length, dtype=slopes.dtype)
    distance = steps.unsqueeze(0) - steps.unsqueeze(1)
    return distance * slopes.view(-1, 1, 1)


def by_distance_taken_off(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return -slopes.view(1, -1, 1, 1) * (steps[:, None] - steps[None, :])


def by_key(slopes: Tensor, length: int) -> Tensor:
    return slopes[:, None, None] * torch.arange(length)


def by_key_product(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length).to(slopes.dtype)
    return torch.outer(slopes, steps).unsqueeze(1)


def by_key_letters(slopes: Tensor, length: int) -> Tensor:
    return torch.einsum("h,j->hj", slopes, torch.arange(length).to(slopes.dtype))[:, None]


def to_the_last_key(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(1 - length, 1).view(1, 1, 1, -1)
    return steps * slopes.view(1, -1, 1, 1)


def by_size_of_distance(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return -(steps[:, None] - steps).abs() * slopes[:, None, None]


def by_distance_cut_off(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return -slopes[:, None, None] * (steps[:, None] - steps).clamp(min=0)


def by_sum_of_ones(slopes: Tensor, length: int) -> Tensor:
    steps = torch.ones(length, dtype=slopes.dtype).cumsum(0)
    return slopes.view(-1, 1, 1) * (steps - steps.view(-1, 1))


def distributed(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length).to(slopes.dtype)
    heads = slopes.view(-1, 1, 1)
    return heads * steps.view(1, 1, -1) - heads * steps.view(1, -1, 1)


# Forgetting: differences of a running sum.


def forgetting(rates: Tensor) -> Tensor:
    total = functional.logsigmoid(rates).transpose(1, 2).cumsum(-1)
    return total.unsqueeze(-1) - total.unsqueeze(-2)


def forgetting_heads_last(rates: Tensor) -> Tensor:
    total = functional.logsigmoid(rates).cumsum(dim=1)
    return (total.unsqueeze(2) - total.unsqueeze(1)).permute(0, 3, 1, 2)


def forgetting_by_softplus(rates: Tensor) -> Tensor:
    total = torch.cumsum(-functional.softplus(-rates.mT), dim=-1)
    return total[..., :, None] - total[..., None, :]


def forgetting_by_key(rates: Tensor) -> Tensor:
    return -functional.logsigmoid(rates).cumsum(1).transpose(1, 2)[:, :, None, :]


def forgetting_before(rates: Tensor) -> Tensor:
    gates = functional.logsigmoid(rates).transpose(1, 2)
    total = gates.cumsum(-1) - gates
    return -apart(total)


def forgetting_before_by_pad(rates: Tensor) -> Tensor:
    total = functional.logsigmoid(rates).transpose(1, 2).cumsum(-1)
    return -apart(functional.pad(total[..., :-1], (1, 0)))


def drifting(rates: Tensor, slopes: Tensor) -> Tensor:
    drift = slopes.view(-1, 1) * functional.softplus(rates).transpose(1, 2).cumsum(-1)
    return drift.unsqueeze(-2) - drift.unsqueeze(-1)


# Slopes under gates of query and key.


def gated_by_query(query: Tensor, slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    gate = functional.softplus(query.mean(-1))
    return slopes[:, None, None] * (steps - steps[:, None]) * gate.unsqueeze(-1)


def gated_by_key(key: Tensor, slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length).to(key.dtype)
    gate = functional.softplus(key.mean(-1)) * slopes[:, None]
    return (steps - steps[:, None]) * gate.unsqueeze(-2)


def gated_by_both(query: Tensor, key: Tensor, slopes: Tensor, length: int) -> Tensor:
    gates = functional.softplus(query.mean(-1)).unsqueeze(-1) + functional.softplus(key.mean(-1)).unsqueeze(
        -2
    )
    return slopes[:, None, None] * apart(torch.arange(length)) * gates


def gated_by_both_apart(query: Tensor, key: Tensor, slopes: Tensor, length: int) -> Tensor:
    bias = slopes.view(1, -1, 1, 1) * apart(torch.arange(length)).to(query.dtype)
    here, there = functional.softplus(query.sum(-1) / 4.0), functional.softplus(key.sum(-1) / 4.0)
    return bias * here.unsqueeze(-1) + bias * there.unsqueeze(-2)


# Paths.


def path_from_total(path: Tensor, slopes: Tensor, length: int) -> Tensor:
    edges = functional.logsigmoid(path @ path.mT / 4.0).masked_fill(~causal(length), 0.0)
    edges = slopes[:, None, None] * edges
    return edges.sum(-1, keepdim=True) - edges.cumsum(-1)


def path_flipped(path: Tensor, slopes: Tensor, length: int) -> Tensor:
    edges = functional.logsigmoid(torch.matmul(path, path.transpose(-1, -2)) / 4.0).tril()
    return (edges.flip(-1).cumsum(-1).flip(-1) - edges) * slopes.view(-1, 1, 1)


def path_by_exponential(path: Tensor, slopes: Tensor, length: int) -> Tensor:
    edges = -torch.exp(torch.einsum("bhtd,bhld->bhtl", path, path) / 4.0).tril()
    return slopes[:, None, None] * (edges.sum(-1, keepdim=True) - edges.cumsum(-1))


# Sums.


def forgetting_and_distance(rates: Tensor, slopes: Tensor, length: int) -> Tensor:
    return by_distance(slopes, length) + forgetting(rates)


def path_and_distance(path: Tensor, slopes: Tensor, length: int) -> Tensor:
    return path_by_exponential(path, slopes, length) + by_distance(slopes, length)


STEPS = ("bias(", "steps")
RUNNING = ("bias(", "accumulated(", ", true)")
BEFORE = ("bias(", "accumulated(", ", false)")
ALIBI: tuple[BiasWord, ...] = tuple(
    BiasWord(function, STEPS)
    for function in (
        by_distance,
        by_distance_of_floats,
        by_distance_taken_off,
        by_key,
        by_key_product,
        by_key_letters,
        to_the_last_key,
        by_size_of_distance,
        by_distance_cut_off,
        by_sum_of_ones,
        distributed,
    )
)
KIN: tuple[BiasWord, ...] = (
    BiasWord(forgetting, RUNNING),
    BiasWord(forgetting_heads_last, RUNNING),
    BiasWord(forgetting_by_softplus, RUNNING),
    BiasWord(forgetting_by_key, RUNNING),
    BiasWord(forgetting_before, BEFORE),
    BiasWord(forgetting_before_by_pad, BEFORE),
    BiasWord(drifting, RUNNING),
    BiasWord(gated_by_query, ("steps", "gate(query=")),
    BiasWord(gated_by_key, ("steps", "gate(key=")),
    BiasWord(gated_by_both, ("steps", "gate(query=", ", key=")),
    BiasWord(gated_by_both_apart, ("steps", "gate(query=", ", key=")),
    BiasWord(path_from_total, ("path_bias(log_sigmoid",)),
    BiasWord(path_flipped, ("path_bias(log_sigmoid",)),
    BiasWord(path_by_exponential, ("path_bias(negative_exp",)),
    BiasWord(forgetting_and_distance, ("compose(", "steps", "accumulated(")),
    BiasWord(path_and_distance, ("compose(", "steps", "path_bias(negative_exp")),
)


# Slopes [H].


def slopes_of_alibi() -> Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)


def slopes_by_powers() -> Tensor:
    return torch.pow(2.0 ** (-8.0 / HEADS), torch.arange(1, HEADS + 1))


def slopes_written_out() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.1, 0.0625][:HEADS])


def slopes_by_exponential() -> Tensor:
    return torch.exp(-1.0 * torch.arange(1, HEADS + 1))


SLOPES: tuple[Callable[[], Tensor], ...] = (
    slopes_of_alibi,
    slopes_by_powers,
    slopes_written_out,
    slopes_by_exponential,
)


# Near misses that are no slope times a difference of positions, whatever the row adds.


def bucketed(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return slopes[:, None, None] * ((steps - steps[:, None]) // 2)


def saturated_distance(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return slopes[:, None, None] * (steps - steps[:, None]).clamp(min=-3)


def slope_of_each_key(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length).to(slopes.dtype)
    return slopes[:, None, None] * (1.0 + 0.1 * steps) * (steps - steps[:, None])


def slope_of_each_query(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length).to(slopes.dtype)
    return slopes[:, None, None] * (1.0 + 0.1 * steps[:, None]) * steps


def squared_distance(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return -slopes[:, None, None] * (steps - steps[:, None]) ** 2


def logarithm_of_distance(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length).to(slopes.dtype)
    return -slopes[:, None, None] * (1.0 + (steps - steps[:, None]).abs()).log()


def one_row_off(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return by_distance(slopes, length) * (1.0 + (steps[:, None] == 3).to(slopes.dtype))


def one_entry_off(slopes: Tensor, length: int) -> Tensor:
    steps = torch.arange(length)
    return by_distance(slopes, length) + 0.5 * ((steps == 1) & (steps[:, None] == 4)).to(slopes.dtype)


def squashed_forgetting(rates: Tensor) -> Tensor:
    return torch.tanh(forgetting(rates))


def cut_off_forgetting(rates: Tensor) -> Tensor:
    return forgetting(rates).clamp(min=-2.0)


def forgetting_over_heads(rates: Tensor) -> Tensor:
    return -apart(functional.logsigmoid(rates).transpose(1, 2).cumsum(1))


def gate_of_the_key_alone(rates: Tensor) -> Tensor:
    return functional.logsigmoid(rates).transpose(1, 2).unsqueeze(-2)


def forgetting_times_distance(rates: Tensor, length: int) -> Tensor:
    return forgetting(rates) * apart(torch.arange(length)).to(rates.dtype)


def product_of_gates(query: Tensor, key: Tensor, slopes: Tensor, length: int) -> Tensor:
    gates = functional.softplus(query.mean(-1)).unsqueeze(-1) * functional.softplus(key.mean(-1)).unsqueeze(
        -2
    )
    return by_distance(slopes, length) * gates


def gated_square(query: Tensor, slopes: Tensor, length: int) -> Tensor:
    gate = functional.softplus(query.mean(-1)).unsqueeze(-1)
    return squared_distance(slopes, length) * gate


def path_with_its_first_edge(path: Tensor, slopes: Tensor, length: int) -> Tensor:
    edges = functional.logsigmoid(path @ path.mT / 4.0).tril()
    return edges.flip(-1).cumsum(-1).flip(-1) * slopes.view(-1, 1, 1)


def path_over_queries(path: Tensor, slopes: Tensor, length: int) -> Tensor:
    edges = slopes.view(-1, 1, 1) * functional.logsigmoid(path @ path.mT / 4.0).tril()
    return edges.cumsum(-2) - edges


WRONG: tuple[BiasWord, ...] = tuple(
    BiasWord(function, wrong=True)
    for function in (
        bucketed,
        saturated_distance,
        slope_of_each_key,
        slope_of_each_query,
        squared_distance,
        logarithm_of_distance,
        one_row_off,
        one_entry_off,
        squashed_forgetting,
        cut_off_forgetting,
        forgetting_over_heads,
        gate_of_the_key_alone,
        forgetting_times_distance,
        product_of_gates,
        gated_square,
        path_with_its_first_edge,
        path_over_queries,
    )
)
