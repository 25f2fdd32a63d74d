"""Rotations written with detours, as generated programs found them: products of small matrices, axes added and dropped,
zeros and ones that do nothing, channels picked by a list, decomposed attention.
"""

from __future__ import annotations

import torch
from attention_layers import HEAD_DIM, RotaryAttention, Turn
from rotation_spellings import HALF, HALVES, NEIGHBOURS, Spelling, wide
from torch import Tensor
from torch.nn.functional import dropout


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
    _row(matrix_products, NEIGHBOURS),
    _row(matrix_contraction, NEIGHBOURS),
    _row(pairs_on_their_own_axis, NEIGHBOURS),
    _row(taken_from_zero, HALVES),
    _row(dropped_out_tables, HALVES),
    _row(there_and_back, HALVES),
    _row(tiled_and_picked, HALVES),
)
