"""Position encodings of PyTorch models, found by what they compute and rewritten into GRAPE operators."""

from grape_compile.compiler import grape_compile, inspect, report, restore, rewrite
from grape_compile.reporting import Report

__version__ = "0.1.0"

__all__ = ["Report", "grape_compile", "inspect", "report", "restore", "rewrite"]
