"""Rewrite an ONNX file that already exists: find its position encodings, put fused operators in their place."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx

from grape_compile.export.onnx.agreement import Comparison, Judge
from grape_compile.export.onnx.reading.opening import modernize, open_file, opset_of, require_opset, save, written
from grape_compile.export.onnx.reading.examples import first_example
from grape_compile.export.onnx.reading.trace import import_graph
from grape_compile.export.onnx.runs import Session, measure
from grape_compile.export.onnx.splice import splice
from grape_compile.export.onnx.targets import target_of
from grape_compile.passes.pipeline import rewrite_program
from grape_compile.passes.site import Refusal, Site


@dataclass(frozen=True)
class OnnxReport:
    """What a file holds and how it was checked."""

    path: str
    target: str
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    opaque: tuple[str, ...] = ()


def rewrite_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "standard",
    verify: bool = True,
) -> OnnxReport:
    """Write `out`: the file at `path` with every position encoding that was found as an operator of `target`.

    Inputs and outputs keep their names and types, external data stays external. A file without a site is copied. With
    `verify` the new file is checked and run beside the old one, on one and three rows; where they disagree nothing is
    written. Raises GrapeError for what is no ONNX file, an opset too old, a path that cannot be written, a
    disagreement.
    """
    kind = target_of(target)
    source, place = Path(path), Path(out)
    with written(place) as folder:
        model = open_file(source)
        require_opset(model, source)
        original = Session(source)
        example = first_example(model.graph, original.refuses)
        feeds = example.feeds(model.graph)
        modernize(model, max(opset_of(model), kind.opset))
        imported = import_graph(
            model.graph, example, feeds, lambda values: measure(model, source.parent, feeds, values)
        )
        judge = Judge(model.graph, example, imported, original)
        found = rewrite_program(imported.program)
        done = splice(model.graph, imported, kind)
        refusals = (*found.refusals, *done.refusals)
        if not done.sites:
            _copy(source, folder / place.name)
            return OnnxReport(str(place), target, refusals=refusals, opaque=imported.opaque)
        if kind.microsoft:
            model.opset_imports.setdefault("com.microsoft", 1)
        save(model, folder / place.name)
        comparisons: tuple[Comparison, ...] = ()
        if verify:
            onnx.checker.check_model(str(folder / place.name))
            comparisons = judge.compare(Session(folder / place.name))
    return OnnxReport(str(place), target, tuple(done.sites), refusals, comparisons, imported.opaque)


def _copy(source: Path, place: Path) -> None:
    """The file as it is, and the data it names."""
    model = open_file(source)
    shutil.copyfile(source, place)
    for value in model.graph.initializers.values():
        data = getattr(value.const_value, "location", None)
        if data is not None and not (place.parent / data).exists():
            shutil.copyfile(source.parent / data, place.parent / data)
