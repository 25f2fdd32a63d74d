"""How a `NonCommuting` acts: the real Schur form of its generator, and gradients that need no gap (GRAPE App. D)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import Clock, NonCommuting
from grape_compile.errors import OperandError
from grape_compile.operators.action import Slots, pulled
from grape_compile.operators.low_rank import LowRank, Update, check_matrix
from grape_compile.operators.operands import compute_dtype


@dataclass(frozen=True)
class Mixing(LowRank):
    """y = x + E (exp(n L_r) - I) E^T x, in the planes of the real Schur form of L_r."""

    encoding: NonCommuting

    @property
    def clock(self) -> Clock:
        return self.encoding.clock

    def check(self, slots: Slots, tensor: Tensor) -> None:
        self.check_time(slots, tensor)
        basis, size = slots[self.encoding.basis], self.encoding.size
        columns = f"orthonormal columns [..., {size}, r]"
        check_matrix(self.encoding.basis, basis, tensor, (size, None), columns)
        rank = basis.shape[-1]
        if not 1 <= rank <= size:
            raise OperandError(
                f"{self.encoding.basis} as {columns}",
                f"{self.encoding.basis} has shape {tuple(basis.shape)}",
                f"1 to {size} columns: more cannot be orthonormal",
            )
        square = f"a square matrix [..., {rank}, {rank}], as large as {self.encoding.basis} has columns"
        check_matrix(self.encoding.generator, slots[self.encoding.generator], tensor, (rank, rank), square)

    def prepare(self, slots: Slots, tensor: Tensor) -> Update:
        """Return E (exp(n L_r) - I) E^T as planes that turn by n theta, angles in float64."""
        angles, vectors = spectral_form(slots[self.encoding.generator])
        theta, planes = schur_planes(angles, vectors)
        frame = slots[self.encoding.basis].to(torch.float64) @ planes
        phase = self._phase(slots, tensor) * theta.unsqueeze(-2)
        dtype = compute_dtype(tensor)
        # cos - 1, without its cancellation.
        cos, sin = (-2.0 * (phase / 2).sin().square()).to(dtype), phase.sin().to(dtype)
        return Update(frame.to(dtype), (cos, -sin, sin, cos))

    def slots_gradient(self, slots: Slots, tensor: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the gradients of basis, clock and generator; the vectors of the Schur form are constants to them.

        Those have no derivative where angles meet. The generator's gradient needs none (`_generator_gradient`),
        and gradients that are differentiated again come from the matrix exponential.
        """
        names = [name for name, slot in slots.items() if slot.is_floating_point()]
        if torch.is_grad_enabled():
            return pulled(self._exponential, names, slots, tensor, cotangent)
        others = [name for name in names if name != self.encoding.generator]

        def acted(filled: Slots, wide: Tensor) -> Tensor:
            return self.act(self.prepare(filled, wide), filled, wide)

        gradients = pulled(acted, others, slots, tensor, cotangent)
        return {**gradients, self.encoding.generator: self._generator_gradient(slots, tensor, cotangent)}

    def _generator_gradient(self, slots: Slots, tensor: Tensor, cotangent: Tensor) -> Tensor:
        """Return the gradient by Daleckii and Krein's formula, in float64.

        With i L_r = V diag(lambda) V^H, the derivative of exp(n L_r) along H is V (Phi o V^H H V) V^H, Phi_jk the
        divided difference of exp(-i n lambda) between lambda_j and lambda_k: n exp(-i n (lambda_j + lambda_k) / 2)
        sinc(n (lambda_j - lambda_k) / 2), which is smooth where they meet.
        """
        generator, dtype = slots[self.encoding.generator], compute_dtype(tensor)
        angles, vectors = spectral_form(generator)
        with torch.autocast(tensor.device.type, enabled=False):
            basis = slots[self.encoding.basis].to(dtype)
            inner = [(part.to(dtype) @ basis).to(vectors.dtype) for part in (tensor, cotangent)]
            source, target = (part @ vectors.conj() for part in inner)
        time, by_token = self._phase(slots, tensor), angles.unsqueeze(-2)
        half = torch.exp(-0.5j * time * by_token)
        source, target = time * half * source, half * target.conj()
        rows = []
        for j in range(generator.shape[-1]):
            # torch.sinc(x) is sin(pi x) / (pi x).
            quotients = torch.sinc(time * (by_token[..., j : j + 1] - by_token) / (2 * math.pi))
            rows.append((target[..., j : j + 1] * quotients * source).sum(-2))
        full = (vectors.conj() @ torch.stack(rows, -2) @ vectors.mT).real
        gradient: Tensor = _skew(full).sum_to_size(generator.shape).to(generator.dtype)
        return gradient

    def _exponential(self, slots: Slots, tensor: Tensor) -> Tensor:
        """Return what `act` does by matrix exponentials: O(r^3) per token, smooth in the generator everywhere."""
        basis = slots[self.encoding.basis].to(torch.float64)
        generator = _skew(slots[self.encoding.generator].to(torch.float64)).unsqueeze(-3)
        turned = torch.linalg.matrix_exp(self._phase(slots, tensor).unsqueeze(-1) * generator)
        inner = tensor.to(torch.float64) @ basis
        moved = (turned @ inner.unsqueeze(-1)).squeeze(-1) - inner
        result: Tensor = tensor + (moved @ basis.mT).to(tensor.dtype)
        return result

    def _phase(self, slots: Slots, tensor: Tensor) -> Tensor:
        """Return orientation * n of every token, [..., T, 1]."""
        return self.encoding.orientation * self.times(slots, tensor)


def spectral_form(generator: Tensor) -> tuple[Tensor, Tensor]:
    """Return lambda [..., r], ascending, and unitary V [..., r, r] with i L = V diag(lambda) V^H, L the skew part."""
    angles, vectors = torch.linalg.eigh(1j * _skew(generator.to(torch.float64)))
    return angles, vectors


def schur_planes(angles: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return theta [..., r // 2] >= 0 and the planes T [..., r, 2 (r // 2)] of the real Schur form.

    The angles come as pairs +-theta with conjugate vectors, and L turns the real part of that of +theta into its
    imaginary part. Where theta is 0 the two need not be orthogonal; nothing turns there.
    """
    rank = angles.shape[-1]
    positive = math.sqrt(2.0) * vectors[..., rank - rank // 2 :]
    return angles[..., rank - rank // 2 :], torch.cat([positive.real, positive.imag], -1)


def _skew(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mT) / 2
