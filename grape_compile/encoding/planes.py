"""Planes: which pairs of coordinates of a head turn together, in the order of the frequencies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from grape_compile.encoding import checks
from grape_compile.encoding.base import Term
from grape_compile.errors import EncodingError

Coordinates = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Planes(Term, ABC):
    """Disjoint coordinate planes of a head (GRAPE 3.1: the 2 x 2 blocks of a commuting generator)."""

    @property
    @abstractmethod
    def head_dim(self) -> int:
        """Number of coordinates of the head, those outside of every plane included."""

    @abstractmethod
    def pairs(self) -> Coordinates:
        """Return the coordinates (i0, i1) of plane j = 0, 1, ..."""

    @property
    def count(self) -> int:
        """Number of planes, which is the number of frequencies."""
        return _count(self)

    def axes(self) -> tuple[int, ...]:
        """Return the number of the position axis that turns plane j (GRAPE App. G)."""
        return (0,) * self.count

    @property
    def axis_count(self) -> int:
        """Number of position axes: one more than the largest axis in use."""
        return _axis_count(self)

    def canonical(self) -> Planes:
        """Return the simplest planes with the same pairs and axes."""
        plain = planes_of(self.pairs(), self.head_dim)
        return Axes(plain, self.axes()) if any(self.axes()) else plain


@lru_cache(maxsize=1024)
def _count(planes: Planes) -> int:
    return len(planes.pairs())


@lru_cache(maxsize=1024)
def _axis_count(planes: Planes) -> int:
    return max(planes.axes()) + 1


@dataclass(frozen=True, slots=True)
class Half(Planes):
    """Plane j is (j, j + size/2): the two halves of the head pair up (Llama, GPT-NeoX).

    >>> Half(4).pairs()
    ((0, 2), (1, 3))
    """

    size: int

    def __post_init__(self) -> None:
        checks.even(self, "size")

    @property
    def head_dim(self) -> int:
        return self.size

    def pairs(self) -> Coordinates:
        half = self.size // 2
        return tuple((j, j + half) for j in range(half))


@dataclass(frozen=True, slots=True)
class Interleaved(Planes):
    """Plane j is (2j, 2j + 1): neighbours pair up (RoFormer, GPT-J).

    >>> Interleaved(4).pairs()
    ((0, 1), (2, 3))
    """

    size: int

    def __post_init__(self) -> None:
        checks.even(self, "size")

    @property
    def head_dim(self) -> int:
        return self.size

    def pairs(self) -> Coordinates:
        return tuple((j, j + 1) for j in range(0, self.size, 2))


@dataclass(frozen=True, slots=True)
class Partial(Planes):
    """The planes `of` placed at coordinate `start` of a head of `size`; the other coordinates do not turn.

    >>> Partial(Half(4), 2, 8).pairs()
    ((2, 4), (3, 5))
    """

    of: Planes
    start: int
    size: int

    def __post_init__(self) -> None:
        checks.member(self, "of", Planes)
        checks.whole(self, "start", 0)
        checks.whole(self, "size", 2)
        if self.start + self.of.head_dim > self.size:
            raise EncodingError(
                f"planes over coordinates {self.start} to {self.start + self.of.head_dim - 1} of a head",
                f"the head has {self.size} coordinates",
                f"a start between 0 and {self.size - self.of.head_dim}"
                if self.of.head_dim <= self.size
                else f"inner planes of at most {self.size} coordinates",
            )

    @property
    def head_dim(self) -> int:
        return self.size

    def pairs(self) -> Coordinates:
        return tuple((first + self.start, second + self.start) for first, second in self.of.pairs())

    def axes(self) -> tuple[int, ...]:
        return self.of.axes()


@dataclass(frozen=True, slots=True)
class Pairs(Planes):
    """Irregular planes: plane j is `coordinates[j]` in a head of `size`.

    >>> Pairs(((0, 3), (2, 1)), 4).count
    2
    """

    coordinates: Coordinates
    size: int

    def __post_init__(self) -> None:
        checks.pairs(self, "coordinates")
        checks.whole(self, "size", 2)
        taken = [coordinate for pair in self.coordinates for coordinate in pair]
        if max(taken) >= self.size:
            checks.refuse(self, "coordinates", f"coordinates below the size of the head, {self.size}")
        if len(set(taken)) != len(taken):
            checks.refuse(self, "coordinates", "planes that do not overlap: every coordinate at most once")

    @property
    def head_dim(self) -> int:
        return self.size

    def pairs(self) -> Coordinates:
        return self.coordinates


@dataclass(frozen=True, slots=True)
class Axes(Planes):
    """The planes `of`, where axis[j] is the position axis that turns plane j (vision, video, M-RoPE).

    >>> Axes(Half(8), (0, 0, 1, 1)).axis_count
    2
    """

    of: Planes
    axis: tuple[int, ...]

    def __post_init__(self) -> None:
        checks.member(self, "of", Planes)
        checks.wholes(self, "axis")
        if len(self.axis) != self.of.count:
            checks.refuse(self, "axis", f"one axis for each of the {self.of.count} planes")
        if any(self.of.axes()):
            checks.refuse(self, "of", "planes that have no axes yet")

    @property
    def head_dim(self) -> int:
        return self.of.head_dim

    def pairs(self) -> Coordinates:
        return self.of.pairs()

    def axes(self) -> tuple[int, ...]:
        return self.axis


def planes_of(pairs: Iterable[tuple[int, int]], size: int) -> Planes:
    """Return the simplest planes with these pairs: half, interleaved, a partial of one of them, else `Pairs`.

    The order of the pairs and the order inside of a pair are kept: they fix which frequency and which sign a
    plane has. Raises EncodingError for pairs that overlap or leave the head.

    >>> str(planes_of([(4, 6), (5, 7)], 8))
    'partial(half(4), 4, 8)'
    """
    irregular = Pairs(tuple(pairs), size)
    found = irregular.coordinates
    start = min(min(pair) for pair in found)
    regular: tuple[Planes, ...] = (Half(2 * len(found)), Interleaved(2 * len(found)))
    for inner in regular:
        if inner.pairs() == tuple((first - start, second - start) for first, second in found):
            return inner if inner.head_dim == irregular.size else Partial(inner, start, irregular.size)
    return irregular
