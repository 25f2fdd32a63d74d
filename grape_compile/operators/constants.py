"""How the numbers of an encoding enter a computation: as one constant tensor, or number by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_spelled_out: ContextVar[bool] = ContextVar("spelled_out", default=False)


def constant(values: Sequence[float] | Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return the values as a tensor on the device of `like`."""
    if _spelled_out.get():
        return torch.stack([torch.full((), value, dtype=dtype, device=like.device) for value in values])
    # `torch.tensor` would add a mutation (detach_) to a graph that is being traced.
    return torch.as_tensor(values, dtype=dtype, device=like.device)


@contextmanager
def spelled_out() -> Iterator[None]:
    """Write constants number by number: a decomposition cannot add a tensor to an exported program."""
    token = _spelled_out.set(True)
    try:
        yield
    finally:
        _spelled_out.reset(token)
