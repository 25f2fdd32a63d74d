"""Multiplicative GRAPE with planes that do not commute, mixed in a small subspace of the head."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT, Multiplicative, check_roles
from grape_compile.encoding.clock import Clock, Tables


@dataclass(frozen=True, slots=True)
class NonCommuting(Multiplicative):
    """Acts as G(n) = exp(orientation * n * L), L = E L_r E^T, in a subspace of r dimensions (GRAPE App. D).

    `basis` names E, orthonormal columns [..., size, r]; `generator` names a matrix [..., r, r] of which the skew
    part L_r counts, in radians per position. By the real Schur form L_r = T (+)theta_t J T^T that is r // 2 planes
    in the basis E T, and the identity elsewhere: r is 1 to size, odd or even, and only the tensors know it.
    """

    size: int
    clock: Clock
    orientation: int = 1
    basis: str = field(default="basis", metadata=SLOT)
    generator: str = field(default="generator", metadata=SLOT)

    def __post_init__(self) -> None:
        checks.whole(self, "size", 1)
        checks.member(self, "clock", Clock)
        checks.sign(self, "orientation")
        checks.slot(self, "basis")
        checks.slot(self, "generator")
        if isinstance(self.clock, Tables):
            checks.refuse(
                self, "clock", "steps, positions or accumulated: the angles are those of the generator"
            )
        check_roles(self)

    @property
    def head_dim(self) -> int:
        return self.size

    def inverse(self) -> NonCommuting:
        """Return what undoes this, which is its transpose: the opposite orientation."""
        return replace(self, orientation=-self.orientation)

    def canonical(self) -> NonCommuting:
        """Return this value: there is one of its meaning."""
        return self
