"""Bring a model's code into the one dialect by watching it run on real inputs.

The door for models that neither door of torch takes whole: sizes read from a tensor of image grids, loops over the
experts that were hit, a choice by the longest position. Every branch is taken as the example takes it, so the graph
holds for inputs like the example and is looked at only; it is never run in place of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from grape_compile.errors import CaptureError, first_line
from grape_compile.passes.capture import holds_traced_values, program_of
from grape_compile.passes.facts import keep
from grape_compile.passes.graph import Program, Role


def capture_run(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Program:
    """A program of what the model computes on these inputs, its parameters and buffers inputs as well.

    Buffers are copies: a model that writes into its own leaves the given ones alone. Raises CaptureError where the
    model does not run, or what it runs cannot be traced.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    state = {name: value.detach() for name, value in parameters.items()}
    state |= {name: value.detach().clone() for name, value in buffers.items()}
    leaves, form = pytree.tree_flatten((tuple(args), kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def run(state: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for place, value in zip(places, inputs, strict=True):
            filled[place] = value
        positional, named = pytree.tree_unflatten(filled, form)
        with _naming_modules(model):
            result = torch.func.functional_call(model, state, positional, named)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    inputs = [leaves[place] for place in places]
    try:
        with torch.no_grad(), fx.traceback.preserve_node_meta():
            traced = make_fx(
                run,
                pre_dispatch=True,
                tracing_mode="real",
                record_stack_traces=True,
                _error_on_data_dependent_ops=False,
            )(state, inputs)
    except Exception as failure:
        raise CaptureError(
            f"trace a run of {type(model).__name__}",
            first_line(failure),
            "arguments the model's forward accepts",
        ) from failure
    if holds_traced_values(traced):
        raise CaptureError(
            f"trace a run of {type(model).__name__}",
            "a value that is neither an input nor computed from one, as inside of torch.func transforms",
            "arguments the model's forward accepts",
        )
    _share_one_mode(traced)
    placeholders = traced.graph.find_nodes(op="placeholder")
    kinds = [Role.PARAMETER if name in parameters else Role.BUFFER for name in state]
    roles = dict(zip(placeholders, [*kinds, *(Role.INPUT for _ in inputs)], strict=True))
    program = program_of(traced, roles, dict(zip(placeholders, [*state.values(), *inputs], strict=True)))
    keep(program, (node for node in placeholders if roles[node] is Role.BUFFER))
    return program


@contextmanager
def _naming_modules(model: nn.Module) -> Iterator[None]:
    """Note on every operator which module runs it, as the doors of torch do."""
    names = {module: name for name, module in model.named_modules()}
    stack: list[nn.Module] = []

    def note() -> None:
        running = {names[each]: (names[each], type(each)) for each in stack}
        fx.traceback.current_meta["nn_module_stack"] = running

    def enter(module: nn.Module, _: object) -> None:
        stack.append(module)
        note()

    def leave(module: nn.Module, _: object, __: object) -> None:
        stack.pop()
        note()

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def _share_one_mode(traced: fx.GraphModule) -> None:
    """Give all nodes fakes of one mode: traced on real tensors, each has one of its own."""
    mode = FakeTensorMode()

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    for node in traced.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(fresh, node.meta["val"])


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back what a capture leaves in the modules (tables cached as fake tensors, for instance)."""
    saved = [
        (
            module,
            dict(module.__dict__),
            {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, registered in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in registered.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)
