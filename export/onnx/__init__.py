"""ONNX files of rewritten programs: `export` writes one and verifies it, `rewrite_onnx` rewrites one there is."""

from grape_compile.export.comparison import Comparison
from grape_compile.export.onnx.comparing import compare
from grape_compile.export.onnx.exporter import export
from grape_compile.export.onnx.report import OnnxReport
from grape_compile.export.onnx.rewrite_file import rewrite_onnx

__all__ = ["Comparison", "OnnxReport", "compare", "export", "rewrite_onnx"]
