"""Attention whose axes stand in another order, and near misses of it: found at every length, or left as it is."""

import copy
from collections.abc import Callable

import pytest
import torch
from attention_layers import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    BiasedAttention,
    RotaryAttention,
    causal,
    example,
    inverse_frequencies,
    sharpen,
)
from bias_spellings import Attention, BiasSpelling, by_distance, fill_above_diagonal, scores_of
from kin_spellings import Kin, exponential_path_by_name, path_moved_on
from layout_spellings import LAYOUT_SPELLINGS, apart, by_distances
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from grape_compile import Report, grape_compile, report, rewrite
from grape_compile.encoding import PathBias

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


def along_both_axes(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Slopes times the rows and columns between two places of a picture four tokens wide (RMT)."""
    steps = torch.arange(key.shape[-2])
    places = torch.stack((steps // 4, steps % 4), dim=-1).to(query.dtype)
    apart = (places[:, None] - places[None]).abs().sum(-1)
    return (scores_of(query, key) - slopes.view(-1, 1, 1) * apart).softmax(-1) @ value


def test_distances_along_axes_that_add_up() -> None:
    found = rewritten(BiasedAttention(along_both_axes))
    assert [str(site.encoding).count("distance=absolute") for site in found.sites] == [2], str(found)


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


def side_by_side(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    bias = torch.stack([slopes[head] * torch.arange(key.shape[-2]) for head in range(HEADS)])[:, None]
    return fill_above_diagonal(scores_of(query, key) + bias).softmax(-1) @ value


def numbers_side_by_side(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    bias = torch.stack([apart(key) * 2.0**-head for head in (2, 4)])
    return fill_above_diagonal(scores_of(query, key) + bias).softmax(-1) @ value


def a_head_without(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    bias = -slopes[:1, None, None] * apart(key).abs()
    scores = scores_of(query, key) + functional.pad(bias, (0, 0, 0, 0, 0, 1))
    return fill_above_diagonal(scores).softmax(-1) @ value


def zeros_for_the_first(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    bias = by_distance(slopes[1:], key.shape[-2])
    mask = torch.full(bias.shape[1:], float("-inf"), dtype=bias.dtype).triu(1)
    return (scores_of(query, key) + torch.cat((torch.zeros_like(bias), bias)) - -mask).softmax(-1) @ value


@pytest.mark.parametrize(
    ("attention", "slopes"),
    [
        (side_by_side, "0.25, 0.0625"),
        (numbers_side_by_side, "0.25, 0.0625"),
        (a_head_without, "0.25, 0.0"),
        (zeros_for_the_first, "0.0, 0.0625"),
    ],
)
def test_heads_put_side_by_side(attention: Attention, slopes: str) -> None:
    found = rewritten(BiasedAttention(attention))
    assert [str(site.encoding) for site in found.sites] == [f"bias(constant(({slopes})), steps)"], str(found)


class LearnedHeadByHead(nn.Module):
    """A slope of its own for each head, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BiasedAttention(self.attention)
        self.each = nn.ParameterList(nn.Parameter(torch.tensor(slope)) for slope in (0.3, 0.1))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        bias = torch.stack([slope * apart(key) for slope in self.each])
        return fill_above_diagonal(scores_of(query, key) + bias).softmax(-1) @ value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class Grouped(nn.Module):
    """Two groups of two heads that share a key, with learned slopes for each group, in this or the other order."""

    def __init__(self, *, exchanged: bool = False) -> None:
        super().__init__()
        self.exchanged = exchanged
        self.slopes = nn.Parameter(torch.tensor([[0.5, 0.25], [0.125, 0.0625]]).view(2, 2, 1, 1))
        self.query, self.key = nn.Linear(HIDDEN, 4 * HEAD_DIM), nn.Linear(HIDDEN, 2 * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (2, 2, HEAD_DIM)).permute(0, 2, 3, 1, 4)
        key = self.key(x).unflatten(-1, (2, 1, HEAD_DIM)).permute(0, 2, 3, 1, 4)
        steps = torch.arange(x.shape[1])
        slopes = self.slopes.transpose(0, 1) if self.exchanged else self.slopes
        scores = query @ key.mT / HEAD_DIM**0.5 + slopes * (steps - steps[:, None])
        mixed: Tensor = scores.masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1) @ key
        return mixed


