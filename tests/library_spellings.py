"""Rotations as other libraries write them: cuts from the end, slices assigned in place, angles kept twice, tables
filled up, queries and keys as one.
"""

from __future__ import annotations

import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, RotaryAttention, attend, inverse_frequencies
from rotation_spellings import (
    HALF,
    HALVES,
    NEIGHBOURS,
    AnglesBy,
    Spelling,
    complex_product,
    plain,
    rotate_half,
    wide,
)
from torch import Tensor, nn


def from_the_end(steps: Tensor, frequencies: Tensor) -> Tensor:
    """The last angles, as many as there are tokens, of as many."""
    return torch.outer(steps, frequencies)[-steps.shape[0] :]


def cut_twice(x: Tensor, angle: Tensor) -> Tensor:
    """The first two tokens stay; the others are cut out of x anew for each of the two products (DINOv3)."""
    cos, sin = wide(angle[2:])
    turned = x[..., 2:, :] * cos + rotate_half(x[..., 2:, :]) * sin
    return torch.cat((x[..., :2, :], turned), dim=-2)


def halves_as_numbers(x: Tensor, angle: Tensor) -> Tensor:
    """Rounded to the type of x before the parts are put side by side (Gemma)."""
    pairs = torch.stack(x.transpose(1, 2).double().chunk(2, dim=-1), dim=-1)
    numbers = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle)[:, None]
    parts = torch.view_as_real(numbers).type_as(x).chunk(2, dim=-1)
    return torch.cat(parts, dim=-2).flatten(-2).transpose(1, 2)


def seen_as_it_was(x: Tensor, angle: Tensor) -> Tensor:
    """Unit numbers times one and plus zero, and the result seen in the shape of the operand (AudioCraft)."""
    unit = torch.polar(torch.ones_like(angle), angle) * 1.0 + 0.0
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (HALF, 2))) * unit).view_as(x)


def spread_together(steps: Tensor, frequencies: Tensor) -> Tensor:
    """Columns and rows of a picture two tokens wide, whose angles are spread over it and joined."""
    quarter = frequencies[: HALF // 2]
    rows, columns = (torch.outer(axis, quarter) for axis in (steps[: (len(steps) + 1) // 2], steps[:2]))
    spread = torch.broadcast_tensors(rows[:, None], columns[None])
    return torch.cat(spread, dim=-1).flatten(0, 1)[: len(steps)]


def filled_up(x: Tensor, angle: Tensor) -> Tensor:
    """Tables of fewer planes than there are, filled up with ones and zeros in front (LTX)."""
    cos, sin = (each[:, :-2].repeat_interleave(2, dim=-1) for each in (angle.cos(), angle.sin()))
    cos = torch.cat((torch.ones_like(cos[:, :4]), cos), dim=-1)
    sin = torch.cat((torch.zeros_like(sin[:, :4]), sin), dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


def turned_again(x: Tensor, angle: Tensor) -> Tensor:
    """By the angles of one axis twice and then, all channels again, by those of another."""
    return plain(plain(plain(x, angle), angle), angle.flip(0))


class HeldFactor(nn.Module):
    """Tables times a number that the module holds as a tensor (FiT with YaRN)."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.25))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = wide(angle)
        return x * (cos * self.factor) + rotate_half(x) * (self.factor * sin)


class TurnedAsOne(nn.Module):
    """Queries and keys of one projection, stacked and turned at once (Infinity)."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = AnglesBy(torch.outer)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        query, key = plain(torch.stack((query, key)), self.angles(x, x.shape[1])).unbind(0)
        return attend(query, key, value).transpose(1, 2).flatten(2)


class KeptTwice(nn.Module):
    """Frequencies of neighbours kept twice in a buffer (RetNet)."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        twice = inverse_frequencies(HALF).repeat_interleave(2)
        self.register_buffer("frequencies", twice, persistent=False)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device).to(x.dtype)[:, None] * self.frequencies
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1)
        return x * angle.cos() + turned.flatten(-2) * angle.sin()


class PlainAttribute(nn.Module):
    """Unit numbers kept as an attribute that is no buffer, by a module whose code does not call itself `self`."""

    def __init__(itself) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(64.0), inverse_frequencies(HALF))
        itself.numbers = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def forward(itself, x: Tensor, _: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (HALF, 2)))
        return torch.view_as_real(pairs * itself.numbers[: x.shape[-2]]).flatten(-2).to(x.dtype)


class AssignedToItsPart(nn.Module):
    """Queries and keys turned where they stand in the one tensor of both and the values (flash-attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = AnglesBy(torch.outer)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(*x.shape[:2], 3, HEADS, HEAD_DIM)
        angle = self.angles(x, x.shape[1])[:, None]
        for which in (0, 1):
            parts[:, :, which] = plain(parts[:, :, which], angle)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        return attend(query, key, value).transpose(1, 2).flatten(2)


LIBRARY_SPELLINGS = (
    Spelling(
        "from_the_end", lambda: RotaryAttention(complex_product, angles=AnglesBy(from_the_end)), NEIGHBOURS
    ),
    Spelling("cut_twice", lambda: RotaryAttention(cut_twice), HALVES),
    Spelling("halves_as_numbers", lambda: RotaryAttention(halves_as_numbers), HALVES),
    Spelling("kept_twice", lambda: RotaryAttention(KeptTwice()), NEIGHBOURS, proved=True),
    Spelling("plain_attribute", lambda: RotaryAttention(PlainAttribute()), NEIGHBOURS),
    Spelling("assigned_to_its_part", AssignedToItsPart, HALVES),
    Spelling("seen_as_it_was", lambda: RotaryAttention(seen_as_it_was), NEIGHBOURS),
    Spelling(
        "spread_together",
        lambda: RotaryAttention(plain, angles=AnglesBy(spread_together)),
        HALVES,
        grows=False,
    ),
    Spelling(
        "filled_up",
        lambda: RotaryAttention(filled_up),
        f"partial(interleaved({HEAD_DIM - 4}), 4, {HEAD_DIM})",
    ),
    Spelling("turned_again", lambda: RotaryAttention(turned_again), HALVES, rotations=6, grows=False),
    Spelling("held_factor", lambda: RotaryAttention(HeldFactor()), HALVES),
    Spelling("turned_as_one", TurnedAsOne, HALVES, rotations=1),
)
