"""Right rotations, each written as somebody once wrote it: every one must be found and equal itself.

`planes` and `orientation` are what the site must say; None where the row has no single answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, RotaryAttention, Turn, example, inverse_frequencies
from torch import Tensor, nn

HALF = HEAD_DIM // 2
HALVES = f"half({HEAD_DIM})"
NEIGHBOURS = f"interleaved({HEAD_DIM})"
TWO_BLOCKS = tuple((block + j, block + j + HALF // 2) for block in (0, HALF) for j in range(HALF // 2))


def one_tensor(length: int) -> tuple[Tensor, ...]:
    return (example(length),)


@dataclass(frozen=True)
class Spelling:
    """One way to write a rotation: `make` builds a layer over `inputs`, [B, T, hidden] and perhaps where tokens stand.

    `proved` says whether the angles are followed to clock times frequency, None where that is left open. `grows` is
    False where the layer takes one length only.
    """

    name: str
    make: Callable[[], nn.Module]
    planes: str | None = HALVES
    orientation: int = 1
    rotations: int = 2
    inputs: Callable[[int], tuple[Tensor, ...]] = one_tensor
    proved: bool | None = None
    grows: bool = True


def wide(angle: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


# Pairs (j, j + D/2).


def plain(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return x * cos + rotate_half(x) * sin


def turned_backwards(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def narrow_tables(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def unbound_halves(x: Tensor, angle: Tensor) -> Tensor:
    first, second = torch.unflatten(x, -1, (2, HALF)).unbind(-2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-2).flatten(-2)


def rolled(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    signs = torch.cat((-torch.ones(HALF), torch.ones(HALF))).to(x.dtype)
    return x * cos + x.roll(HALF, dims=-1) * signs * sin


def permuted_by_index(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    partner = torch.arange(HEAD_DIM).roll(HALF)
    signs = torch.where(torch.arange(HEAD_DIM) < HALF, -1.0, 1.0).to(x.dtype)
    return x * cos + x.index_select(-1, partner) * (sin * signs)


def fused_multiply_add(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return torch.addcmul(x * cos, rotate_half(x), sin)


def assigned_in_place(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    turned = torch.empty_like(x)
    turned[..., :HALF] = x[..., :HALF] * cos - x[..., HALF:] * sin
    turned[..., HALF:] = x[..., HALF:] * cos + x[..., :HALF] * sin
    return turned


def subtracted(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    first, second = torch.split(x, HALF, dim=-1)
    return x * cos - torch.cat((second, first.neg()), dim=-1) * sin


def scaled_tables(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return x * (cos * 1.25) + rotate_half(x) * (sin * 1.25)


def complex_halves(x: Tensor, angle: Tensor) -> Tensor:
    numbers = torch.complex(x[..., :HALF], x[..., HALF:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((numbers.real, numbers.imag), dim=-1)


# Pairs (2j, 2j + 1).


def neighbours(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def every_two(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().repeat_interleave(2, dim=-1), angle.sin().repeat_interleave(2, dim=-1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1)
    return x * cos + turned.flatten(-2) * sin


def complex_product(x: Tensor, angle: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], HALF, 2))
    turned = numbers * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def complex_pairs_scaled(x: Tensor, angle: Tensor) -> Tensor:
    """Channels seen in pairs are scaled before they turn."""
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], HALF, 2)) / -1
    turned = numbers * -torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def complex_from_parts(x: Tensor, angle: Tensor) -> Tensor:
    numbers = torch.view_as_complex(torch.unflatten(x, -1, (HALF, 2)).contiguous())
    turned = numbers * torch.complex(angle.cos(), angle.sin())
    return torch.view_as_real(turned).reshape(x.shape)


def matrices(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.unflatten(torch.stack((cos, -sin, sin, cos), dim=-1), -1, (2, 2))
    pairs = torch.unflatten(x, -1, (HALF, 1, 2))
    return (matrix * pairs).sum(-1).flatten(-2)


def matrix_columns(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.unflatten(torch.stack((cos, -sin, sin, cos), dim=-1), -1, (2, 2))
    pairs = x.reshape(*x.shape[:-1], HALF, 1, 2)
    return (matrix[..., 0] * pairs[..., 0] + matrix[..., 1] * pairs[..., 1]).reshape(x.shape)


def neighbours_assigned(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    turned = torch.zeros_like(x)
    turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    turned[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return turned


# Others.


def neighbours_in_halves_out(x: Tensor, angle: Tensor) -> Tensor:
    sorted_pairs = torch.unflatten(x, -1, (HALF, 2)).transpose(-1, -2).flatten(-2)
    return plain(sorted_pairs, angle)


def first_quarter(x: Tensor, angle: Tensor) -> Tensor:
    return torch.cat((plain(x[..., :8], angle[..., ::2]), x[..., 8:]), dim=-1)


def last_half(x: Tensor, angle: Tensor) -> Tensor:
    kept, turned = torch.split(x, [8, 8], dim=-1)
    return torch.cat((kept, plain(turned, angle[..., ::2])), dim=-1)


def in_the_middle(x: Tensor, angle: Tensor) -> Tensor:
    turned = neighbours(x[..., 4:12], angle[..., ::2])
    return torch.cat((x[..., :4], turned, x[..., 12:]), dim=-1)


# Where the angles come from.


class AnglesBy(nn.Module):
    """Angles [T, planes] computed by a function of positions [T] and frequencies [planes]."""

    inv_freq: Tensor

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("inv_freq", inverse_frequencies(HALF))

    def forward(self, x: Tensor, length: int) -> Tensor:
        return self.rule(torch.arange(length, device=x.device).to(x.dtype), self.inv_freq)


def frequencies_in_place(steps: Tensor) -> Tensor:
    exponents = torch.arange(HALF, dtype=steps.dtype, device=steps.device)
    exponents /= HALF
    frequencies: Tensor = 1.0 / 10000.0**exponents
    return frequencies


class AnglesFromTable(nn.Module):
    """Angles kept for every position up to a limit and looked up by position."""

    table: Tensor

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.look_up = look_up
        self.register_buffer("table", torch.outer(torch.arange(64.0), inverse_frequencies(HALF)))

    def forward(self, x: Tensor, length: int) -> Tensor:
        return self.look_up(self.table, torch.arange(length, device=x.device))


class LearnedAngles(nn.Module):
    """Angles whose frequencies are trained, `exp(log_theta)`."""

    def __init__(self) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(inverse_frequencies(HALF).log())

    def forward(self, x: Tensor, length: int) -> Tensor:
        return torch.outer(torch.arange(length, device=x.device).to(x.dtype), self.log_theta.exp())


class CosAndSinTables(nn.Module):
    """A rotation by tables of cosines and sines [limit, D] that are indexed by position."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        cos, sin = wide(torch.outer(torch.arange(64.0), inverse_frequencies(HALF)))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        positions = torch.arange(x.shape[-2], device=x.device)[None]
        return x * self.cos[positions][:, None] + rotate_half(x) * self.sin[positions][:, None]


