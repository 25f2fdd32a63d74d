"""Memory that is written to: what is read later is what was written, or nothing is said about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_layers import HEAD_DIM, example, inverse_frequencies
from torch import Tensor, nn

from grape_compile import grape_compile, report, rewrite

HALF = HEAD_DIM // 2
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


class Turned(nn.Module):
    """The channels of x turned and written into a tensor that is the output itself."""

    inv_freq: Tensor

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("inv_freq", inverse_frequencies(HALF))

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x[..., :HEAD_DIM]
        angle = torch.outer(torch.arange(x.shape[1], device=x.device).to(x.dtype), self.inv_freq)
        first, second = x[..., :HALF], x[..., HALF:]
        cos, sin = angle.cos(), angle.sin()
        return self.write(x, first * cos - second * sin, second * cos + first * sin)


def into_a_copy(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    turned = x.clone()
    turned[..., :HALF] = first
    turned[..., HALF:] = second
    return turned


def into_a_view_of_a_copy(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    turned = x.clone()
    view = turned.transpose(0, 1)
    turned[..., :HALF] = first
    turned[..., HALF:] = second
    return view


def into_itself(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x[..., :HALF] = first
    x[..., HALF:] = second
    return x


def then_again(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The first half is written over once more: what comes out is no rotation."""
    turned = into_a_copy(x, first, second)
    turned[..., :HALF] = 2 * first
    return turned


def over_a_part_that_is_read(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What is cut out overlaps both halves."""
    return into_a_copy(x, first, second)[..., 2 : HALF + 2]


def over_a_view_that_waits(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    turned = torch.cat((first, second), dim=-1)
    view = turned[..., :1]
    turned += 1.0
    return turned * view


def by_a_name_that_may_copy(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    turned = torch.cat((first, second), dim=-1)
    other = turned.reshape(-1)
    turned[..., 0] = 1.0
    return other.view(turned.shape)


@pytest.mark.parametrize(
    ("write", "sites"),
    [
        (into_a_copy, 1),
        (into_a_view_of_a_copy, 1),
        (into_itself, 1),
        (then_again, None),
        (over_a_part_that_is_read, None),
        (over_a_view_that_waits, None),
        (by_a_name_that_may_copy, None),
    ],
)
def test_an_exported_program_returns_what_was_written(write: Write, sites: int | None) -> None:
    layer, x = Turned(write).double(), example().double()
    rewritten, found = rewrite(torch.export.export(layer, (x,), strict=False))
    assert sites is None or len(found.sites) == sites, str(found)
    torch.testing.assert_close(rewritten.module()(x), layer(x), rtol=1e-12, atol=1e-12)


class Grid(nn.Module):
    """Turns by a grid whose columns are written over after it was laid out, in which it sees them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :HEAD_DIM] * 1.0
        columns = torch.arange(x.shape[1]).to(x.dtype)
        _, places = torch.meshgrid(torch.zeros(1, dtype=x.dtype), columns, indexing="ij")
        columns.mul_(2.0)
        angle = torch.outer(places[0], inverse_frequencies(HALF).to(x.dtype))
        cos, sin = angle.cos(), angle.sin()
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_a_grid_sees_what_is_written_into_each_of_its_axes() -> None:
    layer, x = Grid(), example().double()
    rewritten, _ = rewrite(torch.export.export(layer, (x,), strict=False))
    torch.testing.assert_close(rewritten.module()(x), layer(x), rtol=1e-12, atol=1e-12)


class Clipped(nn.Module):
    """Writes into memory that autograd does not see, as Gemma 3n clips its weights in training."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.eye(HEAD_DIM) * 3)
        self.inv_freq = nn.Parameter(inverse_frequencies(HALF))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :HEAD_DIM] * 1.0
        angle = torch.outer(torch.arange(x.shape[1]).to(x.dtype), self.inv_freq)
        cos, sin = angle.cos(), angle.sin()
        {"weight": self.weight, "cosines": cos, "activations": x}[self.what].data.clamp_(-0.5, 0.5)
        x = x @ self.weight
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize(("what", "sites"), [("weight", 1), ("cosines", 0), ("activations", 1)])
def test_memory_behind_data(what: str, sites: int) -> None:
    model, original, x = Clipped(what), Clipped(what), example()
    grape_compile(model, backend="eager")
    for _ in range(2):
        found, wanted = model(x), original(x)
        torch.testing.assert_close(found, wanted)
        found.sin().sum().backward(), wanted.sin().sum().backward()
        for one, other in zip(model.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert len(report(model).sites) == sites, str(report(model))


class NormedBehindAWrite(nn.Module):
    """Turns what was normed in another type and cast back to the type of a value that is not read as it was."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HALF))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.topk(2, dim=-1).indices
        chosen.reshape(-1).clamp_(max=1)
        x = x[..., :HEAD_DIM] + chosen.sum(-1, keepdim=True)
        normed = (x.double() * x.double().square().mean(-1, keepdim=True).rsqrt()).type_as(x)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device).to(x.dtype), self.inv_freq)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return normed * cos + torch.cat((-normed[..., HALF:], normed[..., :HALF]), dim=-1) * sin


def test_a_value_whose_type_is_asked_for_need_not_be_known() -> None:
    model, x = NormedBehindAWrite(), example()
    expected = model(x)
    found = grape_compile(model, backend="eager")(x)
    torch.testing.assert_close(found, expected)
    assert [site.kind for site in report(model).sites] == ["rotation"], str(report(model))
