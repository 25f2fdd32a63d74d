"""The transforms of `torch.func` see through the operators, to any order, and agree with the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap

from grape_compile.encoding import alibi, rope
from grape_compile.operators import attend, reference_attend, reference_rotate, rotate

LENGTH, SIZE = 5, 4


def turned(x: Tensor) -> Tensor:
    return rotate([x], rope(SIZE), {})[0]


def turned_by_definition(x: Tensor) -> Tensor:
    return reference_rotate([x], rope(SIZE), {})[0]


def attended(x: Tensor) -> Tensor:
    return attend(x, x.flip(-1), x + 1, alibi(2), is_causal=True)


def attended_by_definition(x: Tensor) -> Tensor:
    return reference_attend(x, x.flip(-1), x + 1, alibi(2), is_causal=True)


PAIRS = {"rotate": (turned, turned_by_definition), "attend": (attended, attended_by_definition)}


def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).square().sum().sin()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: grad(loss(f))(x[0]),
    "vjp": lambda f, x: vjp(f, x[0])[1](x[1])[0],
    "jvp": lambda f, x: jvp(f, (x[0],), (x[1],))[1],
    "vmap of grad": lambda f, x: vmap(grad(loss(f)))(x),
    "grad of vmap": lambda f, x: grad(lambda y: loss(vmap(f))(y))(x),
    "jvp of grad": lambda f, x: jvp(grad(loss(f)), (x[0],), (x[1],))[1],
    "hessian": lambda f, x: hessian(lambda y: loss(f)(x[0] * y))(torch.ones(LENGTH, SIZE, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_an_operator(transform: str, name: str) -> None:
    operator, definition = PAIRS[name]
    x = torch.randn(3, 1, 2, LENGTH, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, wanted = (TRANSFORMS[transform](function, x) for function in (operator, definition))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
