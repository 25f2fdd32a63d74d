"""Rotations by where tokens stand: in a picture or a film, in a document, at positions given as input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_layers import HEAD_DIM, HIDDEN, RotaryAttention, causal, example, inverse_frequencies
from layer_spellings import by_tables, heads_of
from rotation_spellings import HALF, HALVES, NEIGHBOURS, Spelling, every_two, narrow_tables, plain, wide
from torch import Tensor, nn

ROWS, COLUMNS = 3, 4
PATCHES = ROWS * COLUMNS
Angles = Callable[..., Tensor]
Turn = Callable[[Tensor, Tensor], Tensor]


class Placed(nn.Module):
    """Attention over [B, T, hidden] whose angles, [..., T, planes], are made of what else is given."""

    inv_freq: Tensor

    def __init__(self, angles: Angles, turn: Turn = plain, planes: int = HALF) -> None:
        super().__init__()
        self.angles, self.turn = angles, turn
        self.register_buffer("inv_freq", inverse_frequencies(planes))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor, *places: Tensor) -> Tensor:
        query, key, value = map(heads_of, self.qkv(x).chunk(3, dim=-1))
        angle = self.angles(self.inv_freq, *places)
        query, key = self.turn(query, angle), self.turn(key, angle)
        mask = places[1][:, None] if len(places) > 1 else None
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)


# Pictures of ROWS x COLUMNS patches.


def coordinates() -> tuple[Tensor, Tensor]:
    """Row and column of every patch, [N] each."""
    row, column = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    return row.flatten(), column.flatten()


def looked_up_by_coordinates(inv_freq: Tensor) -> Tensor:
    """A table of the angles of one axis, looked up for both (Qwen2-VL)."""
    table = torch.outer(torch.arange(max(ROWS, COLUMNS)).to(inv_freq.dtype), inv_freq)
    return table[torch.stack(coordinates(), dim=-1)].flatten(1)


class TableOfPatches(nn.Module):
    """Angles of every patch of the largest picture, rows and columns taking turns in the planes (Pixtral)."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        by_row = torch.outer(torch.arange(8.0), inverse_frequencies(HALF)[::2])
        by_column = torch.outer(torch.arange(8.0), inverse_frequencies(HALF)[1::2])
        grid = by_row[:, None, :].expand(8, 8, -1), by_column[None, :, :].expand(8, 8, -1)
        self.register_buffer("table", torch.cat(grid, dim=-1).reshape(64, HALF))

    def forward(self, inv_freq: Tensor) -> Tensor:
        row, column = coordinates()
        return self.table[row * 8 + column]


def complex_axes(inv_freq: Tensor) -> Tensor:
    """Unit numbers of both axes, columns first (SAM 3)."""
    row, column = coordinates()
    angles = (torch.outer(places.to(inv_freq.dtype), inv_freq) for places in (column, row))
    return torch.cat([torch.polar(torch.ones_like(angle), angle) for angle in angles], dim=-1)


def by_unit_numbers(x: Tensor, unit: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], HALF, 2))
    return torch.view_as_real(pairs * unit).flatten(-2)


def pixels_given(inv_freq: Tensor, places: Tensor) -> Tensor:
    """Row and column of every token as input, [B, T, 2] (SigLIP 2 and Gemma 4)."""
    return (places[..., None].to(inv_freq.dtype) * inv_freq).flatten(-2)[:, None]


def three_axes(x: Tensor, angle: Tensor) -> Tensor:
    """Frame, row and column one after another in the channels, the rest not turned (V-JEPA 2, its pairs set right)."""
    frame, row, column, rest = x.split([4, 4, 4, 4], dim=-1)
    parts = zip((frame, row, column), angle.split(2, dim=-1), strict=True)
    return torch.cat([*(every_two(part, own) for part, own in parts), rest], dim=-1)


def film(inv_freq: Tensor) -> Tensor:
    """Twelve tokens as 2 frames of 2 rows of 3 columns."""
    number = torch.arange(PATCHES)
    axes = number // 6, number % 6 // 3, number % 3
    return torch.cat([torch.outer(axis.to(inv_freq.dtype), inv_freq) for axis in axes], dim=-1)


