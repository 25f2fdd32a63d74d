"""The ways to compute one function: a few whole numbers, each from a short list, and what they make."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from grape_compile.kernels.tensorir.engine import IRModule, PrimFunc, module_of

#: A value for each choice of a space.
Point = Mapping[str, int]


@dataclass(frozen=True)
class Space:
    """All schedules of one function: block sizes are parts of its text, so each point is a program of its own.

    Attention keeps running maxima and sums from block to block, which no schedule can introduce into a loop nest; so a
    point is given before the program is written. `hand` is the point used where nothing has been measured.
    """

    name: str
    choices: Mapping[str, tuple[int, ...]]
    hand: Point
    write: Callable[[Point], PrimFunc]
    fits: Callable[[Point], bool]

    def points(self) -> Iterator[dict[str, int]]:
        """Yield every point that fits the target, the one by hand first."""
        yield dict(self.hand)
        for values in itertools.product(*self.choices.values()):
            point = dict(zip(self.choices, values, strict=True))
            if point != dict(self.hand) and self.fits(point):
                yield point

    def candidates(self) -> tuple[dict[str, int], ...]:
        """Return every point that fits the target, the one by hand first."""
        return tuple(self.points())

    def build(self, point: Point | None = None) -> IRModule:
        """Return the module of one point, whose only function bears the name of the space."""
        return module_of({self.name: self.write(self.hand if point is None else point)})
