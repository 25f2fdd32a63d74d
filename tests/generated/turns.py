"""Words that turn: rotations of the channels `x` [..., HEAD_DIM], and how cosines and sines come to their width.

A word is a plain function. Its text becomes part of a generated program, where the constants are the program's own;
the names of its parameters say what it is given: `angle` [..., T, HALF], `cos` and `sin` of that width or of twice it,
or `numbers`, the complex cos + i sin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import detour_spellings as detours
import rotation_spellings as spelled
import torch
from attention_layers import HEAD_DIM
from rotation_spellings import HALF
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """One way to turn pairs of channels: `form` is what it is given, `pairs` which channels turn together."""

    function: Callable[..., Tensor]
    pairs: str = "halves"
    form: str = "angle"
    orientation: int = 1
    out: str = ""
    scale: float = 1.0
    anywhere: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__


# Given cosines and sines of every plane.


def of_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0:HALF], x[..., HALF:HEAD_DIM]
    turned = first * cos - second * sin
    other = second * cos + first * sin
    return torch.cat((turned, other), dim=-1)


def of_parts_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.split(x, HALF, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def of_stacked_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    parts = x.unflatten(-1, (2, HALF))
    first, second = parts[..., 0, :], parts[..., 1, :]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-2).flatten(-2)


def of_matrices_of_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = torch.stack((torch.stack((cos, -sin), dim=-2), torch.stack((sin, cos), dim=-2)), dim=-3)
    turned: Tensor = (rows * x.unflatten(-1, (1, 2, HALF))).sum(-2)
    return turned.flatten(-2)


def of_even_and_odd(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def of_even_and_odd_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (HALF, 2)).unbind(-1)
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)


def of_pairs_joined(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.reshape(*x.shape[:-1], HALF, 2)
    even, odd = pairs[..., 0:1], pairs[..., 1:2]
    cos, sin = cos.unsqueeze(-1), sin.unsqueeze(-1)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def of_products_of_matrices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    matrix = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    turned: Tensor = matrix @ x.unflatten(-1, (HALF, 2)).unsqueeze(-1)
    return turned.squeeze(-1).flatten(-2)


def of_contracted_matrices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    matrix = torch.stack((torch.stack((cos, sin), dim=-1), torch.stack((-sin, cos), dim=-1)), dim=-2)
    return torch.einsum("...pj,...pji->...pi", x.unflatten(-1, (HALF, 2)), matrix).flatten(-2)


def of_flipped_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (HALF, 2))
    sines = torch.stack((-sin, sin), dim=-1)
    turned: Tensor = pairs * cos.unsqueeze(-1) + pairs.flip(-1) * sines
    return turned.flatten(-2)


# Given cosines and sines of every channel.


def by_rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + spelled.rotate_half(x) * sin


def by_rotate_half_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = spelled.rotate_half(x) * sin
    return x * cos - turned


def by_roll(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sines = torch.cat((-sin[..., 0:HALF], sin[..., HALF:HEAD_DIM]), dim=-1)
    return cos * x + torch.roll(x, HALF, -1) * sines


def by_exchanged_stack(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    parts = x.unflatten(-1, (2, HALF))
    turned = torch.stack((parts[..., 1, :].neg(), parts[..., 0, :]), dim=-2)
    return x * cos + turned.flatten(-2) * sin


def by_scaled_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos * 1.25, sin * 1.25
    return x * cos + spelled.rotate_half(x) * sin


def by_every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1)
    return x * cos + turned.flatten(-2) * sin


def by_unbound_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.reshape(*x.shape[:-1], HALF, 2).unbind(dim=-1)
    turned = torch.stack((odd, -even), dim=-1).reshape(x.shape)
    return x * cos - turned * sin


# Given complex numbers.


def as_complex_pairs(x: Tensor, numbers: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (HALF, 2)).contiguous())
    return torch.view_as_real(pairs * numbers).flatten(-2)


def as_complex_conjugates(x: Tensor, numbers: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], HALF, 2))
    return torch.view_as_real(numbers * pairs.conj()).flatten(-2)


def as_complex_parts(x: Tensor, numbers: Tensor) -> Tensor:
    pairs = torch.complex(x[..., 0:HALF], x[..., HALF:HEAD_DIM]) * numbers
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def as_parts_of_numbers(x: Tensor, numbers: Tensor) -> Tensor:
    return of_even_and_odd(x, numbers.real, numbers.imag)


TURNS: tuple[Turn, ...] = (
    Turn(spelled.plain),
    Turn(spelled.turned_backwards, orientation=-1),
    Turn(spelled.narrow_tables),
    Turn(spelled.unbound_halves),
    Turn(spelled.rolled),
    Turn(spelled.permuted_by_index),
    Turn(spelled.fused_multiply_add),
    Turn(spelled.assigned_in_place),
    Turn(spelled.subtracted),
    Turn(spelled.scaled_tables, scale=1.25),
    Turn(spelled.complex_halves),
    Turn(detours.operands_exchanged),
    Turn(detours.casts_between),
    Turn(detours.views_between, anywhere=False),
    Turn(detours.copies_between),
    Turn(detours.transposed_and_back),
    Turn(spelled.neighbours, "neighbours"),
    Turn(spelled.every_two, "neighbours"),
    Turn(spelled.complex_product, "neighbours"),
    Turn(spelled.complex_from_parts, "neighbours"),
    Turn(spelled.matrices, "neighbours"),
    Turn(spelled.matrix_columns, "neighbours"),
    Turn(spelled.neighbours_assigned, "neighbours"),
    Turn(spelled.neighbours_in_halves_out, "neighbours", out="halves"),
    Turn(of_parts, form="tables"),
    Turn(of_parts_backwards, form="tables", orientation=-1),
    Turn(of_stacked_parts, form="tables"),
    Turn(of_matrices_of_parts, form="tables"),
    Turn(of_even_and_odd, "neighbours", "tables"),
    Turn(of_even_and_odd_backwards, "neighbours", "tables", orientation=-1),
    Turn(of_pairs_joined, "neighbours", "tables"),
    Turn(of_products_of_matrices, "neighbours", "tables"),
    Turn(of_contracted_matrices, "neighbours", "tables"),
    Turn(of_flipped_pairs, "neighbours", "tables"),
    Turn(by_rotate_half, form="wide"),
    Turn(by_rotate_half_backwards, form="wide", orientation=-1),
    Turn(by_roll, form="wide"),
    Turn(by_exchanged_stack, form="wide"),
    Turn(by_scaled_tables, form="wide", scale=1.25),
    Turn(by_every_two, "neighbours", "wide"),
    Turn(by_unbound_pairs, "neighbours", "wide"),
    Turn(as_complex_pairs, "neighbours", "complex"),
    Turn(as_complex_parts, "halves", "complex"),
    Turn(as_parts_of_numbers, "neighbours", "complex"),
)


# From angles to what a word is given.


def cosines(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos(), angle.sin()


def cosines_of_numbers(angle: Tensor) -> tuple[Tensor, Tensor]:
    numbers = torch.polar(torch.ones_like(angle), angle)
    return numbers.real, numbers.imag


def wide_angles(angle: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def wide_tables(angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def tiled_tables(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos().tile(2), angle.tile(2).sin()


def doubled_angles(angle: Tensor) -> tuple[Tensor, Tensor]:
    both = angle.repeat_interleave(2, dim=-1)
    return both.cos(), both.sin()


def doubled_tables(angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, cos), dim=-1).flatten(-2), sin.repeat_interleave(2, dim=-1)


def expanded_angles(angle: Tensor) -> tuple[Tensor, Tensor]:
    both = angle.unsqueeze(-1).expand(*angle.shape, 2).flatten(-2)
    return both.cos(), both.sin()


def polar(angle: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angle), angle)


def complex_of_tables(angle: Tensor) -> Tensor:
    return torch.complex(angle.cos(), angle.sin())


FROM_ANGLES: dict[tuple[str, str], tuple[Callable[..., object], ...]] = {
    ("tables", "halves"): (cosines, cosines_of_numbers),
    ("tables", "neighbours"): (cosines, cosines_of_numbers),
    ("wide", "halves"): (wide_angles, wide_tables, tiled_tables),
    ("wide", "neighbours"): (doubled_angles, doubled_tables, expanded_angles),
    ("complex", "halves"): (polar, complex_of_tables),
    ("complex", "neighbours"): (polar, complex_of_tables),
}