def without_the_first_two(x: Tensor, angle: Tensor) -> Tensor:
    """Tokens left out along the sequence: a class token and a register (DINOv3)."""
    return torch.cat((x[..., :2, :], plain(x[..., 2:, :], angle[2:])), dim=-2)


# Text among pictures: three positions for each token, [3, B, T].

SECTIONS = (2, 3, 3)


def in_sections(inv_freq: Tensor, places: Tensor) -> Tensor:
    """The next planes by the next axis (Qwen2-VL)."""
    angles = (places[..., None].to(inv_freq.dtype) * inv_freq).split(SECTIONS, dim=-1)
    return torch.cat([part[axis] for axis, part in enumerate(angles)], dim=-1)[:, None]


def sections_of_tables(x: Tensor, angles: Tensor) -> Tensor:
    """The same, cut out of wide tables of all three axes."""
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(table.split(SECTIONS * 2, dim=-1))], dim=-1)
        for table in wide(angles)
    )
    return by_tables(x, (cos[:, None], sin[:, None]))


def all_axes(inv_freq: Tensor, places: Tensor) -> Tensor:
    return places[..., None].to(inv_freq.dtype) * inv_freq


def taking_turns(inv_freq: Tensor, places: Tensor) -> Tensor:
    """Time, row, column, time, row, column, ... written over the planes of time (Qwen3-VL)."""
    angles = places[..., None].to(inv_freq.dtype) * inv_freq
    mixed = angles[0].clone()
    for axis in (1, 2):
        mixed[..., axis:6:3] = angles[axis, ..., axis:6:3]
    return mixed[:, None]


class TurnsOfOneText(nn.Module):
    """The same where no picture is: three views of one count, which is what the angles are followed to."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(HALF))

    def forward(self, x: Tensor, length: int) -> Tensor:
        return taking_turns(self.inv_freq, torch.arange(length, device=x.device).expand(3, 1, -1))


# Positions given, [B, T].


def given(inv_freq: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    return (positions[..., None].to(inv_freq.dtype) * inv_freq)[:, None]


class SinesInAParameter(nn.Module):
    """Sines and cosines of every position in a frozen parameter, sines first (RoFormer)."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(64.0), inverse_frequencies(HALF))
        self.table = nn.Parameter(torch.cat((angle.sin(), angle.cos()), dim=-1), requires_grad=False)

    def forward(self, x: Tensor, length: int) -> Tensor:
        return nn.functional.embedding(torch.arange(length, device=x.device), self.table)[None, None]


def sines_first(x: Tensor, table: Tensor) -> Tensor:
    sin, cos = table.chunk(2, dim=-1)
    sin, cos = (
        torch.stack((sin, sin), dim=-1).reshape(table.shape),
        torch.stack((cos, cos), dim=-1).reshape(table.shape),
    )
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)
    return x * cos + turned * sin


