"""From an exported program to an ONNX graph in which position encodings and attention are still one node each.

torch.onnx translates everything else. `grape::rotate`, `grape::attend` and `scaled_dot_product_attention` become nodes
of a private domain, which `lower` replaces by what the target has.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, Final

import onnx_ir as ir
import torch
from onnxscript import evaluator
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter
from torch.export import ExportedProgram

from grape_compile.errors import CaptureError, GrapeError
from grape_compile.passes.graph import module_path, source_line

#: Domain of nodes that no file holds.
PRIVATE: Final = "grape.private"
ROTATE: Final = "rotate"
ATTEND: Final = "attend"
FUSED: Final = "scaled_dot_product_attention"
GROUPED: Final = "grouped_mm"
#: An end behind every axis.
LAST: Final = (1 << 63) - 1


def translate(
    program: ExportedProgram,
    opset: int,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> ir.Model:
    """Return the ONNX graph of a program; CaptureError names an operator that ONNX does not have."""
    try:
        with silence():
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=_translations(),
            )
    except Exception as failure:
        own = next((each for each in _causes(failure) if isinstance(each, GrapeError)), None)
        if own is not None:
            raise CaptureError(own.asked, own.found, own.works) from failure
        raise CaptureError(
            "translate a program to ONNX", _first_cause(program, failure), "a model without that operator"
        ) from failure
    if found is None:
        raise GrapeError(
            "translate a program to ONNX", "torch.onnx returned nothing", "dynamo export of torch"
        )
    return found.model


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep back what torch.onnx prints, warns and logs on its way; what fails is raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """A failure and what it was raised from, the innermost last."""
    cause: BaseException | None = failure
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _first_cause(program: ExportedProgram, failure: Exception) -> str:
    """What failed: the operator with the module and the line of the model's code, where the exporter names one."""
    text = "\n".join(str(each) for each in _causes(failure))
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    for node in program.graph.nodes:
        # torch decomposes before it translates: an operator may be named by what it became.
        own = str(node.target).split(".")[1:2]
        named = f"%{node.name} " in text or (missing and own and own[0].endswith(missing[1].split(".")[-1]))
        if node.op == "call_function" and named:
            at = ", ".join(part for part in (module_path(node), source_line(node)) if part)
            return f"{node.target} ({at}), which ONNX does not have"
    if missing:
        return f"{missing[1]}, which ONNX does not have"
    return f"{type(failure).__name__}: {next(line for line in reversed(text.splitlines()) if line.strip())}"


def _record(kind: str, inputs: Sequence[Any], outputs: int, attributes: Mapping[str, Any]) -> Any:
    node = ir.Node(
        PRIVATE,
        kind,
        list(inputs),
        ir.convenience.convert_attributes(
            {name: value for name, value in attributes.items() if value is not None}
        ),
        num_outputs=outputs,
    )
    # Where torch.onnx collects the nodes of one translation.
    evaluator.default().nodes.append(node)  # type: ignore[attr-defined]  # torch's own evaluator has nodes
    return list(node.outputs)


def _rotate(tensors: Sequence[Any], slots: Sequence[Any], encoding: str) -> Any:
    return _record(ROTATE, (*tensors, *slots), len(tensors), {"encoding": encoding, "tensors": len(tensors)})


def _attend(
    query: Any,
    key: Any,
    value: Any,
    slots: Sequence[Any],
    encoding: str,
    mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Any = None,
    segments: Any = None,
) -> Any:
    attributes = {
        "encoding": encoding,
        "is_causal": int(is_causal),
        "scale": scale,
        "window": window,
        "cap": cap,
    }
    return _record(ATTEND, (query, key, value, mask, sinks, segments, *slots), 2, attributes)


def _fused(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    del dropout_p, enable_gqa  # nothing is dropped where nothing is trained, and the shapes tell of groups
    (output,) = _record(
        FUSED, (query, key, value, attn_mask), 1, {"is_causal": int(is_causal), "scale": scale}
    )
    return output


def _grouped(rows: Any, weights: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if offs is None or bias is not None or out_dtype not in (None, -1):
        raise GrapeError(
            "a grouped product in ONNX", "a call with a bias, or without ends of groups", "rows by groups"
        )
    (output,) = _record(GROUPED, (rows, weights, offs), 1, {})
    return output


def _slice_scatter(
    base: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Any:
    """The base before and behind the source, joined; torch.onnx scatters rows, transposed there and back."""
    if step != 1 or not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return aten_slice_scatter(base, source, dim, start, end, step)
    size = base.shape[dim] if base.shape is not None else None
    parts = [source]
    if start:
        parts.insert(0, _cut(base, dim, 0, start))
    if end is not None and end < (size if isinstance(size, int) else LAST):
        parts.append(_cut(base, dim, end, LAST))
    return op.Concat(*parts, axis=dim) if len(parts) > 1 else op.Identity(source)


def _cut(value: Any, axis: int, start: int, end: int) -> Any:
    bounds: list[Any] = [op.Constant(value_ints=[each]) for each in (start, end, axis)]
    return op.Slice(value, *bounds)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what replaces torch.onnx's own translations; operators of libraries that are not loaded are not there."""
    found: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.grape.rotate.default: _rotate,
        torch.ops.grape.attend.default: _attend,
        torch.ops.aten.scaled_dot_product_attention.default: _fused,
        torch.ops.aten.slice_scatter.default: _slice_scatter,
    }
    for library, name in (("transformers", "grouped_mm_fallback"), ("aten", "_grouped_mm")):
        operator = getattr(getattr(torch.ops, library), name, None)
        if operator is not None:
            found[operator.default] = _grouped
    return found
