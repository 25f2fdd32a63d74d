"""Looking and rewriting without compiling: `inspect`, `rewrite`, and what makes a Dynamo graph a rewritten one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from grape_compile.errors import CaptureError, ModelError, first_line
from grape_compile.passes.capture import (
    capture_dynamo,
    capture_export,
    export_traced,
    has_unknown_sizes,
    parameter_paths,
)
from grape_compile.passes.facts import still_hold
from grape_compile.passes.fuse_norms import FuseNorms
from grape_compile.passes.graph import Program
from grape_compile.passes.lower import ShareAngles
from grape_compile.passes.marks import marks_of
from grape_compile.passes.origins import Origin, marking, origins_of
from grape_compile.passes.pipeline import rewrite_export, rewrite_program
from grape_compile.passes.regions import outline_regions
from grape_compile.passes.site import Refusal
from grape_compile.passes.stand_ins import found_on, marked_as, settle
from grape_compile.passes.trace_run import capture_run, untouched
from grape_compile.passes.turn_in_place import TurnInPlace
from grape_compile.passes.turn_into_caches import TurnIntoCaches
from grape_compile.reporting import GraphReport, Report, over_graphs


def inspect(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Report:
    """Find the position encodings of a model or exported program without changing it.

    A module is captured by `torch.export` on `args` and `kwargs`; where export refuses it, or leaves sizes open that
    depend on values, by watching it run on them: the report is then about what this example does. Every site is
    verified against an fp64 replay (`Site.error`). Raises ModelError for anything else, CaptureError when no door takes
    the model.
    """
    if isinstance(model, ExportedProgram):
        return _rewrite_program(capture_export(model, args, kwargs, is_final=False))
    require_module(model)
    with untouched(model):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(
                    model, tuple(args), kwargs or {}, dynamic_shapes=dynamic_shapes, strict=False
                )
        except Exception as failure:
            return _inspect_a_run(model, args, kwargs or {}, failure)
        if has_unknown_sizes(program):
            with suppress(CaptureError):
                return _rewrite_program(capture_run(model, args, kwargs or {}))
        return _rewrite_program(capture_export(program, args, kwargs))


@overload
def rewrite(program: ExportedProgram, args: Sequence[Any] = ()) -> tuple[ExportedProgram, Report]: ...


@overload
def rewrite(program: fx.GraphModule, args: Sequence[Any] = ()) -> tuple[fx.GraphModule, Report]: ...


def rewrite(
    program: ExportedProgram | fx.GraphModule, args: Sequence[Any] = ()
) -> tuple[ExportedProgram | fx.GraphModule, Report]:
    """Rewrite the position encodings of an exported program, or of an fx GraphModule traced on `args`.

    The result is of the same kind: an exported program can be saved, decomposed and exported again, its `grape::`
    nodes traced. A GraphModule shares the parameters and buffers of the given one, is in the same mode of training for
    good, and takes other sizes where the given one does not depend on those of `args`. Raises ModelError for anything
    else, CaptureError for a GraphModule that does not run on `args`.
    """
    if isinstance(program, ExportedProgram):
        return _rewrite_export(program, args)
    if not isinstance(program, fx.GraphModule):
        raise ModelError(
            "rewrite a program",
            f"a {type(program).__name__}",
            "an ExportedProgram, or an fx.GraphModule with example args; for a module use grape_compile or inspect",
        )
    exported, found = _rewrite_export(export_traced(program, tuple(args)), args)
    module = exported.module()
    assert isinstance(module, fx.GraphModule)
    return module, found


# -- stages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewritten:
    """A graph after all passes, the tables it returns, and when it may run instead of the one it was made of.

    It may where all of `holds` are true of the inputs; one of them (`is_given_tables`) where it was read with tables of
    an earlier graph. `is_changed`: places of it were rewritten, or layers of it upgraded.
    """

    module: fx.GraphModule
    report: Report
    tables: Mapping[int, Origin]
    holds: Sequence[Callable[[Sequence[Any]], bool]]
    is_given_tables: bool
    is_changed: bool


def rewritten_graph(module: fx.GraphModule, examples: Sequence[Any]) -> Rewritten:
    """Return a Dynamo graph after all passes; CaptureError where it cannot be retraced."""
    program = capture_dynamo(module, examples)
    upgraded = bool(marks_of(program.graph))
    found = _rewrite_program(program)
    if program.stands:
        settle(program)
    tables = origins_of(program)
    changed = bool(found.sites) or (upgraded and not marks_of(program.graph))
    if changed:
        FuseNorms()(program)
        TurnIntoCaches()(program)
        TurnInPlace()(program)
        ShareAngles()(program)
        outline_regions(program.module)
    given, holds = bool(program.stands) and bool(found.sites), []
    if given:
        holds.append(marked_as(examples))
    ways = {node: (place,) for place, node in enumerate(program.graph.find_nodes(op="placeholder"))}
    facts = {{**program.ways, **ways}[node]: known for node, known in program.facts.items()}
    if facts:
        holds.append(still_hold(facts, examples, found_on))
    return Rewritten(program.module, found, tables, holds, given, changed)


def _rewrite_program(program: Program) -> Report:
    found = rewrite_program(program)
    return Report(tuple(found.sites), tuple(found.refusals))


def _rewrite_export(program: ExportedProgram, args: Sequence[Any]) -> tuple[ExportedProgram, Report]:
    rewritten, found = rewrite_export(program, args)
    return rewritten, Report(tuple(found.sites), tuple(found.refusals))


def _inspect_a_run(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], failure: Exception
) -> Report:
    """The second door: one run of the model, traced."""
    try:
        return _rewrite_program(capture_run(model, args, kwargs))
    except CaptureError:
        return _inspect_by_compiling(model, args, kwargs, failure)


def _inspect_by_compiling(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], failure: Exception
) -> Report:
    """The third door: run the model once under `torch.compile` and look at every graph it makes."""
    graphs: list[GraphReport] = []

    def look(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        try:
            rewritten = rewritten_graph(module, examples)
        except CaptureError as reason:
            graphs.append(GraphReport(Report(refusals=(capture_refusal(reason),))))
            return module.forward
        graphs.append(GraphReport(rewritten.report, parameter_paths(module)))
        return marking(graphs[-1].watched(module.forward), rewritten.tables)

    try:
        with torch.no_grad():
            torch.compile(model._call_impl, backend=look)(*args, **kwargs)
    except Exception as second:
        raise CaptureError(
            f"capture {type(model).__name__} with {len(args)} positional and {len(kwargs)} keyword arguments",
            f"torch.export: {first_line(failure)}; torch.compile: {first_line(second)}",
            "arguments the model's forward accepts",
        ) from second
    return over_graphs(graphs, model)


def capture_refusal(failure: CaptureError) -> Refusal:
    """Return the line of a report that says why a model or graph was not read."""
    return Refusal("capture", str(failure), "", "", "")


def require_module(model: object) -> None:
    """Raise ModelError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            "work on a model",
            f"a {type(model).__name__}",
            "a torch.nn.Module (its class must be instantiated first)",
        )
