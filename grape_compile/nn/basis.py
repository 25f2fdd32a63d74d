"""Orthogonal bases that train, the identity at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from grape_compile.errors import OperandError


class OrthogonalBasis(nn.Module):
    """E in SO(d), [d, d] or [heads, d, d], the identity at the start (GRAPE 3.1).

    * "cayley": E = (I + A)^-1 (I - A), A = W - W^T, `weight` W = 0 at the start.
    * "householder": E = H_1 ... H_d with H_i = I - 2 v_i v_i^T / |v_i|^2, `weight` v [.., d, d]; the reflections are
      equal two by two at the start, where each pair undoes itself. d is even.
    * "orthogonal": E = exp(A), which is what `torch.nn.utils.parametrizations.orthogonal` makes of a square matrix by
      default; written out, because a module parametrised by torch can neither be pickled nor stay exact.

    Computed in float64, so that E^T E = I to the rounding of the result whatever has been learned.

    >>> OrthogonalBasis(2)()
    tensor([[1., 0.],
            [0., 1.]], grad_fn=<ToCopyBackward0>)
    """

    def __init__(self, size: int, method: str = "cayley", heads: int | None = None) -> None:
        super().__init__()
        if method not in _METHODS:
            raise OperandError("an orthogonal basis", f"the method {method!r}", " or ".join(_METHODS))
        if method == "householder" and size % 2:
            raise OperandError(
                "a basis of Householder reflections", f"heads of {size} coordinates", "an even size"
            )
        self.method = method
        shape = (size, size) if heads is None else (heads, size, size)
        weight = torch.zeros(shape)
        if method == "householder":
            weight = torch.randn(*shape[:-2], size // 2, size).repeat_interleave(2, -2)
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        exact = _METHODS[self.method](self.weight.to(torch.float64))
        return exact if self.weight.dtype == torch.float64 else exact.to(torch.float32)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]}, {self.method}"


def _cayley(weight: Tensor) -> Tensor:
    skew = weight - weight.mT
    one = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    basis: Tensor = torch.linalg.solve(one + skew, one - skew)
    return basis


def _householder(weight: Tensor) -> Tensor:
    basis = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device).expand_as(weight)
    directions = nn.functional.normalize(weight, dim=-1)
    for direction in directions.unsqueeze(-1).unbind(-3):
        basis = basis - 2.0 * (basis @ direction) @ direction.mT
    return basis


def _exponential(weight: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.matrix_exp(weight - weight.mT)
    return basis


_METHODS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "cayley": _cayley,
    "householder": _householder,
    "orthogonal": _exponential,
}
