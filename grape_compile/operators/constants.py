"""How tables and constants enter a computation that is run, decomposed or compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto
from functools import lru_cache

import torch
from torch import Tensor

from grape_compile.encoding import Geometric, Spectrum


class Use(Enum):
    """What becomes of the operations of an operator's body."""

    RUN = auto()
    #: A decomposition cannot add a tensor to an exported program: constants are operations on numbers.
    DECOMPOSED = auto()
    #: The same, because the compiler finds equal operations of two layers but not equal tensors; and tables
    #: that all heads read are stored.
    COMPILED = auto()


_use: ContextVar[Use] = ContextVar("use", default=Use.RUN)


@contextmanager
def used_as(use: Use) -> Iterator[None]:
    """Write the operations of a body for this use."""
    token = _use.set(use)
    try:
        yield
    finally:
        _use.reset(token)


def constant(values: Sequence[float] | Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return the values as a tensor on the device of `like`."""
    if _use.get() is Use.DECOMPOSED:
        return torch.stack([torch.full((), value, dtype=dtype, device=like.device) for value in values])
    if like.is_cuda and _use.get() is Use.RUN and type(like) is Tensor:
        return _kept(tuple(values), dtype, like.device)
    # `torch.tensor` would add a mutation (detach_) to a graph that is being traced.
    return torch.as_tensor(values, dtype=dtype, device=like.device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return values in the memory of a GPU: put there once, as a CUDA graph cannot."""
    with torch.inference_mode(False):
        return torch.as_tensor(values, dtype=dtype, device=device)


def closed_form(spectrum: Spectrum, count: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return the frequencies of a spectrum in closed form, [count], computed in float64 and rounded once."""
    if _use.get() is Use.RUN or not isinstance(spectrum, Geometric):
        return constant(spectrum.frequencies(count), dtype, like)
    exponents = torch.arange(count, dtype=torch.float64, device=like.device) / -count
    return stored(torch.pow(spectrum.base, exponents).to(dtype))


def stored(table: Tensor) -> Tensor:
    """Return the same tensor; Inductor puts it in memory instead of computing it wherever it is read."""
    if _use.get() is not Use.COMPILED:
        return table
    # A view by strides needs memory to look at.
    return table.as_strided(table.size(), table.stride())
