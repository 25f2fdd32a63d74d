"""Open an ONNX file that somebody else wrote, say clearly what is wrong with it, and bring it up to date."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import version_converter

from grape_compile.errors import GrapeError

OLDEST = 13
"""The oldest opset that is read: before it axes were attributes and a softmax flattened its operand."""
_NEWEST = 26

_BY_NODE = 18
"""From this opset on versions are converted node by node; older ones go through onnx's own converter."""


def open_file(path: Path) -> ir.Model:
    """The model in a file, its large tensors left on disk.

    Raises GrapeError for what is no ONNX file, for one that ends too early, or whose external data is not there.
    """
    asked = f"read the ONNX file {path}"
    if not path.is_file():
        raise GrapeError(
            asked, "no such file" if not path.exists() else "no file", "the path of an .onnx file"
        )
    try:
        model = ir.load(path)
        names = {value.name for node in model.graph for value in node.inputs if value is not None}
    except Exception as failure:
        found = str(failure).strip().splitlines() or [""]
        raise GrapeError(asked, f"{type(failure).__name__}: {found[0]}", "a whole ONNX file") from failure
    if not len(model.graph) or not model.graph.outputs or not names:
        raise GrapeError(asked, "a graph without nodes or results", "a whole ONNX file")
    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            _require_data(asked, held)
    return model


def _require_data(asked: str, held: ir.ExternalTensor) -> None:
    place = Path(held.path)
    wanted = (held.offset or 0) + (held.length or 0)
    have = place.stat().st_size if place.is_file() else -1
    if have < wanted or have < 0:
        found = "missing" if have < 0 else f"of {have} bytes, {held.name} ends at {wanted}"
        raise GrapeError(
            asked, f"its external data {place.name} is {found}", "the data file beside the model"
        )


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def require_opset(model: ir.Model, path: Path) -> None:
    """Raise GrapeError for a file of standard operators too old, or newer than what is known."""
    found = opset_of(model)
    if not OLDEST <= found <= _NEWEST:
        raise GrapeError(
            f"rewrite {path}",
            f"opset {found} of the standard operators",
            f"opset {OLDEST} to {_NEWEST}: export again, or onnx.version_converter first",
        )


def modernize(model: ir.Model, opset: int) -> None:
    """Bring a model to an opset at least as new, its functions inlined, and infer shapes.

    Raises GrapeError where a node has no form in the newer opset.
    """
    asked = f"bring an ONNX graph from opset {opset_of(model)} to {opset}"
    try:
        with _quiet():
            if opset_of(model) < _BY_NODE:
                version_converter.convert_version(model, _BY_NODE, fallback=True)
            common.InlinePass()(model)
            if opset_of(model) < opset:
                version_converter.convert_version(model, opset, fallback=False)
            common.ShapeInferencePass(strict_mode=False)(model)
    except Exception as failure:
        raise GrapeError(
            asked, f"{type(failure).__name__}: {failure}".splitlines()[0], "a newer export"
        ) from failure
    if opset_of(model) < opset:
        raise GrapeError(asked, "a node that onnx cannot convert", f"an export at opset {opset}")
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(_opsets(model), True))


def _opsets(model: ir.Model) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the converters log is told in an error, if anything comes of it."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
