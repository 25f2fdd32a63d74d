"""Matrices that turn or move channels: near misses, numbers that change afterwards, rows that differ."""

import copy

import pytest
import torch
from attention_layers import HEAD_DIM, RotaryAttention, Turn, example, inverse_frequencies, sharpen
from matrix_spellings import EVEN, ODD, KeptMatrix, KeptTurns, halves_moved
from measuring import GrapeCalls
from rotation_spellings import HALF, rotate_half, wide
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report


def an_entry_beside_the_planes(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    turn = x.new_zeros(angle.shape[0], HEAD_DIM, HEAD_DIM)
    turn[:, EVEN, EVEN], turn[:, ODD, ODD] = cos, cos
    turn[:, EVEN, ODD], turn[:, ODD, EVEN] = -sin, sin
    turn[:, 0, 4] = 0.1
    return (turn @ x.unsqueeze(-1)).squeeze(-1)


def moved_without_signs(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return x * cos + (x @ halves_moved().abs().to(x.dtype)) * sin


def gathered_one_too_far(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    partner = torch.arange(HEAD_DIM).roll(HALF + 1)
    signs = torch.where(torch.arange(HEAD_DIM) < HALF, -1.0, 1.0).to(x.dtype)
    return x * cos + torch.gather(x, -1, partner.expand_as(x)) * signs * sin


@pytest.mark.parametrize("turn", [an_entry_beside_the_planes, moved_without_signs, gathered_one_too_far])
def test_a_near_miss_is_refused_in_words(turn: Turn) -> None:
    found = inspect(sharpen(RotaryAttention(turn)), (example(),))
    assert found.sites == ()
    assert found.refusals


@pytest.mark.parametrize("kind", ["moved", "planes", "whole"])
def test_a_kept_matrix_that_is_changed_turns_as_it_is_then(kind: str) -> None:
    plain = sharpen(RotaryAttention(KeptMatrix() if kind == "moved" else KeptTurns(kind))).double()
    calls = GrapeCalls()
    compiled = grape_compile(copy.deepcopy(plain), backend=calls)
    x = example().double()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)
    assert calls.rotated == 2, str(report(compiled))
    for layer in (plain, compiled):
        (buffer,) = (each for name, each in layer.named_buffers() if name in ("turn.moved", "turn.turns"))
        with torch.no_grad():
            buffer.view(-1, buffer.shape[-1])[1] += 0.3
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)


class OfTwoRows(nn.Module):
    """Each half of the channels turns by its own row of one full-width table."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(64.0), inverse_frequencies(HALF))
        for name, table in zip(("cos", "sin"), wide(angle), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        cos, sin = (
            torch.cat((table[first][:, :HALF], table[second][:, HALF:]), dim=-1)
            for table in (self.cos, self.sin)
        )
        return x * cos + rotate_half(x) * sin


def test_halves_that_turn_by_other_rows_are_no_rotation() -> None:
    """Rows that are equal in the example need not be in the next call."""
    layer = OfTwoRows()
    compiled = grape_compile(copy.deepcopy(layer), backend="eager")
    x, rows = torch.randn(1, 2, 6, HEAD_DIM), torch.arange(6)
    for second in (rows.clone(), 2 * rows):
        torch.testing.assert_close(compiled(x, rows, second), layer(x, rows, second))
    assert report(compiled).sites == ()
    assert report(compiled).refusals


def test_matrices_that_a_state_dict_may_replace_are_told() -> None:
    kept = KeptTurns("whole")
    kept.register_buffer("turns", kept.turns)
    x = (example(),)
    found = inspect(torch.export.export(sharpen(RotaryAttention(kept)), x), x)
    assert found.sites == ()
    assert any("persistent=False" in refusal.reason for refusal in found.refusals), str(found)
