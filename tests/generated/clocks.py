"""Words that tell the time: clocks, frequencies, and angles made of the two or looked up in a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM
from rotation_spellings import HALF
from torch import Tensor
from torch.nn import functional

BASE = 10000.0
LIMIT = 32


@dataclass(frozen=True)
class Clock:
    """What counts as position: `whole` numbers can look up a table; `batched` clocks are [B, T], others [T]."""

    function: Callable[..., Tensor]
    whole: bool = True
    batched: bool = False
    given: bool = False
    content: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__


def counted(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device)


def counted_from_three(x: Tensor, length: int) -> Tensor:
    return torch.arange(3, length + 3, device=x.device)


def counted_and_moved(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device) + 2


def counted_by_sum(x: Tensor, length: int) -> Tensor:
    return torch.ones(length, dtype=torch.int64, device=x.device).cumsum(0) - 1


def counted_in_batches(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device).unsqueeze(0)


def as_given(positions: Tensor) -> Tensor:
    return positions


def as_given_for_each(places: Tensor) -> Tensor:
    return places


def given_and_moved(positions: Tensor) -> Tensor:
    return positions + 1


def doubled(x: Tensor, length: int) -> Tensor:
    return 2 * torch.arange(length, device=x.device)


def squared(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device) ** 2


def reversed_order(x: Tensor, length: int) -> Tensor:
    return torch.arange(length - 1, -1, -1, device=x.device)


def by_blocks(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device) // 2


def saturated(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device).clamp(max=5)


def divided(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device, dtype=x.dtype) / 4.0


def summed_rates(rate: Tensor) -> Tensor:
    steps = torch.sigmoid(rate)
    return steps.cumsum(1) - steps


def summed_rates_shifted(rate: Tensor) -> Tensor:
    steps = torch.sigmoid(rate)
    return functional.pad(steps.cumsum(1)[:, :-1], (1, 0))


CLOCKS: tuple[Clock, ...] = (
    Clock(counted),
    Clock(counted_from_three),
    Clock(counted_and_moved),
    Clock(counted_by_sum),
    Clock(counted_in_batches, batched=True),
    Clock(as_given, given=True),
    Clock(as_given_for_each, batched=True, given=True),
    Clock(given_and_moved, given=True),
    Clock(doubled, whole=False),
    Clock(squared, whole=False),
    Clock(reversed_order),
    Clock(by_blocks),
    Clock(saturated),
    Clock(divided, whole=False),
    Clock(summed_rates, whole=False, batched=True, content=True),
    Clock(summed_rates_shifted, whole=False, batched=True, content=True),
)


# Frequencies [HALF], radians per position.


def geometric() -> Tensor:
    return 1.0 / BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def by_exponential() -> Tensor:
    return torch.exp(torch.arange(0, HEAD_DIM, 2) * (-math.log(BASE) / HEAD_DIM))


def by_power() -> Tensor:
    return torch.pow(BASE, -torch.arange(HALF) / HALF)


def stretched() -> Tensor:
    return geometric() / 4.0


def of_a_larger_base() -> Tensor:
    return 1.0 / (BASE * 8.0) ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def by_wavelength() -> Tensor:
    plain = geometric()
    waves = 2.0 * math.pi / plain
    smooth = (16.0 / waves - 1.0) / 3.0
    between = (1.0 - smooth) * plain / 8.0 + smooth * plain
    slow = torch.where(waves > 16.0, plain / 8.0, plain)
    return torch.where((waves <= 16.0) & (waves >= 4.0), between, slow)


def by_ramp() -> Tensor:
    plain = geometric()
    ramp = (torch.arange(HALF) / HALF).clamp(0.0, 1.0)
    return plain / 4.0 * ramp + plain * (1.0 - ramp)


def written_out() -> Tensor:
    return torch.tensor([1.0, 0.31, 0.11, 0.045, 0.01, 0.004, 0.001, 0.0003][:HALF])


FREQUENCIES: tuple[Callable[[], Tensor], ...] = (
    geometric,
    by_exponential,
    by_power,
    stretched,
    of_a_larger_base,
    by_wavelength,
    by_ramp,
    written_out,
)


# Angles [..., T, HALF].


@dataclass(frozen=True)
class Product:
    """Clock times frequency; `batched` where the clock may be [B, T], `single` where it may be [T]."""

    function: Callable[..., Tensor]
    batched: bool = True
    single: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__


def by_outer(clock: Tensor, frequencies: Tensor) -> Tensor:
    return torch.outer(clock.to(frequencies.dtype), frequencies)


def by_broadcast(clock: Tensor, frequencies: Tensor) -> Tensor:
    return clock.unsqueeze(-1) * frequencies


def by_broadcast_of_floats(clock: Tensor, frequencies: Tensor) -> Tensor:
    return frequencies * clock[..., None].to(frequencies.dtype)


def by_letters(clock: Tensor, frequencies: Tensor) -> Tensor:
    return torch.einsum("t,p->tp", clock.to(frequencies.dtype), frequencies)


def by_more_letters(clock: Tensor, frequencies: Tensor) -> Tensor:
    return torch.einsum("bt,p->btp", clock.to(frequencies.dtype), frequencies)


def by_matrices(clock: Tensor, frequencies: Tensor) -> Tensor:
    columns = frequencies[None, :, None].expand(clock.shape[0], -1, 1)
    return (columns @ clock[:, None, :].to(frequencies.dtype)).transpose(1, 2)


def by_column(clock: Tensor, frequencies: Tensor) -> Tensor:
    return clock.to(frequencies.dtype)[:, None] @ frequencies[None, :]


def by_grid(clock: Tensor, frequencies: Tensor) -> Tensor:
    return torch.mul(*torch.meshgrid(clock.to(frequencies.dtype), frequencies, indexing="ij"))


def by_division(clock: Tensor, frequencies: Tensor) -> Tensor:
    return clock.to(frequencies.dtype).unsqueeze(-1) / (1.0 / frequencies)


PRODUCTS: tuple[Product, ...] = (
    Product(by_outer, batched=False),
    Product(by_broadcast),
    Product(by_broadcast_of_floats),
    Product(by_letters, batched=False),
    Product(by_more_letters, single=False),
    Product(by_matrices, single=False),
    Product(by_column, batched=False),
    Product(by_grid, batched=False),
    Product(by_division),
)


# Rows of a table of LIMIT positions.


def by_index(table: Tensor, clock: Tensor) -> Tensor:
    return table[clock]


def by_embedding(table: Tensor, clock: Tensor) -> Tensor:
    return functional.embedding(clock, table)


def by_selection(table: Tensor, clock: Tensor) -> Tensor:
    return table.index_select(0, clock)


def by_slice(table: Tensor, length: int) -> Tensor:
    return table[:length]


LOOK_UPS: tuple[Callable[..., Tensor], ...] = (by_index, by_embedding, by_selection, by_slice)
