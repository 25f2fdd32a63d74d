"""Taking the planes of a head apart and putting them together, in the spelling that compiles best.

Halves are slices and a concatenation, neighbours are a view of pairs and a stack, irregular planes are an
index. Inductor turns the first two into one loop over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from grape_compile.encoding import Axes, Half, Interleaved, Partial, Planes
from grape_compile.operators.constants import constant


@dataclass(frozen=True)
class Layout:
    """Where planes lie: `rule` over coordinates start ... stop - 1, or indices where there is no rule."""

    rule: Half | Interleaved | None
    start: int
    stop: int
    size: int
    first: tuple[int, ...]
    second: tuple[int, ...]

    @property
    def rest(self) -> tuple[int, ...]:
        """Coordinates outside of every plane, in increasing order."""
        taken = {*self.first, *self.second}
        return tuple(coordinate for coordinate in range(self.size) if coordinate not in taken)


@lru_cache(maxsize=1024)
def layout(planes: Planes) -> Layout:
    """Return where the planes lie; equal for all values with equal pairs."""
    pairs = planes.pairs()
    plain = planes.canonical()
    plain = plain.of if isinstance(plain, Axes) else plain
    start = plain.start if isinstance(plain, Partial) else 0
    inner = plain.of if isinstance(plain, Partial) else plain
    rule = inner if isinstance(inner, Half | Interleaved) else None
    first, second = zip(*pairs, strict=True)
    return Layout(rule, start, start + inner.head_dim, planes.head_dim, first, second)


def take(tensor: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    """Return the first and the second coordinate of every plane, each [..., planes]."""
    place = layout(planes)
    inner = tensor[..., place.start : place.stop]
    if isinstance(place.rule, Half):
        half = place.rule.size // 2
        return inner[..., :half], inner[..., half:]
    if isinstance(place.rule, Interleaved):
        pairs = inner.unflatten(-1, (place.rule.size // 2, 2))
        return pairs[..., 0], pairs[..., 1]
    return tensor[..., _index(place.first, tensor)], tensor[..., _index(place.second, tensor)]


def take_rest(tensor: Tensor, planes: Planes) -> list[Tensor]:
    """Return the coordinates outside of every plane in increasing order, as pieces to concatenate."""
    place = layout(planes)
    if place.rule is None:
        return [tensor[..., _index(place.rest, tensor)]] if place.rest else []
    pieces = (tensor[..., : place.start], tensor[..., place.stop :])
    return [piece for piece in pieces if piece.shape[-1]]


def put(first: Tensor, second: Tensor, rest: list[Tensor], planes: Planes) -> Tensor:
    """Return the head [..., head_dim] with these plane coordinates and the pieces of `rest` around them."""
    place = layout(planes)
    if place.rule is None:
        return _put_by_index(first, second, rest, place)
    middle = (
        [first, second] if isinstance(place.rule, Half) else [torch.stack((first, second), -1).flatten(-2)]
    )
    if not rest and len(middle) == 1:
        return middle[0]
    before, after = _cut(rest, place.start)
    return torch.cat([*before, *middle, *after], -1)


def _put_by_index(first: Tensor, second: Tensor, rest: list[Tensor], place: Layout) -> Tensor:
    order = {coordinate: at for at, coordinate in enumerate((*place.first, *place.second, *place.rest))}
    together = torch.cat([first, second, *rest], -1)
    return together[..., _index(tuple(order[coordinate] for coordinate in range(place.size)), first)]


def _cut(pieces: list[Tensor], length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split a list of pieces where their concatenation reaches `length`."""
    before: list[Tensor] = []
    for at, piece in enumerate(pieces):
        if length == 0:
            return before, pieces[at:]
        if piece.shape[-1] > length:
            return [*before, piece[..., :length]], [piece[..., length:], *pieces[at + 1 :]]
        before.append(piece)
        length -= piece.shape[-1]
    return before, []


def _index(coordinates: Sequence[int], like: Tensor) -> Tensor:
    return constant(coordinates, torch.int64, like)
