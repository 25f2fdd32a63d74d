"""Hold what a model chooses with `topk`: which experts a token is sent to, which keys an index keeps.

Two scores that are equal to the rounding of bfloat16 are chosen between by their last bit. Another choice is another
function, whose distance to the first says nothing about rounding; so every run is given the choices of the oracle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def noted() -> Iterator[list[Tensor]]:
    """The places that every call of `topk` chooses inside."""
    choices: list[Tensor] = []

    def topk(
        x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Tensor, Tensor]:
        values, places = _chosen(x, k, dim, largest, sorted)
        choices.append(places)
        return values, places

    with _in_place_of_topk(topk):
        yield choices


@contextmanager
def held(choices: list[Tensor]) -> Iterator[None]:
    """Calls of `topk` inside choose the same places, one call after the other; values are those found there."""
    left = iter(choices)

    def topk(
        x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Tensor, Tensor]:
        places = next(left, None)
        if places is None or places.shape[dim] != k or places.shape[:dim] != x.shape[:dim]:
            raise ValueError(f"a call of topk that the oracle does not make: {k} of {tuple(x.shape)}")
        return x.gather(dim, places), places

    with _in_place_of_topk(topk):
        yield


def _chosen(x: Tensor, k: int, dim: int, largest: bool, ordered: bool) -> tuple[Tensor, Tensor]:
    """The operator itself, by the name that still has its own kernel."""
    out = x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    torch.ops.aten.topk.values(x, k, dim, largest, ordered, values=out[0], indices=out[1])
    return out


@contextmanager
def _in_place_of_topk(kernel: object) -> Iterator[None]:
    """A kernel of another making, below autograd and compilers: whoever calls the operator gets it."""
    with torch.library._scoped_library("aten", "IMPL") as registry, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        registry.impl("topk", kernel, "CPU")
        yield
