"""The way from a model to a verified library."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from grape_compile.errors import GrapeError, ModelError
from grape_compile.export.capturing import SEQUENCE, Captured, capture
from grape_compile.export.cases import Case, drawn_cases
from grape_compile.export.contract import hold_to_contract
from grape_compile.export.kv_cache import PAST, TOTAL, cached_cases, with_cache
from grape_compile.export.tvm import machine
from grape_compile.export.tvm.about import About, Place, Value
from grape_compile.export.tvm.artifact import Artifact
from grape_compile.export.tvm.compiling import compiled
from grape_compile.export.tvm.flattening import Flat, flatten
from grape_compile.export.tvm.importing import imported
from grape_compile.export.tvm.operators import Operators, places
from grape_compile.kernels.tensorir.engine import Target, to_target, tvm, versions
from grape_compile.passes.base import Outcome
from grape_compile.passes.capture import capture_export, release_export
from grape_compile.passes.pipeline import rewrite_program


def build(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Mapping[str, Any] | Target,
    records: str | PathLike[str] | None = None,
    dynamic_shapes: Any = "auto",
    kv_cache: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> Artifact:
    """Compile a model, its position encodings rewritten, into a library that runs without torch, and verify it.

    `target` is a tag ("llvm": this CPU), or a dict. `records` is a directory of tuning records. `dynamic_shapes` are those of torch.export, or "auto": batch and
    sequence are open. `kv_cache` makes a decoder of transformers take past_key_values.N.key and .value and return
    present.N.key and .value. `dtype` makes the weights of a copy of the model float16 or float32. `verify` runs the
    code, where this machine can, at three shapes, three draws each, against the model in float64.

    Raises ModelError for something that is no model, CaptureError for one that torch.export or TVM cannot take,
    EngineError for a target that TVM does not know or has no compiler for, and GrapeError for code that does not
    verify.
    """
    wanted = to_target(target)
    progress("capture")
    captured, draw = _captured(_of_dtype(model, dtype), args, kwargs or {}, dynamic_shapes, kv_cache)
    _check_types(captured)
    progress("rewrite")
    program, found = _rewritten(captured.program)
    progress("import")
    operators = Operators(wanted)
    flat = flatten(program, operators.keeps)
    module = imported(flat, operators.converters())
    progress("compile")
    weights = {name: tvm.runtime.tensor(value.numpy()) for name, value in flat.weights.items()}
    about = _about(captured, wanted, found, flat, tuple(places(program, flat, operators)))
    artifact = Artifact(about, weights, compiled(module, wanted))
    obstacle = machine.runs_here(wanted) if verify else "verify=False"
    if obstacle:
        return replace(artifact, about=replace(about, notes=(*about.notes, f"not verified: {obstacle}")))
    progress("verify")
    comparisons = hold_to_contract("a library", _running(artifact), captured, draw)
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


def _rewritten(program: ExportedProgram) -> tuple[ExportedProgram, Outcome]:
    captured = capture_export(program)
    found = rewrite_program(captured)
    return (release_export(program, captured) if found.sites else program), found


def _about(captured: Captured, target: Target, found: Outcome, flat: Flat, made: tuple[Place, ...]) -> About:
    return About(
        tuple(_inputs(captured, flat)),
        tuple(_outputs(captured, flat)),
        json.loads(str(target)),
        "cpu" if target.kind.name == "llvm" else str(target.kind.name),
        captured.kind,
        versions(),
        made,
        tuple(f"{each.module or 'model'}: {each.reason}" for each in found.refusals),
    )


def _inputs(captured: Captured, flat: Flat) -> Iterable[Value]:
    nodes = {node.name: node for node in flat.program.graph.nodes if node.op == "placeholder"}
    for name, inner in zip(captured.input_names, flat.inputs, strict=True):
        yield _value(name, nodes[inner].meta["val"], captured)


def _outputs(captured: Captured, flat: Flat) -> Iterable[Value]:
    (results,) = flat.program.graph.output_node().args
    assert isinstance(results, list | tuple)
    for name, result in zip(captured.output_names, results, strict=True):
        yield _value(name, result.meta["val"], captured)


def _value(name: str, tensor: Tensor, captured: Captured) -> Value:
    named = captured.axes.get(name, (None,) * tensor.dim())
    named = tuple(f"{PAST} + {SEQUENCE}" if at == TOTAL else at for at in named)
    sizes = [size if isinstance(size, int) else at for size, at in zip(tensor.shape, named, strict=True)]
    return Value(name, str(tensor.dtype).removeprefix("torch."), tuple(sizes))


def _running(artifact: Artifact) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.from_numpy(each) for each in artifact.run(*inputs).values()]

    return run
