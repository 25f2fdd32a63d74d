"""Spectra and slopes whose numbers are in a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT
from grape_compile.encoding.slopes import Slopes
from grape_compile.encoding.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Learned(Spectrum, Slopes):
    """Trainable numbers in the tensor `slot`: frequencies in radians per position, or slopes."""

    slot: str = field(metadata=SLOT)

    def __post_init__(self) -> None:
        checks.slot(self, "slot")

    def canonical(self) -> Learned:
        return self


@dataclass(frozen=True, slots=True)
class Table(Spectrum, Slopes):
    """Numbers in the tensor `slot` of unknown formula: frequencies in radians per position, or slopes."""

    slot: str = field(metadata=SLOT)

    def __post_init__(self) -> None:
        checks.slot(self, "slot")

    def canonical(self) -> Table:
        return self
