"""Additive GRAPE: a bias on the logits that is the trace of a unipotent translation (GRAPE 4)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace

from grape_compile.encoding import checks
from grape_compile.encoding.base import Encoding, Term, check_roles
from grape_compile.encoding.clock import Clock, Steps, Tables
from grape_compile.encoding.gate import Gate
from grape_compile.encoding.slopes import Slopes


@dataclass(frozen=True, slots=True)
class Distance(Term, ABC):
    """How far key j is from query t; a positive slope lowers the logit of a distant key."""


@dataclass(frozen=True, slots=True)
class Signed(Distance):
    """clock_j - clock_t: negative in the past (GRAPE 4.2, the causal case)."""


@dataclass(frozen=True, slots=True)
class Absolute(Distance):
    """-|clock_j - clock_t|: equal to `Signed` in the past and its mirror image in the future."""


@dataclass(frozen=True, slots=True)
class Euclidean(Distance):
    """-|r_j - r_t|, the Euclidean norm over the axes of the positions r (GRAPE App. G)."""


@dataclass(frozen=True, slots=True)
class Bias(Encoding):
    """Adds b[h, t, j] = slope_h * distance(clock_j, clock_t) to the logit of query t and key j (GRAPE 4.2).

    The bias is added after the score scale. ALiBi is `AlibiSlopes` by `Steps`, the Forgetting Transformer a slope of -1
    by the accumulated log f. A `gate` multiplies the slope by numbers of query and key.
    """

    slopes: Slopes
    clock: Clock
    gate: Gate | None = None
    distance: Distance = Signed()

    def __post_init__(self) -> None:
        checks.member(self, "slopes", Slopes)
        checks.member(self, "clock", Clock)
        checks.member(self, "distance", Distance)
        checks.member(self, "gate", Gate, optional=True)
        if isinstance(self.clock, Tables):
            checks.refuse(self, "clock", "steps, positions or accumulated: a bias has no cosines and sines")
        check_roles(self)

    def inverse(self) -> Bias:
        """Return the bias of opposite slopes; EncodingError for slopes that only a tensor has."""
        return replace(self, slopes=self.slopes.negated())

    def canonical(self) -> Bias:
        """Return the one bias of this meaning: simplest slopes; along one axis the norm is `Absolute`."""
        one_axis = isinstance(self.distance, Euclidean) and isinstance(self.clock, Steps)
        return replace(
            self, slopes=self.slopes.canonical(), distance=Absolute() if one_axis else self.distance
        )
