"""The way from a model to a verified library."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from grape_compile.errors import CaptureError, EngineError, GrapeError, ModelError
from grape_compile.export.capturing import SEQUENCE, Captured, capture
from grape_compile.export.cases import Case, drawn_cases
from grape_compile.export.contract import hold_to_contract
from grape_compile.export.kv_cache import PAST, TOTAL, cached_cases, with_cache
from grape_compile.export.tvm import machine
from grape_compile.export.tvm.about import About, Place, Value
from grape_compile.export.tvm.artifact import Artifact
from grape_compile.export.tvm.compiling import compiled
from grape_compile.export.tvm.flattening import flatten
from grape_compile.export.tvm.importing import imported
from grape_compile.export.tvm.operators import Operators, places
from grape_compile.kernels.tensorir.engine import IRModule, Target, to_target, tvm, versions
from grape_compile.kernels.tensorir.replay import Recorded
from grape_compile.passes.base import Outcome
from grape_compile.passes.pipeline import rewrite_export


def build(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Mapping[str, Any] | Target,
    records: str | Path | None = None,
    dynamic_shapes: Any = "auto",
    kv_cache: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> Artifact:
    """Compile a model, its position encodings rewritten, into a library that runs without torch, and verify it.

    `target` is a tag ("llvm": this CPU), or a dict. `records` is a directory of tuning records. `dynamic_shapes` are
    those of torch.export, or "auto": batch and sequence are open. `kv_cache` makes a decoder of transformers take
    past_key_values.N.key and .value and return present.N.key and .value. `dtype` makes the weights of a copy of the
    model float16 or float32. `verify` runs the code, where this machine can, at three shapes, three draws each, against
    the model in float64.

    Raises ModelError for something that is no model, CaptureError for one that torch.export or TVM cannot take,
    EngineError for a target that TVM does not know or has no compiler for, and GrapeError for code that does not
    verify.
    """
    wanted = to_target(target)
    progress("capture")
    captured, draw = _captured(_of_dtype(model, dtype), args, kwargs or {}, dynamic_shapes, kv_cache)
    _check_types(captured)
    progress("rewrite")
    with torch.no_grad():
        program, found = rewrite_export(captured.program, every_attention=True, is_final=True)
    progress("import")
    way = _imported(captured, program, Operators(wanted, Recorded(wanted, records)))
    progress("compile")
    about = _about(captured, wanted, found, way)
    artifact = Artifact(about, way.weights, _compiled(way, wanted))
    obstacle = machine.runs_here(wanted) if verify else "verify=False"
    if obstacle:
        return replace(artifact, about=replace(about, notes=(*about.notes, f"not verified: {obstacle}")))
    progress("verify")
    comparisons = hold_to_contract("a library", {"": _running(artifact)}, captured, draw)
    return replace(artifact, about=replace(about, comparisons=comparisons))


def _of_dtype(model: nn.Module | ExportedProgram, dtype: torch.dtype | None) -> nn.Module | ExportedProgram:
    if dtype is None:
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a library in {dtype}",
            f"a {type(model).__name__}",
            "a torch.nn.Module, or a program in that dtype",
        )
    return copy.deepcopy(model).to(dtype)


def _captured(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    shapes: Any,
    kv_cache: bool,
) -> tuple[Captured, Callable[[int], Iterable[Case]]]:
    if kv_cache:
        captured = with_cache(model)
        return captured, partial(cached_cases, captured)
    captured = capture(model, args, kwargs, shapes)
    return captured, partial(drawn_cases, captured)


def _check_types(captured: Captured) -> None:
    narrow = [name for name, each in captured.program.state_dict.items() if each.dtype == torch.bfloat16]
    if narrow:
        raise GrapeError(
            "a library that TVM compiles",
            f"{len(narrow)} tensors in bfloat16, {narrow[0]} among them",
            "dtype=torch.float16 or torch.float32",
        )


@dataclass(frozen=True)
class _Way:
    """A module of Relax, its weights, what computes each encoding, and what is to be said of how it was made."""

    module: IRModule
    weights: Mapping[str, Any]
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()
    by_onnx: bool = False


def _imported(captured: Captured, program: ExportedProgram, operators: Operators) -> _Way:
    """Import a rewritten program, or where an operator is not known the portable ONNX file."""
    flat = flatten(program, operators.keeps)
    try:
        module = imported(flat, operators.converters())
    except CaptureError as failure:
        module, weights = _by_onnx(captured, failure)
        made = (replace(place, how="decomposed: by ONNX") for place in places(program, flat, operators))
        return _Way(
            module, weights, tuple(made), (f"by the portable ONNX file: {failure.found}",), by_onnx=True
        )
    weights = {name: tvm.runtime.tensor(value.numpy()) for name, value in flat.weights.items()}
    recorded = operators.recorded
    notes = (*(f"tuned: {task}" for task in recorded.used), *recorded.problems)
    return _Way(module, weights, tuple(places(program, flat, operators)), notes)


def _by_onnx(captured: Captured, failure: CaptureError) -> tuple[IRModule, Mapping[str, Any]]:
    try:
        from grape_compile.export.tvm.importing_onnx import imported_by_onnx
    except ModuleNotFoundError as missing:
        raise CaptureError(
            failure.asked,
            f"{failure.found}, and no package {missing.name}",
            "pip install 'grape-compile[onnx]'",
        ) from failure
    return imported_by_onnx(captured.program, failure)


def _compiled(way: _Way, target: Target) -> Any:
    try:
        return compiled(way.module, target)
    except EngineError as failure:
        if not way.by_onnx:
            raise
        from grape_compile.export.tvm.importing_onnx import WORKS

        raise CaptureError(failure.asked, f"{failure.found}, {way.notes[0]}", WORKS) from failure


def _about(captured: Captured, target: Target, found: Outcome, way: _Way) -> About:
    nodes = {node.name: node for node in captured.program.graph.nodes}
    inputs = [nodes[name] for name in captured.program.graph_signature.user_inputs if name in nodes]
    results = [nodes[name] for name in captured.program.graph_signature.user_outputs]
    return About(
        tuple(_values(captured, captured.input_names, inputs)),
        tuple(_values(captured, captured.output_names, results)),
        json.loads(str(target)),
        "cpu" if target.kind.name == "llvm" else str(target.kind.name),
        captured.kind,
        versions(),
        way.places,
        tuple(f"{each.module or 'model'}: {each.reason}" for each in found.refusals),
        way.notes,
    )


def _values(captured: Captured, names: Sequence[str], nodes: Sequence[fx.Node]) -> Iterable[Value]:
    tensors = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    for name, tensor in zip(names, tensors, strict=True):
        yield _value(name, tensor, captured)


def _value(name: str, tensor: Tensor, captured: Captured) -> Value:
    named = captured.axes.get(name, (None,) * tensor.dim())
    sizes = [_known(size, at) for size, at in zip(tensor.shape, named, strict=True)]
    return Value(name, str(tensor.dtype).removeprefix("torch."), tuple(sizes))


def _known(size: int | torch.SymInt, name: str | None) -> int | str | None:
    """Return a size, or the name of one that is open."""
    known = size if isinstance(size, int) else size.node.maybe_as_int()
    return (f"{PAST} + {SEQUENCE}" if name == TOTAL else name) if known is None else int(known)


def _running(artifact: Artifact) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.from_numpy(each) for each in artifact.run(*inputs).values()]

    return run
