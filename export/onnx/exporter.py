"""The way from a model to a verified ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram

from grape_compile.errors import GrapeError
from grape_compile.export.capturing import Captured, capture
from grape_compile.export.cases import Case, drawn_cases
from grape_compile.export.comparison import Comparison
from grape_compile.export.kv_cache import SHARED, cached_cases, in_one_size, with_cache
from grape_compile.export.onnx.clean import (
    drop_unread,
    finish,
    name_axes,
    read_sizes,
    share_heads,
    simplify,
    widen_arithmetic,
)
from grape_compile.export.onnx.emit_blocks import SMALLEST
from grape_compile.export.onnx.files import LIMIT, check, describe, write
from grape_compile.export.onnx.fold_parameters import fold_parameters
from grape_compile.export.onnx.fuse_attention import fuse_attention
from grape_compile.export.onnx.hold_past import hold_past
from grape_compile.export.onnx.lower import Lowered, lower
from grape_compile.export.onnx.report import OnnxReport
from grape_compile.export.onnx.runtime import CPU
from grape_compile.export.onnx.targets import Target, target_of
from grape_compile.export.onnx.translate import silence, translate
from grape_compile.export.onnx.verify import verify as verified
from grape_compile.export.onnx.write_in_place import write_in_place
from grape_compile.export.staging import staged
from grape_compile.passes.pipeline import rewrite_export


def export(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    path: str | PathLike[str] = "model.onnx",
    *,
    target: str = "standard",
    dynamic_shapes: Any = "auto",
    kv_cache: bool | str = False,
    verify: bool = True,
    providers: Sequence[str] = (CPU,),
    external_data_above: int | None = LIMIT,
    progress: Callable[[str], None] = lambda step: None,
) -> OnnxReport:
    """Write a model as an ONNX file in which its position encodings and attention are operators, and verify it.

    `target` is "standard" (opset 23, nothing outside ai.onnx), "ort" (com.microsoft) or "portable" (opset 18).
    `dynamic_shapes` are those of torch.export, or "auto": batch and sequence are open. `kv_cache` makes a decoder
    of transformers take past_key_values.N.key and .value and return present.N.key and .value, longer by the new tokens;
    "shared": of one size, so that a caller may bind one buffer as both and nothing is copied. `verify` runs the
    file on `providers` at three shapes, three draws each, against the model in float64; for the CPU alone causal
    attention is a loop over blocks of queries. Weights of more than `external_data_above` bytes go to `path` with
    .data behind it; None keeps them inside.

    Raises ModelError for something that is no model, CaptureError for one that torch.export or ONNX cannot take, and
    GrapeError for a path that cannot be written and for a file that does not verify, of which nothing is left.
    """
    place = Path(path)
    wanted = target_of(target, loops=list(providers) == [CPU])
    with staged(place) as draft:
        progress("capture")
        captured, draw = _captured(model, args, kwargs or {}, dynamic_shapes, kv_cache)
        _check_types(captured, providers)
        progress("rewrite")
        with torch.no_grad():
            program, found = rewrite_export(captured.program, is_final=True)
        progress("translate")
        graph, lowered = _lowered(replace(captured, program=program), wanted, is_shared=kv_cache == SHARED)
        describe(graph, wanted.name, lowered)
        progress("write")
        operators = dict(Counter(node.op_type for node in graph.graph.all_nodes()))
        data = write(graph, draft, external_data_above)
        check(draft)
        comparisons: tuple[Comparison, ...] = ()
        if verify:
            progress("verify")
            if "Loop" in operators:
                # Two rounds at least.
                draw = partial(draw, least=SMALLEST + 3)
            plain = partial(_plain, captured, draft.with_name("plain.onnx"))
            comparisons = verified(
                draft, captured, draw, providers=providers, is_shared=kv_cache == SHARED, plain=plain
            )
            draft.with_name("plain.onnx").unlink(missing_ok=True)
            draft.with_name("plain.onnx.data").unlink(missing_ok=True)
        return OnnxReport(
            place,
            wanted.name,
            tuple(lowered),
            operators,
            tuple(found.sites),
            tuple(found.refusals),
            comparisons,
            None if data is None else place.with_name(data.name),
        )


def _captured(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    shapes: Any,
    kv_cache: bool | str,
) -> tuple[Captured, Callable[..., Iterable[Case]]]:
    if kv_cache not in (False, True, SHARED):
        raise GrapeError("an ONNX file", f"kv_cache={kv_cache!r}", f"False, True or {SHARED!r}")
    if kv_cache:
        captured = with_cache(model)
        return captured, partial(cached_cases, captured)
    captured = capture(model, args, kwargs, shapes)
    return captured, partial(drawn_cases, captured)


def _check_types(captured: Captured, providers: Sequence[str]) -> None:
    """ONNX Runtime has no bfloat16 on a CPU."""
    narrow = _narrow(captured)
    if narrow and list(providers) == [CPU]:
        raise GrapeError(
            "an ONNX file for a CPU",
            f"{len(narrow)} tensors in bfloat16, {narrow[0]} among them; ONNX Runtime has no bfloat16 there",
            "model.float() or model.half() before, or other providers",
        )


def _narrow(captured: Captured) -> list[str]:
    """Names of the tensors in bfloat16."""
    return [name for name, each in captured.program.state_dict.items() if each.dtype == torch.bfloat16]


def _lowered(captured: Captured, target: Target, *, is_shared: bool) -> tuple[ir.Model, list[Lowered]]:
    graph = translate(
        fold_parameters(captured.program),
        target.opset,
        input_names=captured.input_names,
        output_names=captured.output_names,
    )
    simplify(graph)
    fuse_attention(graph.graph)
    share_heads(graph.graph)
    if is_shared:
        write_in_place(graph.graph)
    lowered = lower(graph, target)
    drop_unread(graph)
    hold_past(graph.graph)
    read_sizes(graph.graph, graph.graph.all_nodes())
    if not _narrow(captured):
        widen_arithmetic(graph.graph)
    finish(graph, target)
    if captured.axes:
        name_axes(graph.graph, in_one_size(captured.axes) if is_shared else captured.axes)
    return graph, lowered


def _plain(captured: Captured, path: Path) -> Path:
    """Write the model as torch.onnx does by itself."""
    with silence():
        torch.onnx.export(
            captured.program,
            f=str(path),
            dynamo=True,
            verbose=False,
            input_names=list(captured.input_names),
            output_names=list(captured.output_names),
        )
    return path
