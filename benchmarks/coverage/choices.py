"""Hold what a model chooses: the experts a token is sent to, the keys an index keeps, what lies above a threshold.

Two scores that are equal to the rounding of bfloat16 are chosen between by their last bit. Another choice is another
function, whose distance to the first says nothing about rounding; so every run is given the choices of the oracle.
Held are `topk`, the places of `max` along an axis, and `>` between floating numbers and a threshold: the router of
Phi-3.5-MoE shares a token between experts whose scores differ by less than 2 %, and a token next to that edge is
another half of an expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._guards import TracingContext

Choices = dict[str, list[Tensor]]
"""By operator, what each of its calls chose, in their order: places, or what is above the threshold."""
Choose = Callable[[str, Tensor], Tensor]
"""The choice to make, given the operator and what it would choose itself."""


class OtherChoices(ValueError):
    """A run that does not come to the choices of the oracle: it went another way."""


@contextmanager
def noted() -> Iterator[Choices]:
    """What is chosen inside."""
    choices: Choices = {}

    def choose(name: str, own: Tensor) -> Tensor:
        choices.setdefault(name, []).append(own)
        return own

    with _choosing_by(choose):
        yield choices


@contextmanager
def held(choices: Choices) -> Iterator[None]:
    """Each operator inside chooses the same, one call after the other; values are those found there."""
    left = {name: iter(each) for name, each in choices.items()}

    def choose(name: str, own: Tensor) -> Tensor:
        choice = next(left.get(name, iter(())), None)
        if choice is None or choice.shape != own.shape:
            raise OtherChoices(f"a call of {name} that the oracle does not make: {tuple(own.shape)}")
        return choice

    with _choosing_by(choose):
        yield


@contextmanager
def _choosing_by(choose: Choose) -> Iterator[None]:
    """Kernels of another making, below autograd and compilers: whoever calls the operators gets them.

    The operators themselves are called by the names that still have their own kernels. What is evaluated while a graph
    is compiled is no choice of the model.
    """
    aten = torch.ops.aten

    def made(name: str, own: Tensor) -> Tensor:
        return own if TracingContext.try_get() is not None else choose(name, own)

    def topk(
        x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Tensor, Tensor]:
        _, own = aten.topk.values(x, k, dim, largest, sorted, values=x.new_empty(0), indices=_places())
        places = made("topk", own)
        return x.gather(dim, places), places

    def largest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        value, own = aten.max.dim_max(x, dim, keepdim, max=x.new_empty(0), max_values=_places())
        if not x.is_floating_point():
            return value, own
        places = made("max", own)
        if keepdim:
            return x.gather(dim, places), places
        return x.gather(dim, places.unsqueeze(dim)).squeeze(dim), places

    def above(x: Tensor, threshold: float) -> Tensor:
        own: Tensor = aten.gt.Scalar_out(x, threshold, out=x.new_empty(0, dtype=torch.bool))
        return made(">", own) if x.is_floating_point() else own

    with torch.library._scoped_library("aten", "IMPL") as registry, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kernel in (("topk", topk), ("max.dim", largest), ("gt.Scalar", above)):
            registry.impl(name, kernel, "CPU")
        yield


def _places() -> Tensor:
    return torch.empty(0, dtype=torch.int64)