class FirstTokenLearned(nn.Module):
    """Tables whose first token turns by an angle of its own, as a class token beside patches does."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.linspace(0.2, 2.0, HALF)[None])

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        own, others = wide(self.angle), wide(angle[1:])
        cos, sin = (torch.cat(tables) for tables in zip(own, others, strict=True))
        return x * cos + rotate_half(x) * sin


def axis_after_axis(x: Tensor, angle: Tensor) -> Tensor:
    """Two axes in tables one behind the other, cut apart to turn each part of the channels for itself."""
    axes = angle[:, : HALF // 2], angle.flip(0)[:, HALF // 2 :]
    tables = (
        torch.cat(columns, dim=-1).split(HALF, dim=-1) for columns in zip(*map(wide, axes), strict=True)
    )
    cosines, sines = tables
    parts = zip(x.split(HALF, dim=-1), cosines, sines, strict=True)
    return torch.cat([part * cos + rotate_half(part) * sin for part, cos, sin in parts], dim=-1)


def _row(turn: Turn, planes: str | None = HALVES, orientation: int = 1) -> Spelling:
    return Spelling(turn.__name__, lambda: RotaryAttention(turn), planes, orientation)


def _angles(name: str, angles: Callable[[], nn.Module], turn: Turn = plain) -> Spelling:
    return Spelling(name, lambda: RotaryAttention(turn, angles=angles()))


def _by(name: str, rule: Callable[[Tensor, Tensor], Tensor]) -> Spelling:
    return _angles(name, lambda: AnglesBy(rule))


def _looked_up(name: str, look_up: Callable[[Tensor, Tensor], Tensor]) -> Spelling:
    return _angles(name, lambda: AnglesFromTable(look_up))


HALF_SPELLINGS = (
    *(_row(turn) for turn in (plain, narrow_tables, unbound_halves, rolled, permuted_by_index)),
    *(_row(turn) for turn in (fused_multiply_add, assigned_in_place, scaled_tables, complex_halves)),
    _row(turned_backwards, orientation=-1),
    _row(subtracted),
)
NEIGHBOUR_SPELLINGS = tuple(
    _row(turn, NEIGHBOURS)
    for turn in (
        neighbours,
        every_two,
        complex_product,
        complex_pairs_scaled,
        complex_from_parts,
        matrices,
        matrix_columns,
        neighbours_assigned,
    )
)
OTHER_PLANES = (
    _row(neighbours_in_halves_out, NEIGHBOURS),
    _row(first_quarter, f"partial(half(8), 0, {HEAD_DIM})"),
    _row(last_half, f"partial(half(8), 8, {HEAD_DIM})"),
    _row(axis_after_axis, f"pairs({TWO_BLOCKS}, {HEAD_DIM})"),
    _row(in_the_middle, f"partial(interleaved(8), 4, {HEAD_DIM})"),
)
ANGLES = (
    _by("angles_by_einsum", lambda steps, freq: torch.einsum("t,p->tp", steps, freq)),
    _by("angles_by_broadcast", lambda steps, freq: steps[:, None] * freq),
    _by("angles_by_matmul", lambda steps, freq: (freq[None, :, None] @ steps[None, None, :]).mT[0]),
    _by("angles_by_addition", lambda steps, freq: torch.ones_like(steps)[:, None].mul(freq).cumsum(0) - freq),
    _by("angles_by_grid", lambda steps, freq: torch.mul(*torch.meshgrid(steps, freq, indexing="ij"))),
    _by("angles_by_turned_grid", lambda steps, freq: torch.mul(*torch.meshgrid(freq, steps, indexing="xy"))),
    _by("angles_made_in_place", lambda steps, _: torch.outer(steps, frequencies_in_place(steps))),
    _looked_up("angles_sliced", lambda table, steps: table[: steps.shape[0]]),
    _looked_up("angles_indexed", lambda table, steps: table[steps]),
    _looked_up("angles_embedded", lambda table, steps: nn.functional.embedding(steps, table)),
    _looked_up("angles_selected", lambda table, steps: table.index_select(0, steps)),
    _angles("angles_learned", LearnedAngles),
    Spelling("cos_and_sin_tables", lambda: RotaryAttention(CosAndSinTables())),
    Spelling("first_token_learned", lambda: RotaryAttention(FirstTokenLearned())),
)
ROTATION_SPELLINGS = HALF_SPELLINGS + NEIGHBOUR_SPELLINGS + OTHER_PLANES + ANGLES
