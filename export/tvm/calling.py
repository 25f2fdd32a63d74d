"""Tuned functions called from a compiled graph, where they are measured to be faster; tensors are not copied."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from grape_compile.export.tvm import machine
from grape_compile.export.tvm.operators import ATTEND, Operators
from grape_compile.kernels.tensorir.engine import PrimFunc, compile_module, module_of, to_target, tvm
from grape_compile.kernels.tensorir.replay import Recorded
from grape_compile.passes.graph import module_path

SCHEMA: Final = "(Tensor[] tensors, SymInt[] shape, int function) -> Tensor"
#: Compiled functions by the number that graphs know them by.
_functions: list[Any] = []
_ROUNDS: Final = 5


@torch.library.custom_op("grape::tuned", mutates_args=(), schema=SCHEMA)
def tuned(tensors: Sequence[Tensor], shape: Sequence[int], function: int) -> Tensor:
    """Call a compiled function on tensors of the CPU; its result has `shape` and the dtype of the first tensor."""
    result = tensors[0].new_empty(list(shape))
    _functions[function](*(tvm.runtime.from_dlpack(_aligned(each)) for each in (*tensors, result)))
    return result


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor as the code of a CPU reads it; only one that lies otherwise is copied."""
    plain = tensor.detach().contiguous()
    return plain if plain.data_ptr() % machine.ALIGNED == 0 else plain.clone()


@tuned.register_fake
def _(tensors: Sequence[Tensor], shape: Sequence[int], function: int) -> Tensor:
    return tensors[0].new_empty(list(shape))


def call_tuned(module: fx.GraphModule, records: Path | str | None) -> frozenset[str]:
    """Let a graph call tuned functions for attention, and return the modules of the model in which it does.

    What: calls of `grape::attend` on a CPU, of known sizes, whose task is on record (in the directory, or in what
    comes with the package), where the function is faster than the operator here and now. Leaves alone: all others, and
    a graph in which gradients are computed. Cost: a compilation of each distinct function, and a few runs of both.
    """
    found: set[str] = set()
    if torch.is_grad_enabled():
        return frozenset(found)
    target = to_target("llvm")
    operators = Operators(target, Recorded(target, records))
    chosen: dict[PrimFunc, int | None] = {}
    for node in list(module.graph.nodes):
        if node.target is not ATTEND or not _is_fixed(node):
            continue
        used = len(operators.recorded.used)
        function, tensors = operators.attention_of(node)
        is_recorded = len(operators.recorded.used) > used
        if not isinstance(function, PrimFunc) or not (is_recorded or function in chosen):
            continue
        if function not in chosen:
            chosen[function] = _faster(function, node, tensors, target)
        number = chosen[function]
        if number is None:
            continue
        _replace(node, tensors, number)
        found.add(module_path(node))
    if found:
        module.graph.eliminate_dead_code()
        module.recompile()
    return frozenset(found)


def _is_fixed(node: fx.Node) -> bool:
    """Whether all tensors of a call are on a CPU and of known sizes, and only its output is read."""
    values = [each.meta["val"] for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
    fixed = all(
        each.device.type == "cpu" and all(isinstance(size, int) for size in each.shape) for each in values
    )
    return fixed and all(user.args[1:] == (0,) for user in node.users)


def _faster(function: PrimFunc, node: fx.Node, tensors: Sequence[fx.Node], target: Any) -> int | None:
    """Compile a function and return its number, None where the operator is at least as fast on drawn tensors."""
    name = str(function.attrs["global_symbol"])
    compiled = compile_module(module_of({name: function}), target)[name]
    _functions.append(compiled)
    number = len(_functions) - 1
    drawn = {each: _drawn(each.meta["val"]) for each in tensors}
    shape = list(node.meta["val"][0].shape)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda each: drawn[each])
    own = _seconds(lambda: ATTEND(*args, **kwargs))
    if _seconds(lambda: tuned(list(drawn.values()), shape, number)) < own:
        return number
    _functions[number] = None
    return None


def _drawn(value: Tensor) -> Tensor:
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool)
    if value.is_floating_point():
        return torch.randn(value.shape).to(value.dtype)
    return (
        torch.arange(value.shape[-1] if value.dim() else 1).expand(value.shape).to(value.dtype).contiguous()
    )


def _seconds(run: Callable[[], Any]) -> float:
    """The fastest of a few runs behind one that does not count."""
    run()
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _replace(node: fx.Node, tensors: Sequence[fx.Node], number: int) -> None:
    value = node.meta["val"][0]
    with node.graph.inserting_before(node):
        call = node.graph.call_function(
            torch.ops.grape.tuned.default, (list(tensors), list(value.shape), number)
        )
    call.meta = {**node.meta, "val": value}
    for user in list(node.users):
        user.replace_all_uses_with(call)
