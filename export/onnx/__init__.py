"""ONNX files of rewritten programs: `export` writes one and verifies it, `compare` runs one again elsewhere."""

from grape_compile.export.onnx.comparing import compare
from grape_compile.export.onnx.exporter import export
from grape_compile.export.onnx.report import Comparison, OnnxReport

__all__ = ["Comparison", "OnnxReport", "compare", "export"]
