"""Planes as the constants of a kernel: runs of neighbours where they are regular, a table where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from grape_compile.encoding import Planes, Rotation


@dataclass(frozen=True)
class Runs:
    """Plane j is first = start + (j // run) * step + j % run and second = first + apart; run 0 means a table."""

    start: int = 0
    run: int = 0
    step: int = 0
    apart: int = 0


@dataclass(frozen=True)
class Piece:
    """`count` coordinates that do not turn: read from `source` on, written from `target` on."""

    count: int = 0
    source: int = 0
    target: int = 0

    @property
    def width(self) -> int:
        """Lanes for the piece: a power of two."""
        return width(self.count)


@dataclass(frozen=True)
class Layout:
    """Where the planes of a rotation are read and written, and the coordinates beside them.

    Coordinates in a table: those of `source` and `target` are all first ones, then all second ones; of the rest those
    read and those written. An irregular rest is one piece with a table. `axes` names the position axis of every plane
    where there are several.
    """

    count: int
    source: Runs
    target: Runs
    pieces: tuple[Piece, Piece]
    source_table: tuple[int, ...] = ()
    target_table: tuple[int, ...] = ()
    rest_source: tuple[int, ...] = ()
    rest_target: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def stays(self) -> bool:
        """Whether every coordinate is written where it was read, so that the rest need not move in place."""
        return (
            self.source == self.target
            and self.source_table == self.target_table
            and self.rest_source == self.rest_target
            and all(piece.source == piece.target for piece in self.pieces)
        )


@lru_cache(maxsize=1024)
def layout_of(rotation: Rotation) -> Layout:
    """Return the layout of a rotation.

    >>> from grape_compile.encoding import rope
    >>> layout_of(rope(64, rotary_dim=32)).source, layout_of(rope(64, rotary_dim=32)).pieces[0]
    (Runs(start=0, run=16, step=0, apart=16), Piece(count=32, source=32, target=32))
    """
    size = rotation.head_dim
    (source, source_table), (target, target_table) = map(_runs, (rotation.planes, rotation.output))
    outside = [
        [at for at in range(size) if all(at not in pair for pair in planes.pairs())]
        for planes in (rotation.planes, rotation.output)
    ]
    pieces = _pieces(*outside)
    tables: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
    if len(pieces) > 2:
        tables, pieces = (tuple(outside[0]), tuple(outside[1])), [Piece(len(outside[0]))]
    first, second = (*pieces, Piece(), Piece())[:2]
    axes = rotation.planes.axes() if rotation.planes.axis_count > 1 else ()
    count = rotation.planes.count
    return Layout(count, source, target, (first, second), source_table, target_table, *tables, axes)


def _runs(planes: Planes) -> tuple[Runs, tuple[int, ...]]:
    first, second = zip(*planes.pairs(), strict=True)
    run = next((j for j in range(1, len(first)) if first[j] != first[0] + j), len(first))
    step = first[run] - first[0] if run < len(first) else 0
    found = Runs(first[0], run, step, second[0] - first[0])
    regular = tuple(found.start + j // run * step + j % run for j in range(len(first)))
    if regular == first and tuple(at + found.apart for at in first) == second:
        return found, ()
    return Runs(), (*first, *second)


def _pieces(source: Sequence[int], target: Sequence[int]) -> list[Piece]:
    """Cut coordinates where those read or those written have a gap."""
    cuts = [
        at
        for at in range(1, len(source))
        if source[at] != source[at - 1] + 1 or target[at] != target[at - 1] + 1
    ]
    bounds = [0, *cuts, len(source)]
    return [
        Piece(stop - start, source[start], target[start]) for start, stop in pairwise(bounds) if stop > start
    ]


def width(count: int) -> int:
    """Return the smallest power of two that is at least `count`, and at least 1."""
    return 1 << max(count - 1, 0).bit_length()


@lru_cache(maxsize=256)
def table(coordinates: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Return coordinates in the memory of a device, or None for none of them; kept for the next call."""
    return torch.tensor(coordinates, dtype=torch.int32, device=device) if coordinates else None
