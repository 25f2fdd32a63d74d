"""Rotations with one thing wrong.

Each row says what the detector has to make of it. `refused`: the map is no rotation, and no site may name it.
Otherwise it is a rotation, though not the usual one: it may be refused, or become an encoding that equals it.
`ordinary` is how many of the two rotated tensors may be said to turn by a closed-form spectrum at positions
0, 1, 2, ... `told`: a refusal needs a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, RotaryAttention, Turn, inverse_frequencies
from torch import Tensor, nn

HALF = HEAD_DIM // 2


@dataclass(frozen=True)
class RotationMutant:
    """One wrong rotation: `make` builds an attention layer that returns its output, queries and keys."""

    name: str
    make: Callable[[], nn.Module]
    refused: bool
    ordinary: int = 0
    told: bool = True


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :HALF], x[..., HALF:]


def wide(angle: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """The rotation every mutant differs from in one place."""
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def sign_lost_on_the_first_half(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def sign_added_on_the_second_half(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos + torch.cat((-second, -first), dim=-1) * sin


def halves_not_exchanged(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos + torch.cat((-first, second), dim=-1) * sin


def opposite_orientation(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def halves_exchanged_in_the_result(x: Tensor, angle: Tensor) -> Tensor:
    first, second = halves(turn(x, angle))
    return torch.cat((second, first), dim=-1)


def table_of_neighbours_pairs_of_halves(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().repeat_interleave(2, dim=-1), angle.sin().repeat_interleave(2, dim=-1)
    first, second = halves(x)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def table_of_halves_pairs_of_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def pairs_from_both_ends(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :HALF], x[..., HALF:].flip(-1)
    return torch.cat((first * cos - second * sin, (first * sin + second * cos).flip(-1)), dim=-1)


def reflection(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    first, second = halves(x)
    return torch.cat((first * cos + second * sin, first * sin - second * cos), dim=-1)


def sine_of_another_angle(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), (1.1 * angle).sin()
    first, second = halves(x)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def sine_of_the_next_position(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos + torch.cat((-second, first), dim=-1) * sin.roll(1, dims=0)


def scale_missing_on_the_sine(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * (1.2 * cos) + torch.cat((-second, first), dim=-1) * sin


def scale_on_one_half(x: Tensor, angle: Tensor) -> Tensor:
    scale = torch.where(torch.arange(HEAD_DIM) < HALF, 1.2, 1.0).to(x.dtype)
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * (scale * cos) + torch.cat((-second, first), dim=-1) * (scale * sin)


def cosine_squared(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = halves(x)
    return x * cos * cos + torch.cat((-second, first), dim=-1) * sin * cos


def without_the_sine_of(plane: int, x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    kept = (torch.arange(HALF) != plane).to(x.dtype)
    first, second = halves(x)
    return torch.cat((first * cos - second * sin * kept, second * cos + first * sin * kept), dim=-1)


def fastest_plane_not_turned(x: Tensor, angle: Tensor) -> Tensor:
    return without_the_sine_of(0, x, angle)


def slowest_plane_not_turned(x: Tensor, angle: Tensor) -> Tensor:
    """The near miss: over a dozen positions this plane turns by 0.003 radians."""
    return without_the_sine_of(HALF - 1, x, angle)


def turned_twice_with_one_half_stale(x: Tensor, angle: Tensor) -> Tensor:
    """The second half is computed from a first half that was already overwritten."""
    cos, sin = angle.cos(), angle.sin()
    first, second = halves(x)
    first = first * cos - second * sin
    return torch.cat((first, second * cos + first * sin), dim=-1)


def one_token_among_many(x: Tensor, angle: Tensor) -> Tensor:
    """The eighth token alone has a cosine that differs between the halves."""
    cos, sin = wide(angle)
    wrong = torch.cat((angle, 2 * angle), dim=-1).cos()
    cos = torch.cat((cos[:7], wrong[7:8], cos[8:]))
    first, second = halves(x)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def first_token_of_unequal_halves(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    own = torch.cat((angle[3:4], 2 * angle[3:4]), dim=-1)
    cos, sin = torch.cat((own.cos(), cos[1:])), torch.cat((own.sin(), sin[1:]))
    first, second = halves(x)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def axes_of_exchanged_sines(x: Tensor, angle: Tensor) -> Tensor:
    """Two axes of tables, each turned by the cosine of one and the sine of the other."""
    quarter = HALF // 2
    axes = wide(angle[:, :quarter]), wide(angle.flip(0)[:, quarter:])
    parts = []
    for part, (cos, _), (_, sin) in zip(x.split(HALF, dim=-1), axes, axes[::-1], strict=True):
        first, second = part.split(quarter, dim=-1)
        parts.append(part * cos + torch.cat((-second, first), dim=-1) * sin)
    return torch.cat(parts, dim=-1)


def next_position(x: Tensor, angle: Tensor) -> Tensor:
    """The angle at position 1 on top: every token is turned as the one behind it."""
    return turn(x, angle + angle[1:2])


class Clock(nn.Module):
    """Angles at positions that are a function of 0, 1, 2, ..."""

    inv_freq: Tensor

    def __init__(self, positions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.positions = positions
        self.register_buffer("inv_freq", inverse_frequencies(HALF))

    def forward(self, x: Tensor, length: int) -> Tensor:
        return torch.outer(self.positions(torch.arange(length, device=x.device)).to(x.dtype), self.inv_freq)


class DrawnTable(nn.Module):
    """Angles that follow no law: drawn once, looked up by position."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", 6.0 * torch.rand(64, HALF, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor, length: int) -> Tensor:
        return self.angles[torch.arange(length, device=x.device)]


