"""Searches for the fastest programs on the device at hand or on a fleet, and keeps what they found."""

from typing import TYPE_CHECKING, Any

from grape_compile.kernels.tunable import Shape
from grape_compile.tuning.kernels import KernelReport, Tuned, tune_kernels

if TYPE_CHECKING:
    from grape_compile.tuning.programs import Progress, TuningReport, tune

__all__ = ["KernelReport", "Progress", "Shape", "Tuned", "TuningReport", "tune", "tune_kernels"]


def __getattr__(name: str) -> Any:
    """Import what needs TVM when it is asked for."""
    if name not in ("Progress", "TuningReport", "tune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grape_compile.tuning import programs

    return getattr(programs, name)
