"""Rotations written with matrices and lists of places: of channels that move, of turns, kept or put together.

Matrices are put together by sums, joins, blocks, slices and lists; what turns is added or put into zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_layers import HEAD_DIM, RotaryAttention, Turn, inverse_frequencies
from rotation_spellings import HALF, HALVES, NEIGHBOURS, Spelling, rotate_half, wide
from torch import Tensor, nn

EVEN, ODD = torch.arange(0, HEAD_DIM, 2), torch.arange(1, HEAD_DIM, 2)


def halves_moved() -> Tensor:
    """`x @ M` is `rotate_half(x)`."""
    return torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.eye(HALF))


def moved_by_a_matrix(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    return x * cos + (x @ halves_moved().to(x.dtype)) * sin


def moved_by_filled_entries(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    moved = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=x.dtype)
    for plane in range(HALF):
        moved[plane, plane + HALF] = 1
        moved[plane + HALF, plane] = -1
    return x * cos + torch.einsum("bhtd,de->bhte", x, moved) * sin


def gathered(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    partner = torch.arange(HEAD_DIM).roll(HALF)
    signs = torch.where(torch.arange(HEAD_DIM) < HALF, -1.0, 1.0).to(x.dtype)
    return x * cos + torch.gather(x, -1, partner.expand_as(x)) * signs * sin


def taken_along(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    partner = torch.arange(HEAD_DIM).roll(HALF).view(1, 1, 1, -1)
    signs = torch.where(torch.arange(HEAD_DIM) < HALF, -1.0, 1.0).to(x.dtype)
    return x * cos + torch.take_along_dim(x, partner, -1) * signs * sin


def matrices_of_diagonals(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    across = torch.diag_embed(sin, offset=HALF) - torch.diag_embed(sin, offset=-HALF)
    turn = torch.diag_embed(torch.cat((cos, cos), dim=-1)) + across
    return (x.unsqueeze(-2) @ turn).squeeze(-2)


def matrices_of_products(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    turn = torch.diag_embed(cos) + halves_moved().to(x.dtype) @ torch.diag_embed(sin)
    return torch.einsum("bhtd,tde->bhte", x, turn)


def matrices_of_blocks(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    turn = torch.cat((torch.cat((cos, -sin), dim=-1), torch.cat((sin, cos), dim=-1)), dim=-2)
    return torch.einsum("tij,bhtj->bhti", turn, x)


def matrices_filled_by_lists(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    turn = x.new_zeros(angle.shape[0], HEAD_DIM, HEAD_DIM)
    turn[:, EVEN, EVEN], turn[..., ODD, ODD] = cos, cos
    turn[:, EVEN, ODD], turn[..., ODD, EVEN] = -sin, sin
    return (turn @ x.unsqueeze(-1)).squeeze(-1)


def matrices_filled_by_slices(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    turn = x.new_zeros(angle.shape[0], HEAD_DIM, HEAD_DIM)
    turn[:, ::2, ::2] += cos
    turn[:, 1::2, 1::2] += cos
    turn[:, ::2, 1::2] -= sin
    turn[:, 1::2, ::2] += sin
    return (turn @ x.unsqueeze(-1)).squeeze(-1)


def blocks_of_every_token(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    turns = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    turn = torch.stack([torch.block_diag(*token) for token in turns])
    return (turn @ x.unsqueeze(-1)).squeeze(-1)


def added_into_zeros(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.zeros_like(x)
    turned[..., ::2] += even * cos
    turned[..., 1::2] += odd * cos
    turned[..., ::2] -= odd * sin
    turned[..., 1::2] += even * sin
    return turned


def added_at_places(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., EVEN], x[..., ODD]
    turned = torch.zeros_like(x).index_add(-1, EVEN, even * cos - odd * sin)
    return turned.index_copy_(-1, ODD, odd * cos + even * sin)


def put_at_places(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., EVEN], x[..., ODD]
    turned = torch.empty_like(x)
    turned[..., EVEN] = even * cos - odd * sin
    turned[..., ODD] = odd * cos + even * sin
    return turned


def multiplied_in_place(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = wide(angle)
    turned = x.clone()
    turned *= cos
    turned += rotate_half(x) * sin
    return turned


def halves_in_place(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    turned = x.clone()
    first, second = turned[..., :HALF], turned[..., HALF:]
    before = first.clone()
    first.mul_(cos).sub_(second * sin)
    second.mul_(cos).add_(before * sin)
    return turned


class KeptMatrix(nn.Module):
    """Channels moved by a matrix in a buffer."""

    moved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moved", halves_moved(), persistent=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = wide(angle)
        return x * cos + (x @ self.moved) * sin


class KeptTurns(nn.Module):
    """Matrices of every position in a buffer, [T, D, D], or looked up in it, or planes of their own, [T, D/2, 2, 2]."""

    turns: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        angle = torch.outer(torch.arange(64.0), inverse_frequencies(HALF))
        cos, sin = angle.cos(), angle.sin()
        turns = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
        whole = torch.stack([torch.block_diag(*token) for token in turns])
        self.register_buffer("turns", turns if kind == "planes" else whole, persistent=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        if self.kind == "planes":
            pairs = x.unflatten(-1, (HALF, 2))
            return torch.einsum("bhtpj,tpij->bhtpi", pairs, self.turns[: angle.shape[0]]).flatten(-2)
        if self.kind == "looked up":
            return (self.turns[torch.arange(angle.shape[0])] @ x.unsqueeze(-1)).squeeze(-1)
        rows = x.permute(2, 0, 1, 3)
        turned = torch.bmm(rows.flatten(1, 2), self.turns[: angle.shape[0]].mT)
        return turned.view(rows.shape).permute(1, 2, 0, 3)


def _kept(kind: str) -> Callable[[], nn.Module]:
    return lambda: RotaryAttention(KeptTurns(kind))


def _row(turn: Turn, planes: str, *, proved: bool = True, grows: bool = True) -> Spelling:
    return Spelling(turn.__name__, lambda: RotaryAttention(turn), planes, proved=proved, grows=grows)


MATRIX_SPELLINGS = (
    *(_row(turn, HALVES) for turn in (moved_by_a_matrix, moved_by_filled_entries, gathered)),
    _row(taken_along, HALVES, grows=False),  # torch.export fixes the length there
    *(_row(turn, HALVES) for turn in (matrices_of_diagonals, matrices_of_products, matrices_of_blocks)),
    *(_row(turn, NEIGHBOURS) for turn in (matrices_filled_by_lists, matrices_filled_by_slices)),
    _row(blocks_of_every_token, NEIGHBOURS, proved=False, grows=False),
    *(_row(turn, NEIGHBOURS) for turn in (added_into_zeros, added_at_places, put_at_places)),
    *(_row(turn, HALVES) for turn in (multiplied_in_place, halves_in_place)),
    Spelling("kept_matrix", lambda: RotaryAttention(KeptMatrix()), HALVES, proved=True),
    *(
        Spelling(f"kept_turns_{kind}", _kept(kind), NEIGHBOURS, proved=False)
        for kind in ("planes", "looked up", "whole")
    ),
)
