"""One launch of a kernel as a value: what runs, on what, in which configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor


@dataclass(frozen=True, eq=False)
class Launch:
    """A Triton kernel with all of its arguments: run on a GPU, interpreted, or compiled for a GPU that is absent.

    `arguments` go by name; those that the kernel declares `tl.constexpr` are compiled in. `options` are those of the
    compiler: `num_warps`, `num_stages`, `maxnreg`.
    """

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)

    def run(self, *, traced: bool = False) -> None:
        """Start the kernel, or `traced` put it into the graph that is being made; an empty grid has nothing to do."""
        if not all(self.grid):
            return
        if traced:
            torch.library.wrap_triton(self.function)[self.grid](**self.arguments, **self.options)
            return
        # Triton launches on the current device, wherever its arguments are.
        with _device_of(self.arguments):
            self.function[self.grid](**self.arguments, **self.options)


def _device_of(arguments: Mapping[str, Any]) -> AbstractContextManager[object]:
    for value in arguments.values():
        if isinstance(value, Tensor):
            return torch.cuda.device_of(value) if value.is_cuda else nullcontext()
    return nullcontext()


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for one in a graph that is being made (fake and functional tensors are subclasses)."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


@lru_cache(maxsize=1)
def missing_triton() -> str:
    """Return a sentence where Triton is not installed, else nothing."""
    try:
        import_module("triton")
    except ImportError:
        return "Triton is not installed: pip install 'grape-compile[gpu]'"
    return ""


def is_compiled(tensor: Tensor) -> bool:
    """Whether a tensor stands for one in a graph that a compiler is given."""
    return isinstance(tensor, FunctionalTensor)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
