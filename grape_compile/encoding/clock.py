"""Clocks: what plays the part of the position n in G(n) = exp(n w X)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT, Term, check_roles


@dataclass(frozen=True, slots=True)
class Clock(Term, ABC):
    """The time at which a token stands; angles and biases are functions of it."""


@dataclass(frozen=True, slots=True)
class Steps(Clock):
    """Token t stands at n = t = 0, 1, 2, ... of the sequence at hand."""


@dataclass(frozen=True, slots=True)
class Positions(Clock):
    """The positions n are in the tensor `slot`: whole or real numbers, one set for each axis."""

    slot: str = field(metadata=SLOT)

    def __post_init__(self) -> None:
        checks.slot(self, "slot")


@dataclass(frozen=True, slots=True)
class Accumulated(Clock):
    """The running sum of the tensor `slot` along the sequence (contextual phases, GRAPE 3; FoX, App. C).

    Inclusive: Phi_t = sum_{l <= t} w_l; exclusive: Phi_t = sum_{l < t} w_l.
    """

    slot: str = field(metadata=SLOT)
    inclusive: bool

    def __post_init__(self) -> None:
        checks.slot(self, "slot")
        checks.flag(self, "inclusive")


@dataclass(frozen=True, slots=True)
class Tables(Clock):
    """No clock is known: the tensors `cos` and `sin` hold those of each plane's angle before orientation."""

    cos: str = field(default="cos", metadata=SLOT)
    sin: str = field(default="sin", metadata=SLOT)

    def __post_init__(self) -> None:
        checks.slot(self, "cos")
        checks.slot(self, "sin")
        check_roles(self)
