"""Compiling in place: `grape_compile`, `report`, `restore`, and the `grape` backend.

A graph of `torch.compile` is rewritten (`inspecting.py`) and handed to the inner backend. Whatever fails before the
inner backend leaves the original graph running.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from grape_compile.errors import CaptureError, EngineError, GrapeError, ModelError, RefusalError, UpgradeError
from grape_compile.inspecting import Rewritten, capture_refusal, require_module, rewritten_graph
from grape_compile.nn.upgraded import is_upgraded
from grape_compile.passes.capture import parameter_paths
from grape_compile.passes.marks import is_marked
from grape_compile.passes.origins import marking
from grape_compile.passes.pipeline import defect, unmoved
from grape_compile.passes.site import Refusal
from grape_compile.reporting import GraphReport, Report, over_graphs

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Compiled:
    """What is known of one compiled model: what each graph holds, and the seconds spent before the inner backend.

    `in_buckets`: its graphs come whole although DistributedDataParallel wants one per bucket of gradients. `tuned`: the
    records of tuned functions that its graphs may call, True for those that come with the package.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    seconds: float = 0.0
    in_buckets: bool = False
    tuned: Path | str | bool = False


_OTHER_TABLES = (
    "in a later call the tables came from elsewhere than in the call this graph was read with, or a buffer held other "
    "numbers than it was rewritten by, and the original code ran: make tables in the same way in every call, or in the "
    "same graph, and leave buffers as they are"
)
_OWN_GRAPH = (
    "a module compiled by grape_compile keeps its own graphs: an outer torch.compile cannot be a full graph"
)

_MANY = 10_000

_compiled: weakref.WeakKeyDictionary[nn.Module, _Compiled] = weakref.WeakKeyDictionary()


def grape_compile(
    model: Model,
    *,
    backend: str | Backend = "inductor",
    dynamic: bool | None = None,
    fullgraph: bool = False,
    on_refusal: str = "keep",
    options: dict[str, Any] | None = None,
) -> Model:
    """Compile a model in place, its position encodings rewritten into GRAPE operators, and return the same object.

    The model keeps its type, state, hooks and methods; `report(model)` tells what was done once it has run,
    `restore(model)` undoes it, a second call replaces the first. A part that a method of the model calls by itself, as
    `generate` does the encoder of pictures, is compiled by a call of its own. `backend` compiles the rewritten graph
    ("eager" runs it as it is, without a C++ compiler), `dynamic`, `fullgraph` and `options` mean what they mean to
    `torch.compile`. One more of the options, "tvm", is a directory of tuning records, or True: graphs without gradients
    then call tuned functions of TVM for attention on a CPU, where they are measured to be faster.
    `on_refusal="raise"` turns the first refusal into a RefusalError; "keep" leaves the place as it was.

    Raises ModelError for something that is no module, GrapeError for an unknown backend or `on_refusal`.
    """
    require_module(model)
    if on_refusal not in ("keep", "raise"):
        raise GrapeError(
            "compile a model", f"on_refusal={on_refusal!r}", 'on_refusal="keep" or on_refusal="raise"'
        )
    given = dict(options or {})
    record = _Compiled(tuned=given.pop("tvm", False))
    inner = _inner_backend(backend, given)
    door = functools.partial(_compile_graph, inner=inner, record=record, strict=on_refusal == "raise")
    compiled = torch.compile(model._call_impl, backend=door, dynamic=dynamic, fullgraph=fullgraph)
    call = _constant_floats(compiled) if dynamic or is_upgraded(model) else compiled
    call = _as_many_graphs_as_needed(call) if is_upgraded(model) else call
    model._compiled_call_impl = _unwrapped_errors(_whole_graphs(call, model, record), model)
    _compiled[model] = record
    return model


def restore(model: Model) -> Model:
    """Undo `grape_compile` and return the same, plain model; a model never compiled is returned as it is."""
    require_module(model)
    if _compiled.pop(model, None) is not None:
        model.__dict__.pop("_compiled_call_impl", None)
    return model


def report(model: nn.Module) -> Report:
    """What `grape_compile` did to a model, over every graph compiled so far; each place in each module counts once.

    Raises ModelError for a model that `grape_compile` did not compile.
    """
    require_module(model)
    record = _compiled.get(model)
    if record is None:
        raise ModelError(
            "report on a compiled model",
            f"a {type(model).__name__} that grape_compile did not compile",
            "grape_compile(model) first, or inspect(model, args) to look without compiling",
        )
    return over_graphs(record.graphs, model)


def rewrite_seconds(model: nn.Module) -> float:
    """Seconds spent so far on capturing, detecting, rewriting and verifying a compiled model's graphs."""
    record = _compiled.get(model)
    return 0.0 if record is None else record.seconds


