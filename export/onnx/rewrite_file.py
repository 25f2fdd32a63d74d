"""Rewrite an ONNX file that already exists: find its position encodings, put fused operators in their place."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from grape_compile.export.onnx.agreement import Judge
from grape_compile.export.onnx.clean import drop_unread, share_heads
from grape_compile.export.onnx.files import check, describe, write
from grape_compile.export.onnx.fuse_attention import fuse_attention
from grape_compile.export.onnx.hold_past import hold_past
from grape_compile.export.onnx.lower import Lowered, lower
from grape_compile.export.onnx.reading.examples import first_example
from grape_compile.export.onnx.reading.opening import modernize, open_file, require_opset
from grape_compile.export.onnx.reading.trace import Imported, import_graph
from grape_compile.export.onnx.report import OnnxReport
from grape_compile.export.onnx.runs import Session, measure
from grape_compile.export.onnx.runtime import CPU
from grape_compile.export.onnx.splice import splice
from grape_compile.export.onnx.targets import Target, target_of
from grape_compile.export.staging import staged
from grape_compile.passes.pipeline import rewrite_program
from grape_compile.passes.site import Refusal


def rewrite_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "standard",
    providers: Sequence[str] = (CPU,),
    verify: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> OnnxReport:
    """Write `out`: the file at `path` with every position encoding that was found as operators of `target`.

    Inputs and outputs keep their names and types, external data stays external; a file without a site is copied.
    `providers` are those that the new file is for: on a CPU alone, causal attention is a loop over blocks of
    queries. With `verify` the new file is run beside the old one, on one and on three rows, both held to the old
    one in fp64; where it is worse nothing is written. Raises GrapeError for what is no ONNX file, an opset too old,
    a path that cannot be written, a graph that ONNX Runtime does not run, a new file that is worse.
    """
    kind = target_of(target, loops=list(providers) == [CPU])
    source, place = Path(path), Path(out)
    with staged(place) as made:
        progress("read")
        model = open_file(source)
        require_opset(model, source)
        original = Session(source)
        example = first_example(model.graph, original.refuses)
        examples = [example, example.resized(model.graph, 3, 5)]
        feeds = [each.feeds(model.graph) for each in examples]
        external = _is_external(model)
        modernize(model, kind.opset)
        imported = import_graph(
            model.graph, examples, lambda values: measure(model, source.parent, feeds, values)
        )
        progress("rewrite")
        judge = Judge(model.graph, example, imported, original) if verify else None
        with torch.no_grad():
            found = rewrite_program(imported.program)
        done = splice(model.graph, imported, kind)
        report = OnnxReport(
            place,
            target,
            tuple(done.lowered),
            {},
            tuple(done.sites),
            (*(_placed(each, imported) for each in found.refusals), *done.refusals),
            notes=_notes(imported),
        )
        if not done.sites:
            _copy(source, made)
            return replace(
                report,
                operators=_operators(model),
                notes=("nothing was replaced: the file is a copy", *report.notes),
            )
        report = replace(report, lowered=(*done.lowered, *_fused(model, kind)), operators=_operators(model))
        progress("write")
        describe(model, target, done.lowered)
        data = write(model, made, 0 if external else None)
        check(made)
        if judge is not None:
            progress("verify")
        return replace(
            report,
            comparisons=() if judge is None else judge.compare(Session(made)),
            external_data=None if data is None else place.parent / data.name,
        )


def _fused(model: ir.Model, target: Target) -> list[Lowered]:
    """Make attention that is written out the operator of the target, with the key heads and the cache there are."""
    fuse_attention(model.graph)
    share_heads(model.graph)
    lowered = lower(model, target)
    drop_unread(model)
    hold_past(model.graph)
    return lowered


def _is_external(model: ir.Model) -> bool:
    return any(
        isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()
    )


def _operators(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.all_nodes()))


def _placed(refusal: Refusal, imported: Imported) -> Refusal:
    """The refusal with the value of the file in place of the node of the program."""
    value = imported.values.get(refusal.node)
    return refusal if value is None else replace(refusal, node=str(value.name))


def _notes(imported: Imported) -> tuple[str, ...]:
    """What was not looked into."""
    counts = Counter(imported.opaque)
    return tuple(f"{count} x {name}: not read, left as it is" for name, count in sorted(counts.items()))


def _copy(source: Path, place: Path) -> None:
    """The file as it is, and the data it names."""
    shutil.copyfile(source, place)
    for value in open_file(source).graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor) and not (place.parent / held.location).exists():
            (place.parent / held.location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(held.path, place.parent / held.location)
