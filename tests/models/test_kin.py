"""Biases that depend on content, alone and added up, at lengths the graph was not captured with."""

import copy

import pytest
import torch
from attention_layers import HIDDEN, assert_trains_alike, example, sharpen
from kin_spellings import KIN_SPELLINGS, Kin, KinSpelling, exponential_path
from research import parts
from research.parts import future, root_mean_square
from research.paths import PATH_DIM, Path, turn_halves
from torch import Tensor, nn
from torch.nn import functional

from grape_compile import grape_compile, inspect, report
from grape_compile.encoding import parse

spellings = pytest.mark.parametrize("spelling", KIN_SPELLINGS, ids=lambda row: row.name)


@spellings
def test_it_is_found_and_named(spelling: KinSpelling) -> None:
    found = inspect(sharpen(spelling.make()), (example(),))
    assert found.refusals == (), str(found)
    assert len(found.sites) == 1, str(found)
    encoding = found.sites[0].encoding
    assert all(text in str(encoding) for text in spelling.text), str(encoding)
    assert parse(str(encoding)) == encoding


@spellings
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_equals_itself_at_every_length(spelling: KinSpelling, dynamic: bool) -> None:
    """Outputs and gradients in float64."""
    plain = sharpen(spelling.make()).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager", dynamic=dynamic)
    assert_trains_alike(plain, compiled, (12, 12, 19, 7))
    assert len(report(compiled).sites) == 1, str(report(compiled))


def test_exponentials_that_rise_with_the_distance_are_left() -> None:
    """A model that sums from the first key rounds alike what all keys of a row share."""
    found = inspect(sharpen(Kin(lambda *given: -exponential_path(*given))), (example(),))
    (refusal,) = found.refusals
    assert found.sites == ()
    assert "lose digits" in refusal.reason


class GivenPlaces(nn.Module):
    """Attention over given places [B, T, 2], by distance."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        distance = (places[:, :, None] - places[:, None]).norm(dim=-1)
        scores = query @ key.mT / 4 - self.slopes[:, None, None] * distance[:, None]
        mixed: Tensor = scores.softmax(-1) @ value
        return mixed


def test_distances_of_given_places() -> None:
    plain = sharpen(GivenPlaces()).double()
    places = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    torch.testing.assert_close(compiled(example().double(), places), plain(example().double(), places))
    (site,) = report(compiled).sites
    assert "euclidean" in str(site.encoding)


class Phases(nn.Module):
    """Turns by running sums of what a token says; the cosine may be of the opposite angle, the sine of another."""

    def __init__(self, sign: float, other: float = 1.0) -> None:
        super().__init__()
        self.sign, self.other = sign, other
        self.rates = nn.Linear(HIDDEN, HIDDEN // 2)

    def forward(self, x: Tensor) -> Tensor:
        phase = self.rates(x).cumsum(1)
        cos, sin = (self.sign * phase).cos(), (self.other * phase).sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize(("sign", "other", "sites"), [(-1.0, 1.0, 1), (1.0, -1.0, 1), (-1.0, 2.0, 0)])
def test_the_cosine_of_the_opposite_angle(sign: float, other: float, sites: int) -> None:
    plain = sharpen(Phases(sign, other)).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    torch.testing.assert_close(compiled(example().double()), plain(example().double()))
    found = report(compiled)
    assert (len(found.sites), len(found.refusals)) == (sites, 1 - sites), str(found)


class CastPath(Path):
    """As the authors of GRAPE write it: what turned is cast to the type it has."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        p = self.paths(x)
        hidden = future(x.shape[1], x.device)
        turned = turn_halves(root_mean_square(p)).type_as(p)
        edges = functional.logsigmoid((p @ turned.mT / PATH_DIM).float()) * self.slopes.view(1, -1, 1, 1)
        edges = edges.masked_fill(hidden, 0.0)
        bias = edges.sum(-1, keepdim=True) - edges.cumsum(-1)
        scores = (query @ key.mT / query.shape[-1] ** 0.5 + bias).masked_fill(hidden, float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


def test_a_turn_that_a_path_took_in_is_no_site_beside_it() -> None:
    found = inspect(sharpen(CastPath()), (torch.randn(2, 12, parts.HIDDEN),))
    assert [site.kind for site in found.sites] == ["bias"], str(found)
