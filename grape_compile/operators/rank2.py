"""How a `Rank2` acts: the exponential of a b^T - b a^T in closed form (GRAPE 2.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import Clock, Rank2
from grape_compile.operators.action import Slots
from grape_compile.operators.angles import check_by_plane, frequencies
from grape_compile.operators.low_rank import LowRank, Update, check_matrix
from grape_compile.operators.operands import compute_dtype

#: With |u| <= 1 the term of u^9 is below 1e-17 of the first, in the series and in its first derivatives.
_TERMS = 10


@dataclass(frozen=True)
class Plane(LowRank):
    """y = x + f1 L x + f2 L^2 x, in the frame of a and b."""

    encoding: Rank2

    @property
    def clock(self) -> Clock:
        return self.encoding.clock

    def check(self, slots: Slots, tensor: Tensor) -> None:
        self.check_time(slots, tensor)
        check_by_plane(self.encoding.spectrum.slots, 1, slots, tensor)
        size = self.encoding.size
        for name in (self.encoding.a, self.encoding.b):
            meaning = (
                f"a vector [{size}], or [..., 1, {size}] that broadcasts to [*tensor.shape[:-2], 1, {size}]"
            )
            check_matrix(name, slots[name], tensor, (1, size), meaning, may_be_vector=True)

    def prepare(self, slots: Slots, tensor: Tensor) -> Update:
        """Return f1 L + f2 L^2 in the frame (a, b), its entries rounded from float64.

        L = F (0 1; -1 0) F^T and L^2 = F (-beta gamma; gamma -alpha) F^T with F = (a b). With t = n w and
        u = (t s)^2, f1 = t sin(t s) / (t s) and f2 = t^2 (1 - cos(t s)) / (t s)^2 are functions of u without
        a root, so they and all their derivatives are finite where a and b are parallel and where n is 0.
        """
        rank2 = self.encoding
        vectors = (_row(slots[name]).to(torch.float64) for name in (rank2.a, rank2.b))
        rows = torch.cat(torch.broadcast_tensors(*vectors), -2)
        gram = rows @ rows.mT
        alpha, gamma, beta = gram[..., :1, :1], gram[..., :1, 1:], gram[..., 1:, 1:]
        w = frequencies(rank2.spectrum, 1, slots, tensor, torch.float64)
        time = rank2.orientation * self.times(slots, tensor) * w
        square = time.square()
        sine, cosine = sine_cosine_quotients(square * (alpha * beta - gamma.square()))
        f1, f2 = time * sine, square * cosine
        entries = (-f2 * beta, f2 * gamma + f1, f2 * gamma - f1, -f2 * alpha)
        dtype = compute_dtype(tensor)
        first, second, third, fourth = (entry.to(dtype) for entry in entries)
        return Update(rows.mT.to(dtype), (first, second, third, fourth))


def sine_cosine_quotients(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return sin(z)/z and (1 - cos z)/z^2 as functions of u = z^2; differentiable to any order for all u.

    Up to u = 1, and for the small negative u of rounding, by their series sum_j (-u)^j / (2j + k)!, k = 1 and 2.
    """
    wide = u > 1.0
    near, far = torch.where(wide, 0.0, u), torch.where(wide, u, 1.0)
    z = far.sqrt()
    sine = torch.where(wide, z.sin() / z, _series(near, 1))
    return sine, torch.where(wide, (1.0 - z.cos()) / far, _series(near, 2))


def _series(u: Tensor, k: int) -> Tensor:
    total = torch.full_like(u, 1.0 / math.factorial(2 * _TERMS + k))
    for j in reversed(range(_TERMS)):
        total = 1.0 / math.factorial(2 * j + k) - u * total
    return total


def _row(vector: Tensor) -> Tensor:
    """Return a vector as one row of a matrix."""
    return vector.unsqueeze(0) if vector.dim() == 1 else vector
