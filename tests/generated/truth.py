"""What a program means, measured on its own functions in float64: which maps turn, which biases are linear.

Nothing here knows the passes. A rotation is told from the matrices [T, D, D] of a `turn_...` function at angles drawn
at random: 2 x 2 blocks that are a rotation times one constant for all tokens and planes, the other channels kept in
order. ALiBi is told from the bias itself: up to a number per row, and below the diagonal, slope times key.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from generated.biases import ALIBI
from generated.program import Loaded, Program

TOKENS = 5
EXACT = 1e-9


class Truth(enum.Enum):
    """TRUE: the encoding as the words say. FREE: an encoding all the same, though another. FALSE: none."""

    TRUE = "true"
    FREE = "free"
    FALSE = "false"


def tables(program: Program, angle: Tensor) -> tuple[Tensor, ...]:
    """Angles in the form the program's sides are given."""
    assert program.angles is not None
    table = program.angles.table
    form = "angle" if table is None else table.form
    if form == "angle":
        return (angle,)
    if form == "complex":
        return (torch.polar(torch.ones_like(angle), angle),)
    if form == "wide":
        halves = {side.turn.pairs for side in program.sides.values()} == {"halves"}
        angle = torch.cat((angle, angle), dim=-1) if halves else angle.repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


def angles(program: Program) -> Tensor:
    """Angles drawn at random, [T, planes]."""
    generator = torch.Generator().manual_seed(3)
    return 0.3 + 2.4 * torch.rand(TOKENS, program.shape.width // 2, generator=generator, dtype=torch.float64)


def turned(program: Program, loaded: Loaded, name: str, x: Tensor, angle: Tensor) -> Tensor:
    """What `turn_<name>` makes of x [T, H, D] at angles [T, planes], called with as many heads as the program has."""
    heads_last = program.shape.heads_last
    given = tables(program, angle.unsqueeze(-2) if heads_last else angle)
    turn: Any = loaded.names[f"turn_{name}"]
    results = []
    for some in x.split(program.shape.heads if name == "query" else program.shape.kv_heads, dim=1):
        result: Tensor = turn(some[None] if heads_last else some.transpose(0, 1)[None], *given)
        results.append(result[0] if heads_last else result[0].transpose(0, 1))
    return torch.cat(results, dim=1)


def probe(program: Program) -> Tensor:
    """Random heads, as many as they have coordinates, [T, D, D]."""
    dim, generator = program.shape.dim, torch.Generator().manual_seed(4)
    return torch.randn(TOKENS, dim, dim, generator=generator, dtype=torch.float64)


def matrices(program: Program, loaded: Loaded, name: str) -> Tensor | None:
    """The matrices of `turn_<name>`, [T, D, D], by token; None where it is no linear map of the token's channels."""
    angle, x = angles(program), probe(program)
    units = torch.eye(program.shape.dim, dtype=torch.float64).expand_as(x)
    columns = turned(program, loaded, name, units, angle)
    found = turned(program, loaded, name, x, angle)
    if columns.shape != units.shape or not torch.allclose(found, x @ columns, rtol=0, atol=EXACT):
        return None
    return columns.mT


def turns_something(program: Program, loaded: Loaded, name: str) -> bool:
    """Whether `turn_<name>` rotates what it is at angle zero: a tensor made of x, its square or the token before."""
    angle, x = angles(program), probe(program)
    start = turned(program, loaded, name, x, torch.zeros_like(angle))
    found = turned(program, loaded, name, x, angle)
    if start.shape != x.shape:
        return False
    pairs = program.planes_out(program.sides[name]).pairs()
    first, second = (start[..., list(channels)] for channels in zip(*pairs, strict=True))
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    for way in (sin, -sin):
        rotated = start.clone()
        rotated[..., [pair[0] for pair in pairs]] = first * cos - second * way
        rotated[..., [pair[1] for pair in pairs]] = second * cos + first * way
        if torch.allclose(found, rotated, rtol=0, atol=EXACT):
            return True
    return False


def is_rotation(maps: Tensor) -> bool:
    """Whether matrices [T, D, D] are block rotations times one constant, other channels kept in order."""
    support = (maps.abs() > EXACT).any(0)
    planes: dict[tuple[int, ...], list[int]] = {}
    kept = []
    for row, sources in enumerate(support):
        at = tuple(sources.nonzero().flatten().tolist())
        if len(at) == 1 and bool((maps[:, row, at[0]] - 1).abs().max() <= EXACT):
            kept.append(at[0])
        elif len(at) == 2:
            planes.setdefault(at, []).append(row)
        else:
            return False
    used = [channel for at in planes for channel in at] + kept
    if not planes or len(set(used)) != len(used) or kept != sorted(kept):
        return False
    if any(len(rows) != 2 for rows in planes.values()):
        return False
    blocks = torch.stack([maps[:, rows][:, :, list(at)] for at, rows in planes.items()])
    grams = blocks.mT @ blocks
    size = grams[0, 0, 0, 0]
    return torch.allclose(grams, size * torch.eye(2, dtype=grams.dtype), rtol=0, atol=EXACT)


def wanted(program: Program, name: str) -> Tensor:
    """The matrices the words of a side stand for, by their pairs alone."""
    side, dim = program.sides[name], program.shape.dim
    angle = angles(program)
    maps = torch.eye(dim, dtype=torch.float64).repeat(TOKENS, 1, 1)
    before, after = program.planes(side).pairs(), program.planes_out(side).pairs()
    for channels in before:
        maps[:, list(channels)] = 0.0
    for plane, ((a, b), (c, d)) in enumerate(zip(before, after, strict=True)):
        cos, sin = side.turn.scale * angle[:, plane].cos(), side.turn.scale * angle[:, plane].sin()
        sin = side.turn.orientation * sin
        maps[:, c, a], maps[:, c, b] = cos, -sin
        maps[:, d, a], maps[:, d, b] = sin, cos
    return maps


def of_side(program: Program, loaded: Loaded, name: str) -> Truth:
    """The truth of one side as it stands in the text."""
    maps = matrices(program, loaded, name)
    if maps is not None and torch.allclose(maps, wanted(program, name), rtol=0, atol=EXACT):
        return Truth.TRUE
    is_one = turns_something(program, loaded, name) or (maps is not None and is_rotation(maps))
    return Truth.FREE if is_one else Truth.FALSE


def of_bias(program: Program, loaded: Loaded) -> Truth:
    """The truth of the bias as it stands in the text; of a spoiled bias of activations nothing is known."""
    assert program.bias is not None
    spoiled = program.spoil is not None and program.spoil.part == "bias"
    if not spoiled:
        return Truth.FALSE if program.bias.wrong else Truth.TRUE
    if program.bias not in ALIBI:
        return Truth.FREE
    return linearity(program.shape.heads, loaded.names[f"{program.bias.name}_bias"])


def linearity(heads: int, word: Any, length: int = 14) -> Truth:
    """Whether a bias of slopes and length is slope times key (TRUE), slope times a clock (FREE), or neither."""
    slopes, usual = 0.5 / torch.arange(1, heads + 1, dtype=torch.float64), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # numbers that the word makes itself have no other roundings
    try:
        bias = word(slopes, length).double().expand(1, heads, length, length)[0]
    finally:
        torch.set_default_dtype(usual)
    if not bool(torch.isfinite(bias).all()):
        return Truth.FREE
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    rise = (bias - bias[..., :1]).masked_fill(~seen, 0.0)
    steps = torch.arange(length, dtype=torch.float64)
    if torch.allclose(rise, (slopes[:, None, None] * steps).masked_fill(~seen, 0.0), rtol=0, atol=EXACT):
        return Truth.TRUE
    last = rise[:, -1:].expand_as(rise).masked_fill(~seen, 0.0)
    return Truth.FREE if torch.allclose(rise, last, rtol=0, atol=EXACT) else Truth.FALSE
