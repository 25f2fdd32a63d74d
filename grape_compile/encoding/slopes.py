"""Slopes in closed form: how steeply the logit bias of each head falls."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from grape_compile.encoding import checks
from grape_compile.encoding.base import Term
from grape_compile.errors import EncodingError


@dataclass(frozen=True, slots=True)
class Slopes(Term, ABC):
    """The slope beta_h of the logit bias of each head, per unit of the clock."""

    def values(self) -> tuple[float, ...]:
        """Return one slope per head; EncodingError where only a tensor has them."""
        raise EncodingError(
            f"the slopes of {self} in closed form",
            "they are known at run time only",
            "reading them from the tensor of that name",
        )

    def negated(self) -> Slopes:
        """Return the opposite slopes; EncodingError where only a tensor has them."""
        return Constant(tuple(-slope for slope in self.values()))

    def canonical(self) -> Slopes:
        """Return the simplest slopes with the same values."""
        return self


@dataclass(frozen=True, slots=True)
class AlibiSlopes(Slopes):
    """beta_h = 2^(-8 h / heads), h = 1 ... heads, for a power of two (Press et al. 2022, arXiv 2108.12409).

    Otherwise the slopes of the next lower power of two, then every other slope of twice that power.

    >>> AlibiSlopes(3).values()
    (0.0625, 0.00390625, 0.25)
    """

    heads: int

    def __post_init__(self) -> None:
        checks.whole(self, "heads", 1)

    def values(self) -> tuple[float, ...]:
        power = 1 << (self.heads.bit_length() - 1)
        extra = _geometric_slopes(2 * power)[::2] if power < self.heads else ()
        return (*_geometric_slopes(power), *extra[: self.heads - power])


@dataclass(frozen=True, slots=True)
class Constant(Slopes):
    """The slope of head h is per_head[h]."""

    per_head: tuple[float, ...]

    def __post_init__(self) -> None:
        checks.reals(self, "per_head")

    def values(self) -> tuple[float, ...]:
        return self.per_head

    def canonical(self) -> Slopes:
        alibi = AlibiSlopes(len(self.per_head))
        return alibi if alibi.values() == self.per_head else self


@dataclass(frozen=True, slots=True)
class Uniform(Slopes):
    """The slope of every head is `slope`, whatever their number: -1 makes a clock its own bias (GRAPE App. C)."""

    slope: float

    def __post_init__(self) -> None:
        checks.real(self, "slope")

    def negated(self) -> Slopes:
        return Uniform(-self.slope)


def _geometric_slopes(heads: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8.0 * h / heads) for h in range(1, heads + 1))
