"""Rules that stretch the frequencies of a spectrum, so that a trained model reaches further than its training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from grape_compile.encoding import checks
from grape_compile.encoding.base import Term
from grape_compile.errors import EncodingError


@dataclass(frozen=True, slots=True)
class Rule(Term, ABC):
    """A change of the frequencies of planes j = 0, 1, ..., in radians per position."""

    @abstractmethod
    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        """Return the changed frequencies; EncodingError for those it cannot act on."""

    @property
    def is_identity(self) -> bool:
        """Whether it leaves any frequencies as they are."""
        return False

    def at(self, length: int) -> Rule:
        """Return the rule that acts in a sequence of `length` tokens: itself, unless it depends on the length."""
        return self

    def merged(self, inner: Rule) -> Rule | None:
        """Return the one rule that acts as `inner` followed by this one, or None where there is none."""
        return None


class Stretch(Rule):
    """A rule with a `factor` that tells how many times further a model reaches; 1 changes nothing."""

    # No dataclass: one with slots is made twice, and the first would count as a kind of rule.
    __slots__ = ()
    factor: float

    def __post_init__(self) -> None:
        checks.positive(self, "factor")

    @property
    def is_identity(self) -> bool:
        return self.factor == 1.0


@dataclass(frozen=True, slots=True)
class Linear(Stretch):
    """Position interpolation: theta'_j = theta_j / factor (Chen et al. 2023, arXiv 2306.15595, eq. 4)."""

    factor: float

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        return tuple(theta / self.factor for theta in frequencies)

    def merged(self, inner: Rule) -> Rule | None:
        return Linear(self.factor * inner.factor) if isinstance(inner, Linear) else None


@dataclass(frozen=True, slots=True)
class Ntk(Stretch):
    """NTK-aware change of base: base' = base * factor^(d / (d - 2)) (Peng et al. 2023, arXiv 2309.00071).

    With d = 2 count that is theta'_j = theta_j * factor^(-j / (count - 1)): the first frequency stays and the
    last is divided by `factor`. A single frequency stays.
    """

    factor: float

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        last = max(len(frequencies) - 1, 1)
        return tuple(theta * self.factor ** (-j / last) for j, theta in enumerate(frequencies))

    def merged(self, inner: Rule) -> Rule | None:
        return Ntk(self.factor * inner.factor) if isinstance(inner, Ntk) else None


@dataclass(frozen=True, slots=True)
class DynamicNtk(Rule):
    """NTK by the length L of the sequence at hand (Peng et al. 2023, arXiv 2309.00071, "dynamic scaling").

    It acts as `Ntk` with the factor 1 + s (L / original - 1), s = `factor`, from L = `original` on, and changes
    nothing below. `at(L)` gives that rule.
    """

    factor: float
    original: int

    def __post_init__(self) -> None:
        checks.positive(self, "factor")
        checks.whole(self, "original", 1)

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        raise _unsettled(self)

    def at(self, length: int) -> Ntk:
        return Ntk(self.factor * max(length, self.original) / self.original - (self.factor - 1.0))


