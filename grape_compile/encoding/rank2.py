"""Multiplicative GRAPE from two vectors: one plane, any plane, by a closed form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT, Multiplicative, check_roles
from grape_compile.encoding.clock import Clock, Tables
from grape_compile.encoding.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Rank2(Multiplicative):
    """Acts as G(n) = exp(orientation * n * w * L), L = a b^T - b a^T of rank 2 (GRAPE 2.1, 2.3).

    `a` and `b` name vectors [size], or [..., 1, size] to differ between heads; w is the single frequency of
    `spectrum`. G turns the plane of a and b by n w s radians, s^2 = |a|^2 |b|^2 - (a.b)^2, and leaves the rest of
    the head alone: nothing turns where a and b are parallel, and b = J a turns by n w |a|^2.
    """

    size: int
    spectrum: Spectrum
    clock: Clock
    orientation: int = 1
    a: str = field(default="a", metadata=SLOT)
    b: str = field(default="b", metadata=SLOT)

    def __post_init__(self) -> None:
        checks.whole(self, "size", 2)
        checks.member(self, "spectrum", Spectrum)
        checks.member(self, "clock", Clock)
        checks.sign(self, "orientation")
        checks.slot(self, "a")
        checks.slot(self, "b")
        if isinstance(self.clock, Tables):
            checks.refuse(self, "clock", "steps, positions or accumulated: the angle depends on a and b")
        if not self.spectrum.slots:
            self.spectrum.frequencies(1)
        check_roles(self)

    @property
    def head_dim(self) -> int:
        return self.size

    def inverse(self) -> Rank2:
        """Return what undoes this, which is its transpose: the opposite orientation."""
        return replace(self, orientation=-self.orientation)

    def canonical(self) -> Rank2:
        """Return the one of this meaning under these names: the simplest spectrum."""
        return replace(self, spectrum=self.spectrum.canonical())
