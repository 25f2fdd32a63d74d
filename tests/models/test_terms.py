"""What is read of one element of a value."""

import copy

import pytest
import torch
from attention_layers import HIDDEN, BiasedAttention, example, inverse_frequencies, sharpen
from torch import Tensor, nn
from torch.nn import functional

from grape_compile import grape_compile, inspect, report
from grape_compile.passes.graph import Unreadable
from grape_compile.passes.terms import broadcast


def test_axes_of_one_entry_are_read_at_their_only_place() -> None:
    row, column = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    found = broadcast((row, row, column), (1, 4))
    assert [axis.tolist() for axis in found] == [[0, 0, 0], [2, 0, 1]]


def test_a_value_of_more_axes_than_the_result_is_unreadable() -> None:
    """What is added to scores may have more axes than the scores that were found."""
    with pytest.raises(Unreadable, match="5 axes beside 4"):
        broadcast((torch.arange(3),) * 4, (1, 1, 2, 3, 3))


def test_a_mask_that_came_from_more_axes_than_the_scores_have() -> None:
    """As LightGlue hides keypoints of the other picture of a pair."""

    def in_pairs(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        batch, length = key.shape[0], key.shape[2]
        seen = torch.arange(length) > torch.arange(batch)[:, None]
        hidden = torch.where(seen, 0.0, -1e30).reshape(-1, 2, 1, 1, length).flip(1)
        scores = query @ key.mT + slopes[:, None, None] * torch.arange(length)
        return (scores + hidden.reshape(batch, 1, 1, length)).softmax(-1) @ value

    layer = sharpen(BiasedAttention(in_pairs))
    compiled = grape_compile(copy.deepcopy(layer), backend="eager")
    torch.testing.assert_close(compiled(example()), layer(example()), rtol=1e-5, atol=1e-5)
    assert (len(report(compiled).sites), report(compiled).refusals) == (1, ()), str(report(compiled))


class Conditioned(nn.Module):
    """Tokens scaled and shifted by weights times cosines and sines of a time, as diffusion models are told it.

    Those stand beside what sums the tokens up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.modulate = nn.Linear(8 + HIDDEN, 16), nn.Linear(16, 2 * HIDDEN)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angle = time[:, None] * inverse_frequencies(4)
        told = torch.cat((x.mean(1), angle.cos(), angle.sin()), dim=-1)
        scale, shift = self.modulate(functional.silu(self.embed(told)))[:, None].chunk(2, dim=-1)
        conditioned: Tensor = x * (1 + scale) + shift
        return conditioned


def test_a_time_that_conditions_is_no_rotation_that_was_missed() -> None:
    found = inspect(Conditioned(), (example(), torch.arange(2)))
    assert (found.sites, found.refusals) == ((), ()), str(found)
