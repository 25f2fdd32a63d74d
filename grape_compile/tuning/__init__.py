"""Searches for the fastest configurations of kernels on the GPU at hand, and keeps what they found."""

from grape_compile.kernels.tunable import Shape
from grape_compile.tuning.kernels import Tuned, TuningReport, tune_kernels

__all__ = ["Shape", "Tuned", "TuningReport", "tune_kernels"]
