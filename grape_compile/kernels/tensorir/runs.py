"""Planes as few regular pieces: what a loop without exceptions can walk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from grape_compile.encoding import Rotation


@dataclass(frozen=True)
class Run:
    """`count` planes from number `first`; coordinate number n of each column is start[n] + n-th stride * step.

    The four columns are the coordinates i0, i1 that a plane reads and o0, o1 that it writes.
    """

    first: int
    count: int
    axis: int
    starts: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


@dataclass(frozen=True)
class Kept:
    """`count` neighbouring coordinates that do not turn, and where they go."""

    source: int
    target: int
    count: int


@lru_cache(maxsize=1024)
def runs(rotation: Rotation) -> tuple[Run, ...]:
    """Return the longest runs of planes whose coordinates advance evenly and which turn by one axis."""
    columns = [
        (*inner, *outer)
        for inner, outer in zip(rotation.planes.pairs(), rotation.output.pairs(), strict=True)
    ]
    axes = rotation.planes.axes()
    found: list[Run] = []
    start = 0
    while start < len(columns):
        stop = start + 1
        strides = (1, 1, 1, 1)
        if stop < len(columns) and axes[stop] == axes[start]:
            strides = _difference(columns[start], columns[stop])
        while (
            stop < len(columns)
            and axes[stop] == axes[start]
            and _difference(columns[stop - 1], columns[stop]) == strides
        ):
            stop += 1
        found.append(Run(start, stop - start, axes[start], columns[start], strides))
        start = stop
    return tuple(found)


@lru_cache(maxsize=1024)
def kept(rotation: Rotation) -> tuple[Kept, ...]:
    """Return the coordinates outside of every plane: in increasing order on both sides, grouped."""
    sides = []
    for planes in (rotation.planes, rotation.output):
        taken = {coordinate for pair in planes.pairs() for coordinate in pair}
        sides.append(sorted(set(range(rotation.head_dim)) - taken))
    found: list[Kept] = []
    for source, target in zip(*sides, strict=True):
        last = found[-1] if found else None
        if last is not None and (last.source + last.count, last.target + last.count) == (source, target):
            found[-1] = Kept(last.source, last.target, last.count + 1)
        else:
            found.append(Kept(source, target, 1))
    return tuple(found)


def _difference(
    earlier: tuple[int, int, int, int], later: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    return (later[0] - earlier[0], later[1] - earlier[1], later[2] - earlier[2], later[3] - earlier[3])