def grape(module: fx.GraphModule, examples: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """The `torch.compile(model, backend="grape")` door: rewrite a Dynamo graph, then compile it with Inductor."""
    given = dict(options.get("options") or {})
    record = _Compiled(tuned=given.pop("tvm", False))
    return _compile_graph(
        module, examples, inner=_inner_backend("inductor", given), record=record, strict=False
    )


# -- stages -----------------------------------------------------------------------------------------------


def _compile_graph(
    module: fx.GraphModule, examples: Sequence[Any], *, inner: Backend, record: _Compiled, strict: bool
) -> Callable[..., Any]:
    """One graph of `torch.compile`: rewritten if anything was found, the original otherwise."""
    start = time.perf_counter()
    rewritten: Rewritten | None = None
    try:
        rewritten = rewritten_graph(module, examples)
        found = rewritten.report
        if record.tuned is not False and found.sites:
            found = _with_tuned(rewritten.module, found, record.tuned)
    except (EngineError, UpgradeError):
        raise
    except CaptureError as failure:
        found = Report(refusals=(capture_refusal(failure),))
    except Exception as failure:
        found = Report(refusals=(defect(failure),))
    record.seconds += time.perf_counter() - start
    graph = GraphReport(found, parameter_paths(module))
    record.graphs.append(graph)
    if strict and found.refusals:
        first = found.refusals[0]
        raise RefusalError(
            f"rewrite every position encoding of {first.module or 'the model'}",
            first.reason,
            'on_refusal="keep"',
        )
    inner = _by_bucket(inner) if record.in_buckets else inner
    if rewritten is None or (not rewritten.is_changed and is_marked(module)):
        if is_marked(module):
            raise unmoved(found.refusals)
        return graph.watched(inner(module, examples))
    compiled = inner(rewritten.module if rewritten.is_changed else module, examples)
    if rewritten.holds:
        # Tables often come from elsewhere; what a model keeps is seldom written to.
        original = inner(module, examples) if rewritten.is_given_tables else module.forward
        missed = functools.partial(_note_other_tables, record, found)
        compiled = _guarded(compiled, original, rewritten.holds, missed)
    compiled = graph.watched(compiled)
    return marking(compiled, rewritten.tables) if rewritten.tables else compiled


def _with_tuned(module: fx.GraphModule, found: Report, records: Path | str | bool) -> Report:
    """Let a graph call tuned functions of TVM; the report says where."""
    from grape_compile.export.tvm.calling import call_tuned

    places = call_tuned(module, None if isinstance(records, bool) else records)
    sites = (
        replace(site, lowering="grape::attend by TVM, tuned")
        if site.kind == "bias" and site.module in places
        else site
        for site in found.sites
    )
    return Report(tuple(sites), found.refusals)


def _guarded(
    compiled: Callable[..., Any],
    original: Callable[..., Any],
    holds: Sequence[Callable[[Sequence[Any]], bool]],
    missed: Callable[[], None],
) -> Callable[..., Any]:
    """A compiled graph where all that it was read with holds, and the original elsewhere, which `missed` tells."""

    def call(*args: Any) -> Any:
        if all(hold(args) for hold in holds):
            return compiled(*args)
        missed()
        return original(*args)

    return call


def _note_other_tables(record: _Compiled, found: Report) -> None:
    """Say once that a graph met tables it was not read with."""
    told = [
        Refusal("outside", _OTHER_TABLES, "", site.module, site.source, str(site.encoding))
        for site in found.sites
    ]
    if not any(refusal in graph.report.refusals for refusal in told for graph in record.graphs):
        record.graphs.append(GraphReport(Report(refusals=tuple(told))))


def _inner_backend(backend: str | Backend, options: dict[str, Any] | None) -> Backend:
    if not isinstance(backend, str):
        return backend
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(sorted(torch._dynamo.list_backends()))
        raise GrapeError("compile a model", f"backend={backend!r}", f"a callable or one of {known}")
    found = cast(Backend, torch._dynamo.lookup_backend(backend))
    return (
        functools.partial(found, **({"config_patches": options} if backend == "inductor" else options))
        if options
        else found
    )


# -- helpers of the face ----------------------------------------------------------------------------------


def _constant_floats(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the model's numbers constants where torch makes symbols of them: a scale that is one cannot be proved."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(specialize_float=True):
            return compiled(*args, **kwargs)

    return call


def _as_many_graphs_as_needed(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on where torch would give up and run the model's own code: an upgraded one has its old encoding."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
            return compiled(*args, **kwargs)

    return call


def _whole_graphs(compiled: Callable[..., Any], model: nn.Module, record: _Compiled) -> Callable[..., Any]:
    """Under DistributedDataParallel, take graphs before they are cut into buckets.

    torch cuts a graph so that gradients travel while others are computed. A piece does not see where its tables of cos
    and sin come from: the graph is rewritten first and cut afterwards.
    """
    if not torch.distributed.is_available():
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        parallel = isinstance(model, DistributedDataParallel) or _active_parallel() is not None
        record.in_buckets = parallel and torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
        if not record.in_buckets:
            return compiled(*args, **kwargs)
        with torch._dynamo.config.patch(optimize_ddp=False):
            return compiled(*args, **kwargs)

    return call


def _active_parallel() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running."""
    return cast("DistributedDataParallel | None", DistributedDataParallel._get_active_ddp_module())


def _by_bucket(inner: Backend) -> Backend:
    """Compile a graph in the pieces that the gradients of a DistributedDataParallel are sent in."""
    active = _active_parallel()
    if active is None:
        return inner
    from torch._dynamo.backends.distributed import DDPOptimizer

    return cast(Backend, DDPOptimizer(active.bucket_bytes_cap, inner).compile_fn)


def _unwrapped_errors(compiled: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """Let a GrapeError raised inside the backend reach the user as itself; `torch.export` sees the model's own code.

    An outer `torch.compile`, such as the one transformers puts around the decoding step, breaks its graph here: it
    would take the plain code in and compile it without a single operator of ours.
    """

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, GrapeError):
                raise failure.inner_exception from None
            raise

    own: Callable[..., Any] = torch.compiler.disable(call, reason=_OWN_GRAPH)
    return own
