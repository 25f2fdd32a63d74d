"""Functions of TensorIR called with torch tensors, and held against the definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.operands import Operand


def operand(tensor: Tensor, names: Mapping[int, str] | None = None) -> Operand:
    """What a function is told of a tensor; `names` gives axes a name in place of a size."""
    shape = tuple((names or {}).get(axis, size) for axis, size in enumerate(tensor.shape))
    return Operand(shape, str(tensor.dtype).removeprefix("torch."))


@lru_cache(maxsize=1)
def host() -> Any:
    return engine.to_target("llvm")


def compiled(function: Any, name: str) -> Any:
    return engine.compile_module(engine.module_of({name: function}), host())[name]


def call(function: Any, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    """Return a copy of `output` after a call of a compiled function."""
    result = engine.device_tensor(output.numpy())
    function(*[engine.device_tensor(each.contiguous().numpy()) for each in inputs], result)
    return torch.from_numpy(result.numpy())


def double(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64, those of whole numbers as they are."""
    return {name: slot.double() if slot.is_floating_point() else slot for name, slot in slots.items()}
