"""Rotations written with detours: what a compiler or a careful person adds, and what generated programs found.

Products of small matrices, axes added and dropped, zeros and ones that do nothing, channels picked by a list, copies.
"""

from __future__ import annotations

import torch
from attention_layers import HEAD_DIM, RotaryAttention, Turn
from rotation_spellings import HALF, HALVES, NEIGHBOURS, Spelling, plain, rotate_half, wide
from torch import Tensor
from torch.nn.functional import dropout


def operands_exchanged(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return sin * rotate_half(x) + cos * x


def casts_between(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle.double())
    wider = x.to(torch.float64)
    return (wider * cos + rotate_half(wider).to(torch.float64) * sin).to(x.dtype)


def views_between(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    flat = x.reshape(-1, *x.shape[-2:])
    return (flat * cos + rotate_half(flat).view_as(flat) * sin).view(x.shape)


def copies_between(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return (x.clone() * cos.contiguous() + rotate_half(x.clone()).contiguous() * sin.clone()).clone()


def transposed_and_back(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    across = x.transpose(-1, -2)
    return (across * cos.mT + rotate_half(x).mT * sin.mT).transpose(-1, -2)


def filled_radius(x: Tensor, angle: Tensor) -> Tensor:
    """What decomposing leaves of `ones_like`."""
    numbers = torch.polar(torch.full_like(angle, 1), angle)
    first, second = x.chunk(2, dim=-1)
    cos, sin = numbers.real, numbers.imag
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def copied_over(x: Tensor, angle: Tensor) -> Tensor:
    """What functionalising leaves of an assignment."""
    copied: Tensor = torch.ops.aten.copy(torch.empty_like(x), plain(x, angle))
    return copied


def picked_sines(x: Tensor, angle: Tensor) -> Tensor:
    """Sines of each half picked by a list, one half with its sign turned."""
    cos, sin = wide(angle)
    first = [*range(HALF)]
    return x * cos + x.roll(HALF, -1) * torch.cat((-sin[..., first], sin[..., HALF:]), dim=-1)


def matrix_products(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    turned: Tensor = matrix @ x.unflatten(-1, (HALF, 2)).unsqueeze(-1)
    return turned.squeeze(-1).flatten(-2)


def matrix_contraction(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack((torch.stack((cos, sin), dim=-1), torch.stack((-sin, cos), dim=-1)), dim=-2)
    return torch.einsum("...pj,...pji->...pi", x.unflatten(-1, (HALF, 2)), matrix).flatten(-2)


def pairs_on_their_own_axis(x: Tensor, angle: Tensor) -> Tensor:
    """Read as [..., planes, 2] this is a rotation of two channels with an angle for every place of an axis."""
    even, odd = x.unflatten(-1, (HALF, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def taken_from_zero(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    sines = torch.cat((0 - sin[..., :HALF], sin[..., HALF:] + 0.0), dim=-1)
    return x * cos - (0 - x.roll(HALF, -1) * sines)


def there_and_back(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle.unsqueeze(0).expand(2, *angle.shape)[1])
    again = torch.stack((x, x)).unbind(0)[1].transpose(0, -1).transpose(-1, 0) * 1.0
    first, second = torch.cat((again,), dim=-1).flip(-1).flip(-1).chunk(2, dim=-1)
    return (again * cos + torch.cat((-second, first), dim=-1).roll(1, -1).roll(-1, -1) * sin)[None][0]


def tiled_and_picked(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().tile(2), angle.tile(2).sin()
    first, second = x[..., list(range(HALF))], x[..., list(range(HALF, HEAD_DIM))]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def dropped_out_tables(x: Tensor, angle: Tensor) -> Tensor:
    """As LASR has it: off, the dropout of the tables hands on what it is given."""
    cos, sin = (dropout(table, p=0.1, training=False) for table in wide(angle))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _row(turn: Turn, planes: str) -> Spelling:
    return Spelling(turn.__name__, lambda: RotaryAttention(turn), planes)


DETOUR_SPELLINGS = (
    *(_row(turn, HALVES) for turn in (operands_exchanged, casts_between, views_between, copies_between)),
    *(_row(turn, HALVES) for turn in (transposed_and_back, filled_radius, copied_over, picked_sines)),
    _row(matrix_products, NEIGHBOURS),
    _row(matrix_contraction, NEIGHBOURS),
    _row(pairs_on_their_own_axis, NEIGHBOURS),
    _row(taken_from_zero, HALVES),
    _row(dropped_out_tables, HALVES),
    _row(there_and_back, HALVES),
    _row(tiled_and_picked, HALVES),
)
