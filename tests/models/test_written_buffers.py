"""Frequencies a model writes into its own buffer before it turns by them, and writes that change them once more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measuring import GrapeCalls
from torch import Tensor, nn

from grape_compile import grape_compile, report

HEAD = 16
Frequencies = Callable[[nn.Module, Tensor], Tensor]


class Turned(nn.Module):
    """Rotates halves by what `frequencies` makes of its buffer and of the positions."""

    inv_freq: Tensor
    other: Tensor

    def __init__(self, frequencies: Frequencies) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
        self.register_buffer("other", 500.0 ** (-torch.arange(0, HEAD, 2) / HEAD))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        angle = positions[:, None] * self.frequencies(self, positions)
        cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
        half = torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
        return x * cos + half * sin


def chosen(model: Turned, positions: Tensor) -> Tensor:
    return torch.where(positions.max() + 1 > 8, model.other, 0.5 * model.other)


def read_back(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(chosen(model, positions))
    return model.inv_freq


def wider(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(chosen(model, positions).double())
    return model.inv_freq


def one_number(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(positions.max() * 0.25)
    return model.inv_freq


def a_part_read_back(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq[:6].copy_(chosen(model, positions)[:6])
    return torch.cat((model.inv_freq[:6], model.other[6:]))


def a_part_written_twice(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq[:6].copy_(chosen(model, positions)[:6])
    model.inv_freq[2:4].mul_(2)
    return torch.cat((model.inv_freq[:6], model.other[6:]))


def another_part_read(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq[:6].copy_(chosen(model, positions)[:6])
    return torch.cat((model.inv_freq[1:7], model.other[6:]))


def twice(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(chosen(model, positions))
    first = model.inv_freq[:]
    model.inv_freq.copy_(model.other * 3)
    return first


def scaled_afterwards(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(chosen(model, positions))
    model.inv_freq.view(2, -1)[0].mul_(2)
    return model.inv_freq


def through_an_earlier_view(model: Turned, positions: Tensor) -> Tensor:
    view = model.inv_freq.view(2, -1)
    model.inv_freq.copy_(chosen(model, positions))
    return view.flatten()


def source_written_afterwards(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(model.other)
    model.other.mul_(2)
    return model.inv_freq


def read_before(model: Turned, positions: Tensor) -> Tensor:
    before = model.inv_freq * 1.0
    model.inv_freq.copy_(chosen(model, positions))
    return before


def read_before_as_it_is(model: Turned, positions: Tensor) -> Tensor:
    angle = positions[:, None] * model.inv_freq
    model.inv_freq.mul_(0.5)
    return angle[1]


def positions_moved_on(model: Turned, positions: Tensor) -> Tensor:
    positions += 1
    return chosen(model, positions)


def onto_itself(model: Turned, positions: Tensor) -> Tensor:
    model.inv_freq.copy_(model.inv_freq[:1].expand(HEAD // 2))
    return model.inv_freq


FOUND = [read_back, a_part_read_back, wider, one_number]
OTHER = [
    a_part_written_twice,
    another_part_read,
    read_before,
    read_before_as_it_is,
    positions_moved_on,
    twice,
    scaled_afterwards,
    through_an_earlier_view,
    source_written_afterwards,
    onto_itself,
]


@pytest.mark.parametrize("frequencies", [*FOUND, *OTHER])
def test_frequencies_written_in_the_forward_pass(frequencies: Frequencies) -> None:
    calls = GrapeCalls()
    plain, ours = Turned(frequencies), grape_compile(Turned(frequencies), backend=calls)
    for length in (4, 12):  # the second call starts at what the first has written
        x = torch.randn(2, length, HEAD, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
        for name, buffer in plain.named_buffers():
            assert torch.equal(ours.get_buffer(name), buffer), name
    if frequencies in FOUND:
        assert [site.kind for site in report(ours).sites] == ["rotation"], str(report(ours))
        assert calls.rotated == 2
