"""Functions of TensorIR called with torch tensors, and held against the definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Encoding
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.operators.reference import reference_attend, reference_bias
from grape_compile.operators.sample import BATCH, HEAD_DIM, HEADS
from grape_compile.operators.samples import attend_tolerance


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


@dataclass(frozen=True)
class Case:
    """One attention with its tensors; `options` are those of `grape::attend`, mask and sinks among them."""

    encoding: Encoding
    heads: tuple[Tensor, Tensor, Tensor]
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extra(self) -> dict[str, Tensor]:
        """Mask and sinks, where there are any, in this order."""
        return {name: self.options[name] for name in ("mask", "sinks") if name in self.options}

    @property
    def named(self) -> dict[str, Tensor]:
        """The arguments of the function, in order, without the output."""
        ordered = {name: self.slots[name] for name in self.encoding.slots}
        return dict(zip(("query", "key", "value"), self.heads, strict=True)) | self.extra | ordered

    def described(self) -> Attention:
        query, key, value = map(operand, self.heads)
        told: dict[str, Any] = dict(self.options) | {name: operand(each) for name, each in self.extra.items()}
        slots = {name: operand(slot) for name, slot in self.slots.items()}
        return Attention(self.encoding, query, key, value, slots=slots, **told)

    def output(self) -> Tensor:
        """Room for the result, full of what it must not be."""
        query, _, value = self.heads
        return torch.full((*query.shape[:3], value.shape[3]), 7.0, dtype=query.dtype)

    def hold(self, found: Tensor) -> None:
        """Compare a result with the definition in float64."""
        query, key, value = self.heads
        slots = double(self.slots)
        wide: dict[str, Any] = dict(self.options) | double(self.extra)
        wanted = reference_attend(query.double(), key.double(), value.double(), self.encoding, slots, **wide)
        keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
        bias = float(reference_bias(self.encoding, slots, query.shape[2], keys).abs().max())
        offset = 4.0 if "mask" in self.extra and self.extra["mask"].is_floating_point() else 0.0
        assert found.dtype == query.dtype
        assert (found.double() - wanted).abs().amax() <= attend_tolerance(
            query.dtype, query, key, value, bias, offset
        )


def heads(
    queries: int, keys: int, width: int = HEAD_DIM, kv_heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, which are three coordinates wider."""
    torch.manual_seed(queries + keys)
    shapes = [(HEADS, queries, width), (kv_heads, keys, width), (kv_heads, keys, width + 3)]
    query, key, value = (torch.randn(BATCH, *shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value