@dataclass(frozen=True, slots=True)
class ByParts(Stretch):
    """NTK by parts: theta'_j = (1 - r_j) theta_j + r_j theta_j / factor, r_j = clamp((j - low) / (high - low), 0, 1).

    Planes up to the index `low` stay, those from `high` on are divided (Peng et al. 2023, arXiv 2309.00071, with
    the ramp over j of the authors' code). `Yarn` places the two corners by turns over the original context.
    """

    factor: float
    low: float
    high: float

    def __post_init__(self) -> None:
        Stretch.__post_init__(self)
        checks.real(self, "low")
        checks.real(self, "high")
        if self.low >= self.high:
            checks.refuse(self, "low", f"an index below high, {self.high}")

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        return _by_parts(frequencies, self.factor, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Yarn(Stretch):
    """NTK by parts (YaRN, Peng et al. 2023, arXiv 2309.00071), its corners placed by turns.

    As `ByParts` with `low` and `high` the (real) indices of the frequencies that make `beta_fast` and `beta_slow`
    turns over `original` positions, rounded outwards where `truncate`, and cut to 0 ... d - 1 with d = 2 count.
    The index of a frequency is read off the straight line ln theta_j = ln theta_0 - j h through the first and the
    last frequency. The norm factor that goes with it is `yarn_norm_factor`, the `scale` of the rotation.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        Stretch.__post_init__(self)
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
        return _by_parts(frequencies, self.factor, low, high)

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
class Llama3(Stretch):
    """The rule of Llama 3.1 (Grattafiori et al. 2024; the reference code of the release defines it).

    With m_j = original * theta_j / 2 pi turns over the original context: theta_j where m_j > high, theta_j /
    factor where m_j < low, and (1 - s) theta_j / factor + s theta_j with s = (m_j - low) / (high - low)
    between them. Only the ratios of `low`, `high` and `original` count.
    """

    factor: float
    low: float
    high: float
    original: int

    def __post_init__(self) -> None:
        Stretch.__post_init__(self)
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
class PerPlane(Rule):
    """A factor of its own for every plane: theta'_j = theta_j / factors[j] (LongRoPE, arXiv 2402.13753, eq. 2)."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        checks.positives(self, "factors")

    @property
    def is_identity(self) -> bool:
        return all(factor == 1.0 for factor in self.factors)

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        """Return the changed frequencies; EncodingError unless there is one for every factor."""
        if len(frequencies) != len(self.factors):
            raise EncodingError(
                f"a factor for each of {len(frequencies)} frequencies",
                f"{len(self.factors)} factors",
                "as many factors as planes",
            )
        return tuple(theta / factor for theta, factor in zip(frequencies, self.factors, strict=True))

    def merged(self, inner: Rule) -> Rule | None:
        if not isinstance(inner, PerPlane) or len(inner.factors) != len(self.factors):
            return None
        return PerPlane(tuple(a * b for a, b in zip(self.factors, inner.factors, strict=True)))


@dataclass(frozen=True, slots=True)
class Longrope(Rule):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): theta'_j = theta_j / short[j], or long[j] in a long sequence.

    A sequence is long where it has more than `original` tokens; `at(L)` gives the rule for L tokens. The norm
    factor that goes with it is `longrope_norm_factor`, the `scale` of the rotation.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int

    def __post_init__(self) -> None:
        checks.positives(self, "short")
        checks.positives(self, "long")
        checks.whole(self, "original", 1)
        if len(self.short) != len(self.long):
            checks.refuse(self, "long", f"{len(self.short)} factors, as many as short has")

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        raise _unsettled(self)

    def at(self, length: int) -> PerPlane:
        return PerPlane(self.long if length > self.original else self.short)


@dataclass(frozen=True, slots=True)
class Proportional(Rule):
    """The first `kept` planes turn as they did, the others stand still: theta'_j = theta_j for j < kept, else 0.

    The "proportional" rule of transformers, which keeps floor(p d / 2) planes of a head of d for its proportion p.
    Unlike a rotation of the first 2 kept coordinates alone it keeps the frequencies and the pairs of the whole head.
    """

    kept: int

    def __post_init__(self) -> None:
        checks.whole(self, "kept", 0)

    def apply(self, frequencies: Sequence[float]) -> tuple[float, ...]:
        return tuple(theta if j < self.kept else 0.0 for j, theta in enumerate(frequencies))

    def merged(self, inner: Rule) -> Rule | None:
        return Proportional(min(self.kept, inner.kept)) if isinstance(inner, Proportional) else None


def yarn_norm_factor(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's factor on cos and sin: 0.1 mscale ln(factor) + 1, but 1 for factor <= 1 (2309.00071).

    The paper's sqrt(1/t) = 0.1 ln(s) + 1 has mscale 1; DeepSeek-V2 uses the quotient of two of them.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def longrope_norm_factor(factor: float, original: int) -> float:
    """Return LongRoPE's factor on cos and sin: sqrt(1 + ln(factor) / ln(original)), but 1 for factor <= 1.

    `factor` is the longest context over the `original` one (arXiv 2402.13753, the authors' code).
    """
    return math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0


def _by_parts(frequencies: Sequence[float], factor: float, low: float, high: float) -> tuple[float, ...]:
    changed = []
    for j, theta in enumerate(frequencies):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        changed.append((1 - ramp) * theta + ramp * theta / factor)
    return tuple(changed)


def _unsettled(rule: Rule) -> EncodingError:
    return EncodingError(
        f"the frequencies of {rule} in closed form",
        "they depend on the length of the sequence",
        "those of one length, by at(length)",
    )
