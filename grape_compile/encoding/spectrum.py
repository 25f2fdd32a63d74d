"""Spectra in closed form: frequencies of planes, and the rules that stretch them to longer contexts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from grape_compile.encoding import checks
from grape_compile.encoding.base import Term
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
class Rule(Term, ABC):
    """A change of frequencies that lets a trained model reach `factor` times further; 1 changes nothing."""

    factor: float

    @abstractmethod
    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        """Return the changed frequencies of planes j = 0, 1, ... in radians per position."""

    def merged(self, inner: Rule) -> Rule | None:
        """Return the one rule that acts as `inner` followed by this one, or None where there is none."""
        return None


@dataclass(frozen=True, slots=True)
class Linear(Rule):
    """Position interpolation: theta'_j = theta_j / factor (Chen et al. 2023, arXiv 2306.15595, eq. 4)."""

    def __post_init__(self) -> None:
        checks.positive(self, "factor")

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        return tuple(theta / self.factor for theta in frequencies)

    def merged(self, inner: Rule) -> Rule | None:
        return Linear(self.factor * inner.factor) if isinstance(inner, Linear) else None


@dataclass(frozen=True, slots=True)
class Ntk(Rule):
    """NTK-aware change of base: base' = base * factor^(d / (d - 2)) (Peng et al. 2023, arXiv 2309.00071).

    With d = 2 count that is theta'_j = theta_j * factor^(-j / (count - 1)): the first frequency stays and the
    last is divided by `factor`. A single frequency stays.
    """

    def __post_init__(self) -> None:
        checks.positive(self, "factor")

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        last = max(len(frequencies) - 1, 1)
        return tuple(theta * self.factor ** (-j / last) for j, theta in enumerate(frequencies))

    def merged(self, inner: Rule) -> Rule | None:
        return Ntk(self.factor * inner.factor) if isinstance(inner, Ntk) else None


@dataclass(frozen=True, slots=True)
class Yarn(Rule):
    """NTK by parts (YaRN, Peng et al. 2023, arXiv 2309.00071), with the ramp over j of the authors' code.

    theta'_j = (1 - r_j) theta_j + r_j theta_j / factor, r_j = clamp((j - low) / (high - low), 0, 1). Here
    `low` and `high` are the (real) indices of the frequencies that make `beta_fast` and `beta_slow` turns
    over `original` positions, rounded outwards where `truncate`, and cut to 0 ... d - 1 with d = 2 count. The
    index of a frequency is read off the straight line ln theta_j = ln theta_0 - j h through the first and the
    last frequency. The norm factor that goes with it is `yarn_norm_factor`, the `scale` of the rotation.
    """

    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        checks.positive(self, "factor")
        checks.whole(self, "original", 1)
        checks.positive(self, "beta_fast")
        checks.positive(self, "beta_slow")
        checks.flag(self, "truncate")
        if self.beta_fast <= self.beta_slow:
            checks.refuse(self, "beta_fast", f"more turns than beta_slow, {self.beta_slow}")

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        """Return the changed frequencies; EncodingError unless there are two or more and they fall."""
        low, high = self._corners(frequencies)
        if low == high:
            high += 0.001  # the authors' guard against a ramp of no length
        changed = []
        for j, theta in enumerate(frequencies):
            ramp = min(max((j - low) / (high - low), 0.0), 1.0)
            changed.append((1 - ramp) * theta + ramp * theta / self.factor)
        return tuple(changed)

    def _corners(self, frequencies: Sequence[float]) -> tuple[float, float]:
        count = len(frequencies)
        if count < 2 or not frequencies[0] > frequencies[-1] > 0:
            raise EncodingError(
                f"{self} of {count} frequencies",
                "no falling line of frequencies to place the ramp on",
                "two or more frequencies that fall, such as geometric(10000.0)",
            )
        step = math.log(frequencies[0] / frequencies[-1]) / (count - 1)
        low, high = (
            math.log(frequencies[0] * self.original / (2 * math.pi * turns)) / step
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, 2 * count - 1)


@dataclass(frozen=True, slots=True)
class Llama3(Rule):
    """The rule of Llama 3.1 (Grattafiori et al. 2024; the reference code of the release defines it).

    With m_j = original * theta_j / 2 pi turns over the original context: theta_j where m_j > high, theta_j /
    factor where m_j < low, and (1 - s) theta_j / factor + s theta_j with s = (m_j - low) / (high - low)
    between them.
    """

    low: float
    high: float
    original: int

    def __post_init__(self) -> None:
        checks.positive(self, "factor")
        checks.positive(self, "low")
        checks.positive(self, "high")
        checks.whole(self, "original", 1)
        if self.low >= self.high:
            checks.refuse(self, "low", f"fewer turns than high, {self.high}")

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        changed = []
        for theta in frequencies:
            turns = self.original * theta / (2 * math.pi)
            keep = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
            changed.append((1 - keep) * theta / self.factor + keep * theta)
        return tuple(changed)


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

    def canonical(self) -> Spectrum:
        inner = self.of.canonical()
        if self.rule.factor == 1.0:
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

    def canonical(self) -> Spectrum:
        inner = self.of.canonical()
        if isinstance(inner, Tiled):
            return Tiled(inner.of, self.times * inner.times)
        return inner if self.times == 1 else Tiled(inner, self.times)


def yarn_norm_factor(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's factor on cos and sin: 0.1 mscale ln(factor) + 1, but 1 for factor <= 1 (2309.00071).

    The paper's sqrt(1/t) = 0.1 ln(s) + 1 has mscale 1; DeepSeek-V2 uses the quotient of two of them.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