def written_through_a_reshape(x: Tensor, angle: Tensor) -> Tensor:
    angle = angle.clone()
    angle.reshape(-1)[5:40:3] = 0.5
    return turn(x, angle)


def one_plane_ahead(x: Tensor, angle: Tensor) -> Tensor:
    angle = angle.clone()
    angle[:, 1] += 1.0
    return turn(x, angle)


def one_half_overwritten(x: Tensor, angle: Tensor) -> Tensor:
    both = torch.cat((angle, angle), dim=-1)
    both[..., HALF:] = 2 * angle
    first, second = halves(x)
    return x * both.cos() + torch.cat((-second, first), dim=-1) * both.sin()


class OverwrittenFrequencies(nn.Module):
    """Frequencies that something else is written over once the angles are made of them."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HALF))

    def forward(self, x: Tensor, length: int) -> Tensor:
        frequencies = self.inv_freq.clone()
        angle = torch.outer(torch.arange(length, device=x.device).to(x.dtype), frequencies)
        frequencies.zero_()
        return angle


def seen_through_a_view(steps: Tensor) -> Tensor:
    view = steps[1:]
    steps += 3
    return torch.cat((steps[:1], view))


def three_axes_written_into_the_first(x: Tensor, angle: Tensor) -> Tensor:
    axes = torch.stack((angle, angle.flip(-2), 2 * angle))
    first = axes[0]
    for axis in (1, 2):
        first[..., axis::3] = axes[axis, ..., axis::3]
    return turn(x, first)


def sine_read_before_the_write(x: Tensor, angle: Tensor) -> Tensor:
    axes = torch.stack((angle, 2 * angle))
    first = axes[0]
    sin = torch.cat((first, first), dim=-1).sin()
    first[..., ::3] = axes[1, ..., ::3]
    cos = torch.cat((first, first), dim=-1).cos()
    left, right = halves(x)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def sine_of_another_activation(x: Tensor, angle: Tensor) -> Tensor:
    (cos, _), (_, sin) = wide(angle + x.mean(-1, keepdim=True)), wide(angle + x.amax(-1, keepdim=True))
    first, second = halves(x)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def angle_of_an_activation(x: Tensor, angle: Tensor) -> Tensor:
    return turn(x, angle + x.mean(-1, keepdim=True))


def _layer(query: Turn, key: Turn | None = None) -> Callable[[], nn.Module]:
    return lambda: RotaryAttention(query, key, expose=True)


def _clock(positions: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: RotaryAttention(turn, angles=Clock(positions), expose=True)


def _drawn() -> nn.Module:
    return RotaryAttention(turn, angles=DrawnTable(), expose=True)


BROKEN: tuple[Turn, ...] = (
    sign_lost_on_the_first_half,
    sign_added_on_the_second_half,
    halves_not_exchanged,
    table_of_neighbours_pairs_of_halves,
    table_of_halves_pairs_of_neighbours,
    sine_of_another_angle,
    sine_of_the_next_position,
    scale_missing_on_the_sine,
    scale_on_one_half,
    cosine_squared,
    fastest_plane_not_turned,
    slowest_plane_not_turned,
    turned_twice_with_one_half_stale,
    one_token_among_many,
    first_token_of_unequal_halves,
    axes_of_exchanged_sines,
    one_half_overwritten,
    sine_read_before_the_write,
    sine_of_another_activation,
)

ROTATION_MUTANTS: tuple[RotationMutant, ...] = (
    *(RotationMutant(wrong.__name__, _layer(wrong), refused=True) for wrong in BROKEN),
    RotationMutant("written_through_a_reshape", _layer(written_through_a_reshape), refused=False, told=False),
    RotationMutant("one_plane_ahead", _layer(one_plane_ahead), refused=False, told=False),
    RotationMutant(
        "frequencies_overwritten",
        lambda: RotaryAttention(turn, angles=OverwrittenFrequencies(), expose=True),
        refused=False,
        ordinary=2,
    ),
    RotationMutant("opposite_orientation", _layer(opposite_orientation), refused=False, ordinary=2),
    RotationMutant("opposite_on_k_only", _layer(turn, opposite_orientation), refused=False, ordinary=2),
    RotationMutant("halves_exchanged", _layer(halves_exchanged_in_the_result), refused=False, ordinary=2),
    RotationMutant("pairs_from_both_ends", _layer(pairs_from_both_ends), refused=False, ordinary=2),
    RotationMutant("reflection", _layer(reflection), refused=False, ordinary=2),
    RotationMutant("off_by_one_on_k", _layer(turn, next_position), refused=False, ordinary=1),
    RotationMutant("three_axes", _layer(three_axes_written_into_the_first), refused=False),
    RotationMutant("angle_of_an_activation", _layer(angle_of_an_activation), refused=False),
    RotationMutant("position_squared", _clock(torch.square), refused=False),
    RotationMutant("position_shifted", _clock(lambda steps: steps + 5), refused=False),
    RotationMutant("position_shifted_behind_a_view", _clock(seen_through_a_view), refused=False, told=False),
    RotationMutant("position_doubled", _clock(lambda steps: 2 * steps), refused=False, ordinary=2),
    RotationMutant("position_negated", _clock(torch.neg), refused=False, ordinary=2),
    RotationMutant("position_saturated", _clock(lambda steps: steps.clamp(max=7)), refused=False),
    RotationMutant("position_by_blocks", _clock(lambda steps: steps // 2), refused=False),
    RotationMutant("position_modulo", _clock(lambda steps: steps % 5), refused=False),
    RotationMutant("position_reversed", _clock(lambda steps: steps.flip(0)), refused=False),
    RotationMutant("position_root", _clock(lambda steps: steps.double().sqrt()), refused=False),
    RotationMutant("drawn_table", _drawn, refused=False),
)

# Right for as long as the sequence the graph was captured with, wrong beyond it: only a replay at another
# length, or a proof, tells them from the ordinary rotation.
LATE_MUTANTS: tuple[RotationMutant, ...] = (
    RotationMutant("saturated_beyond", _clock(lambda steps: steps.clamp(max=15)), refused=False),
    RotationMutant("modulo_beyond", _clock(lambda steps: steps % 16), refused=False),
)
