"""Searches for the fastest programs on the device at hand or on a fleet, and keeps what they found."""

from typing import TYPE_CHECKING, Any

from grape_compile.kernels.tunable import Shape
from grape_compile.tuning.kernels import KernelReport, Tuned, tune_kernels

if TYPE_CHECKING:
    from grape_compile.tuning.designs import DesignSpace, design_spaces
    from grape_compile.tuning.programs import Progress, TuningReport, tune

__all__ = [
    "DesignSpace",
    "KernelReport",
    "Progress",
    "Shape",
    "Tuned",
    "TuningReport",
    "design_spaces",
    "tune",
    "tune_kernels",
]


def __getattr__(name: str) -> Any:
    """Import what needs TVM when it is asked for."""
    if name not in ("DesignSpace", "Progress", "TuningReport", "design_spaces", "tune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grape_compile.tuning import designs, programs

    return getattr(designs if name in ("DesignSpace", "design_spaces") else programs, name)
