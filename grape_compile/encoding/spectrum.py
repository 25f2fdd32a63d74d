"""Spectra in closed form: the frequencies of planes."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from grape_compile.encoding import checks
from grape_compile.encoding.base import Term
from grape_compile.encoding.scaling import Rule
from grape_compile.errors import EncodingError


@dataclass(frozen=True, slots=True)
class Spectrum(Term, ABC):
    """The frequencies theta_j of the planes in radians per position."""

    def frequencies(self, count: int) -> tuple[float, ...]:
        """Return theta_j, j < count, in radians per position; EncodingError where only a tensor has them."""
        raise EncodingError(
            f"the {count} frequencies of {self} in closed form",
            "they are known at run time only",
            "reading them from the tensor of that name",
        )

    def at(self, length: int) -> Spectrum:
        """Return the spectrum that holds in a sequence of `length` tokens: itself, unless a rule asks for it."""
        return self

    def canonical(self) -> Spectrum:
        """Return the simplest spectrum with the same frequencies."""
        return self


@dataclass(frozen=True, slots=True)
class Geometric(Spectrum):
    """theta_j = base^(-j / count) = base^(-2j/d), d = 2 count (RoFormer, Su et al. 2021, sec. 3.2.2).

    >>> Geometric(100.0).frequencies(2)
    (1.0, 0.1)
    """

    base: float

    def __post_init__(self) -> None:
        checks.positive(self, "base")

    def frequencies(self, count: int) -> tuple[float, ...]:
        return tuple(self.base ** (-j / count) for j in range(count))


@dataclass(frozen=True, slots=True)
class Scaled(Spectrum):
    """The frequencies of `of`, changed by `rule`; `of` has a closed form (a tensor holds final values)."""

    rule: Rule
    of: Spectrum

    def __post_init__(self) -> None:
        checks.member(self, "rule", Rule)
        checks.member(self, "of", Spectrum)
        if self.of.slots:
            checks.refuse(self, "of", "a spectrum in closed form, or the spectrum of a tensor without a rule")
        if isinstance(self.of, Tiled):
            checks.refuse(self, "of", "the frequencies of one axis: tiled goes around scaled")

    def frequencies(self, count: int) -> tuple[float, ...]:
        return self.rule.apply(self.of.frequencies(count))

    def at(self, length: int) -> Scaled:
        return Scaled(self.rule.at(length), self.of.at(length))

    def canonical(self) -> Spectrum:
        inner = self.of.canonical()
        if self.rule.is_identity:
            return inner
        if isinstance(inner, Scaled) and (merged := self.rule.merged(inner.rule)) is not None:
            return Scaled(merged, inner.of).canonical()
        return Scaled(self.rule, inner)


@dataclass(frozen=True, slots=True)
class Tiled(Spectrum):
    """The frequencies of `of` over and over, once for each of `times` position axes (GRAPE App. G).

    >>> Tiled(Geometric(100.0), 2).frequencies(4)
    (1.0, 0.1, 1.0, 0.1)
    """

    of: Spectrum
    times: int

    def __post_init__(self) -> None:
        checks.member(self, "of", Spectrum)
        checks.whole(self, "times", 1)
        if self.of.slots:
            checks.refuse(self, "of", "a spectrum in closed form, or a tensor with all the frequencies")

    def frequencies(self, count: int) -> tuple[float, ...]:
        """Return theta_j of `count` planes; EncodingError unless they are a multiple of `times`."""
        if count % self.times:
            raise EncodingError(
                f"{self} of {count} planes",
                f"{count} planes are no multiple of {self.times}",
                "as many planes for each axis",
            )
        return self.of.frequencies(count // self.times) * self.times

    def at(self, length: int) -> Tiled:
        return Tiled(self.of.at(length), self.times)

    def canonical(self) -> Spectrum:
        inner = self.of.canonical()
        if isinstance(inner, Tiled):
            return Tiled(inner.of, self.times * inner.times)
        return inner if self.times == 1 else Tiled(inner, self.times)