class SinesGathered(nn.Module):
    """The same table in a buffer, gathered by position (GPT-J)."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(64.0), inverse_frequencies(HALF))
        self.register_buffer("table", torch.cat((angle.sin(), angle.cos()), dim=-1))

    def forward(self, x: Tensor, length: int) -> Tensor:
        positions = torch.arange(length, device=x.device)[None, :, None].expand(x.shape[0], -1, HEAD_DIM)
        return self.table.expand(x.shape[0], -1, -1).gather(1, positions)[:, None]


# Angles that depend on the length of the sequence.


class ByLength(nn.Module):
    """A base that grows with the length (dynamic NTK)."""

    def forward(self, x: Tensor, length: int) -> Tensor:
        base = 10000.0 * (2.0 * max(length, 8) / 8 - 1.0) ** (HEAD_DIM / (HEAD_DIM - 2))
        inv_freq = 1.0 / base ** (torch.arange(0, HEAD_DIM, 2, device=x.device).to(x.dtype) / HEAD_DIM)
        return torch.outer(torch.arange(length, device=x.device).to(x.dtype), inv_freq)


class ShortOrLong(nn.Module):
    """Frequencies chosen by the last position and kept in a buffer (LongRoPE)."""

    inv_freq: Tensor
    short: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("inv_freq", "short"):
            self.register_buffer(name, inverse_frequencies(HALF))

    def forward(self, x: Tensor, length: int) -> Tensor:
        positions = torch.arange(length, device=x.device)
        long = self.short / torch.linspace(1.0, 8.0, HALF, device=x.device).to(x.dtype)
        self.inv_freq.copy_(torch.where(positions.max() + 1 > 14, long, self.short))
        return torch.outer(positions.to(x.dtype), self.inv_freq)


def and_axes(length: int) -> tuple[Tensor, ...]:
    """Five tokens of text, then a picture of two rows."""
    steps = torch.arange(length)
    behind = (steps - 5).clamp(min=0)
    places = torch.stack(
        (steps.clamp(max=5), steps.clamp(max=5) + behind // 4, steps.clamp(max=5) + behind % 4)
    )
    return example(length), places[:, None].expand(-1, 2, -1).contiguous()


def and_pixels(length: int) -> tuple[Tensor, ...]:
    steps = torch.arange(length)
    return example(length), torch.stack((steps // 4, steps % 4), dim=-1)[None].repeat(2, 1, 1)


def and_positions(length: int) -> tuple[Tensor, ...]:
    """Left padding: the second sequence starts three tokens later."""
    steps = torch.arange(length)
    return example(length), torch.stack((steps, (steps - 3).clamp(min=0)))


def and_documents(length: int) -> tuple[Tensor, ...]:
    """Two documents in one sequence: positions restart, and no token sees the other document."""
    steps = torch.arange(length)
    places, masks = [], []
    for start in (5, 8):
        document = (steps >= start).long()
        places.append(steps - start * document)
        masks.append(causal(length) & (document[:, None] == document))
    return example(length), torch.stack(places), torch.stack(masks)


def _picture(
    name: str, angles: Angles, turn: Turn = plain, planes: str = HALVES, frequencies: int = 4
) -> Spelling:
    return Spelling(name, lambda: Placed(angles, turn, frequencies), planes, grows=False)


def _by_length(name: str, angles: Callable[[], nn.Module], proved: bool, turn: Turn = plain) -> Spelling:
    return Spelling(name, lambda: RotaryAttention(turn, angles=angles()), proved=proved)


PLACE_SPELLINGS = (
    _picture("looked_up_by_coordinates", looked_up_by_coordinates),
    Spelling("table_of_patches", lambda: Placed(TableOfPatches()), grows=False, proved=False),
    _picture("complex_axes", complex_axes, by_unit_numbers, NEIGHBOURS),
    _picture("three_axes", film, three_axes, f"partial(interleaved(12), 0, {HEAD_DIM})", 2),
    Spelling("pixels_given", lambda: Placed(pixels_given, planes=4), inputs=and_pixels),
    Spelling("without_the_first_two", lambda: RotaryAttention(without_the_first_two)),
    Spelling("in_sections", lambda: Placed(in_sections), inputs=and_axes),
    Spelling("sections_of_tables", lambda: Placed(all_axes, sections_of_tables), inputs=and_axes),
    Spelling("taking_turns", lambda: Placed(taking_turns, narrow_tables), inputs=and_axes),
    Spelling("positions_given", lambda: Placed(given), inputs=and_positions, proved=True),
    Spelling("documents", lambda: Placed(given), inputs=and_documents, proved=True),
    _by_length("turns_of_one_text", TurnsOfOneText, True, narrow_tables),
    _by_length("frequencies_by_length", ByLength, True),
    _by_length("short_or_long", ShortOrLong, True),
    Spelling(
        "sines_in_a_parameter",
        lambda: RotaryAttention(sines_first, angles=SinesInAParameter()),
        NEIGHBOURS,
        proved=False,
    ),
    Spelling(
        "sines_gathered",
        lambda: RotaryAttention(sines_first, angles=SinesGathered()),
        NEIGHBOURS,
        proved=False,
    ),
)
