"""What is tuned for TVM: one function of TensorIR, its space, tensors to run it on, and what it must compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Encoding,
    Learned,
    Rotation,
    Table,
    nope,
)
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.attention import attention_space
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.bench import Array
from grape_compile.kernels.tensorir.linear import linear_space
from grape_compile.kernels.tensorir.operands import Operand, Slots
from grape_compile.kernels.tensorir.replay import hash_of
from grape_compile.kernels.tensorir.rotation import rotation_space
from grape_compile.kernels.tensorir.space import Point, Space
from grape_compile.kernels.tensorir.tasks import attention_task, linear_task, rotation_task
from grape_compile.operators import reference_rotate
from grape_compile.operators.reference import reference_attend
from grape_compile.records import Task

DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
Definition = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Program:
    """A module as JSON, the name of its function, and a hash of what it says."""

    text: str
    function: str
    hash: str


@dataclass(frozen=True)
class Workload:
    """A function to tune: inputs by name, in the order of its arguments, behind them its one result.

    `define` is what it must compute, in the dtype of the inputs it is given; `count` says how often a model calls it.
    """

    task: Task
    space: Space
    inputs: Mapping[str, Operand]
    result: Operand
    encoding: Encoding
    define: Definition
    count: int = 1

    @cached_property
    def candidates(self) -> tuple[dict[str, int], ...]:
        """Every point of the space, the one by hand first."""
        return self.space.candidates()

    def program(self, point: Point) -> Program:
        """Return what a point is, written out."""
        module = self.space.build(point)
        return Program(engine.tvm.ir.save_json(module), self.space.name, hash_of(module))

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Return inputs: normal numbers where nothing else is meant."""
        random = torch.Generator().manual_seed(seed)
        return {name: _drawn(name, operand, self.encoding, random) for name, operand in self.inputs.items()}

    def arguments(self, inputs: Mapping[str, Tensor]) -> list[Array]:
        """Return what the function is called with: inputs, and room for the result."""
        room = torch.zeros(_known(self.result), dtype=DTYPES[self.result.dtype])
        return [_array(tensor) for tensor in (*inputs.values(), room)]

    def error(self, result: Tensor, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return the relative RMS error of a result, and what is allowed: 1.25 times that of the definition, + 1e-7."""
        exact = self.define(_wide(inputs))
        return _apart(result, exact), 1.25 * _apart(self.define(inputs), exact) + 1e-7


def rotation_workload(encoding: Rotation, operand: Operand, slots: Slots, target: engine.Target) -> Workload:
    """Return the function that turns one tensor."""
    inputs = {"x": operand, **{name: slots[name] for name in encoding.slots}}

    def define(given: Mapping[str, Tensor]) -> Tensor:
        # Models make angles in float32, whatever the dtype of their heads.
        x = given["x"] if given["x"].dtype == torch.float64 else given["x"].float()
        return reference_rotate([x], encoding, given)[0].to(given["x"].dtype)

    space = rotation_space(encoding, operand, slots, target)
    return Workload(rotation_task(encoding, operand, slots), space, inputs, operand, encoding, define)


def attention_workload(attention: Attention, target: engine.Target) -> Workload:
    """Return the function that attends."""

    def define(given: Mapping[str, Tensor]) -> Tensor:
        return reference_attend(
            given["query"],
            given["key"],
            given["value"],
            attention.encoding,
            given,
            mask=given.get("mask"),
            is_causal=attention.is_causal,
            scale=attention.scale,
            window=attention.window,
            cap=attention.cap,
            sinks=given.get("sinks"),
        )

    space, inputs = attention_space(attention, target), dict(attention.arguments)
    return Workload(attention_task(attention), space, inputs, attention.output, attention.encoding, define)


def linear_workload(x: Operand, weight: Operand, bias: Operand | None, target: engine.Target) -> Workload:
    """Return the product with the weights of a layer, [M, K] times [N, K] transposed."""
    space = linear_space(x, weight, bias, target)
    inputs = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    result = Operand((x.shape[0], weight.shape[0]), x.dtype)

    def define(given: Mapping[str, Tensor]) -> Tensor:
        return torch.nn.functional.linear(given["x"], given["weight"], given.get("bias"))

    return Workload(linear_task(x, weight, bias), space, inputs, result, nope(), define)


def distinct(workloads: Sequence[Workload]) -> list[Workload]:
    """Return each workload once, with how often it is there."""
    found: dict[Task, Workload] = {}
    for each in workloads:
        before = found.get(each.task)
        found[each.task] = each if before is None else replace(before, count=before.count + each.count)
    return list(found.values())


def _known(operand: Operand) -> tuple[int, ...]:
    return tuple(int(size) for size in operand.shape)


def _wide(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}


def _apart(result: Tensor, exact: Tensor) -> float:
    scale = float(exact.square().mean().sqrt())
    return float((result.double() - exact).square().mean().sqrt()) / (scale or 1.0)


def _array(tensor: Tensor) -> Array:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def tensor_of(array: Array) -> Tensor:
    """Return the tensor of an array."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _drawn(name: str, operand: Operand, encoding: Encoding, random: torch.Generator) -> Tensor:
    shape, dtype = _known(operand), DTYPES[operand.dtype]
    if dtype == torch.bool:
        return torch.rand(shape, generator=random) < 0.9
    if not dtype.is_floating_point:
        # Positions run along the longest axis, whatever the layout.
        longest = max(range(len(shape)), key=shape.__getitem__, default=0)
        along = [-1 if axis == longest else 1 for axis in range(len(shape))]
        return torch.arange(shape[longest] if shape else 1).view(along).expand(shape).to(dtype).contiguous()
    terms = list(_terms(encoding))
    if any(isinstance(term, Learned | Table) and term.slot == name for term in terms):
        return (10000.0 ** -torch.linspace(0, 1, shape[-1] + 1)[:-1]).expand(shape).to(dtype).contiguous()
    numbers = torch.randn(shape, generator=random, dtype=torch.float64)
    if any(isinstance(term, Accumulated) and term.slot == name for term in terms):
        # Rates as those of forget gates: what is summed never grows.
        numbers = -0.1 * numbers.abs()
    return numbers.to(dtype)


def _terms(value: Any) -> Iterator[Any]:
    """Yield a term and all that it is made of."""
    if isinstance(value, tuple):
        for each in value:
            yield from _terms(each)
    elif is_dataclass(value):
        yield value
        for each in fields(value):
            yield from _terms(getattr(value, each.name))
