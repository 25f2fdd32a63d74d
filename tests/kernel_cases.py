"""What the tests of kernels share: where kernels run, and how to let them take every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grape_compile.operators import providers
from grape_compile.operators.providers import Provider

#: Interpreted on a CPU, or compiled on a GPU: the same tests.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of a store: half a unit, but the interpreter cuts bfloat16 off."""
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"
    return torch.finfo(dtype).eps / (1 if cut else 2)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Leave the kernels alone to compute `grape::rotate`, wherever they run."""
    before = providers.TURN_PROVIDERS
    providers.TURN_PROVIDERS = (Provider("triton", "grape_compile.kernels.turning", priority=10),)
    try:
        yield
    finally:
        providers.TURN_PROVIDERS = before


@contextmanager
def kernels_first() -> Iterator[None]:
    """Let the kernels compute every `grape::rotate` that they take, wherever they run."""
    before = providers.TURN_PROVIDERS
    kernel = Provider("triton", "grape_compile.kernels.turning", priority=10, devices=(DEVICE,))
    providers.TURN_PROVIDERS = (kernel, *(row for row in before if row.name != "triton"))
    try:
        yield
    finally:
        providers.TURN_PROVIDERS = before


def on_device(slots: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Slots where kernels run, floating ones in `dtype`."""
    return {
        name: (slot.to(dtype) if slot.is_floating_point() else slot).to(DEVICE)
        for name, slot in slots.items()
    }


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one.detach().double() - two.detach().double()).abs().max()) for one, two in pairs)