@pytest.mark.parametrize("exchanged", [False, True])
def test_slopes_kept_by_group(exchanged: bool) -> None:
    plain = sharpen(Grouped(exchanged=exchanged)).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    for length in (12, 17):
        x, gradients = example(length).double(), []
        for layer in (plain, compiled):
            layer.zero_grad()
            layer(x).square().sum().backward()
            gradients.append({name: p.grad for name, p in layer.named_parameters()})
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert (len(report(compiled).sites), report(compiled).refusals) == (1, ()), str(report(compiled))


def test_slopes_learned_head_by_head() -> None:
    found = rewritten(LearnedHeadByHead())
    assert [str(site.encoding) for site in found.sites] == ['bias(learned("slopes"), steps)'], str(found)


@pytest.mark.parametrize("bias", [path_moved_on, exponential_path_by_name], ids=lambda bias: bias.__name__)
def test_a_path_taken_apart(bias: Callable[[Kin, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Into core operators: triangles are comparisons, products of heads are batched, log sigmoid is written out."""
    plain, x = sharpen(Kin(bias)).double(), example().double()
    new, found = rewrite(torch.export.export(plain, (x,), strict=False).run_decompositions())
    assert [type(site.encoding) for site in found.sites] == [PathBias], str(found)
    torch.testing.assert_close(new.module()(x), plain(x), rtol=EXACT, atol=EXACT)


class AnglesOfRates(nn.Module):
    """Angles summed up from what an activation says, kept twice, without gradients."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(HIDDEN, 1)
        self.register_buffer("frequencies", inverse_frequencies(HEAD_DIM // 2))

    @torch.no_grad()
    def forward(self, x: Tensor, _: int) -> Tensor:
        clock: Tensor = self.rate(x).sigmoid().cumsum(1)
        return (clock * self.frequencies)[:, None]


def rolled(x: Tensor, angle: Tensor) -> Tensor:
    both = torch.cat((angle, angle), dim=-1)
    signs = torch.cat((-torch.ones(HEAD_DIM // 2), torch.ones(HEAD_DIM // 2))).to(x.dtype)
    turned: Tensor = x * both.cos() + x.roll(HEAD_DIM // 2, dims=-1) * signs * both.sin()
    return turned


def test_an_angle_kept_twice_is_one_angle() -> None:
    """Verification draws what the two are made of, not each of them."""
    found = rewritten(RotaryAttention(rolled, angles=AnglesOfRates()))
    assert (len(found.sites), found.refusals) == (2, ()), str(found)


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


def other_clocks_side_by_side(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    bias = torch.cat((by_distance(slopes[:1], key.shape[-2]), by_distance(slopes[1:], key.shape[-2]) ** 2))
    return fill_above_diagonal(scores_of(query, key) + bias).softmax(-1) @ value


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
        other_clocks_side_by_side,
        softmax_along_queries,
    ],
    ids=lambda attention: attention.__name__,
)
def test_near_misses_stay_and_are_told(attention: Attention) -> None:
    found = rewritten(BiasedAttention(attention))
    assert found.sites == (), str(found)
    assert found.refusals


class Flexible(nn.Module):
    """Attention that is told how to change each score."""

    def __init__(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)

        def change(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, place: Tensor) -> Tensor:
            return torch.where(at >= place, self.change(score, at, place), -torch.inf)

        out: Tensor = flex_attention(query, key, value, score_mod=change)
        return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("change", "told"),
    [(lambda score, at, place: score + 0.1 * (place - at), 1), (lambda score, *_: score, 0)],
)
def test_flexible_attention_runs_as_it_is(
    change: Callable[[Tensor, Tensor, Tensor], Tensor], told: int
) -> None:
    plain, x = sharpen(Flexible(change)), example()
    with torch.no_grad():
        wanted = plain(x)
        compiled = grape_compile(copy.deepcopy(plain), backend="eager")
        torch.testing.assert_close(compiled(x), wanted)
    found = report(compiled)
    assert (len(found.sites), len(found.refusals)) == (0, told), str(found)
