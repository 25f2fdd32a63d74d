"""The laws of a rotation (GRAPE, arXiv 2512.07805, 2-3), each for any function that claims to compute it.

A law takes the function and one row of samples and raises AssertionError where the function breaks it.
Everything is float64; the tolerance is 1e-12 of numbers of size one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from operator_laws import Rotate, same
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Learned,
    NonCommuting,
    Positions,
    Rank2,
    Rotation,
    Spectrum,
    Steps,
    Table,
    Tables,
)
from grape_compile.operators.samples import BATCH, HEAD_DIM, HEADS, LENGTH, Sample, tensor

Turning = Rotation | Rank2 | NonCommuting


class Clocked:
    """A sample whose clock the law sets: times [axes, ..., T] in place of the sample's own.

    It acts as places(scale * exp(n X) (x E)); here a generator, whose basis is no change of coordinates.
    """

    def __init__(self, function: Rotate, sample: Sample) -> None:
        assert isinstance(sample.encoding, Turning)
        self.function, self.filled = function, sample.slots()
        self.encoding: Any = sample.encoding

    @property
    def axes(self) -> int:
        return 1

    def generator(self) -> Tensor:
        """X [..., D, D]."""
        if isinstance(self.encoding, Rank2):
            a, b = (self.filled[name].reshape(-1, 1, HEAD_DIM) for name in (self.encoding.a, self.encoding.b))
            w = self.frequencies(self.encoding.spectrum, 1)
            plane = a.mT @ b - b.mT @ a
            return int(self.encoding.orientation) * w.reshape(-1, 1, 1) * plane
        basis, inner = (self.filled[name] for name in (self.encoding.basis, self.encoding.generator))
        return cast(Tensor, self.encoding.orientation * basis @ (inner - inner.mT) / 2 @ basis.mT)

    def exponent(self, times: Tensor) -> Tensor:
        """n X for every token, [..., T, D, D]."""
        return times[0][..., None, None] * self.generator().unsqueeze(-3)

    def frequencies(self, spectrum: Spectrum | None, count: int) -> Tensor:
        if spectrum is None:
            return torch.linspace(0.1, 1.0, count, dtype=torch.float64)
        if isinstance(spectrum, Learned | Table):
            return self.filled[spectrum.slot]
        return torch.tensor(spectrum.frequencies(count), dtype=torch.float64)

    def in_basis(self, heads: Tensor) -> Tensor:
        return heads

    def scales(self) -> Tensor:
        """The norm factor of every input coordinate."""
        return torch.ones(HEAD_DIM, dtype=torch.float64)

    def placed(self, turned: Tensor) -> Tensor:
        """Every coordinate scaled, and where the encoding puts it."""
        return turned

    def after(self) -> Turning:
        """The encoding that may follow: no basis, no scale."""
        return cast(Turning, self.encoding)

    def undo(self) -> Turning:
        return cast(Turning, self.encoding.inverse())

    def timed(self, encoding: Turning, times: Tensor) -> tuple[Turning, dict[str, Tensor]]:
        """The encoding by these times, and what fills it."""
        timed = replace(encoding, clock=Positions("times"))
        return timed, {**self.filled, "times": times if self.axes > 1 else times[0]}

    def __call__(self, heads: Tensor, times: Tensor, encoding: Turning | None = None) -> Tensor:
        timed, slots = self.timed(self.encoding if encoding is None else encoding, times)
        (turned,) = self.function([heads], timed, {name: slots[name] for name in timed.slots})
        return turned


class Planar(Clocked):
    """A `Rotation`: planes of coordinates, with an angle each."""

    @property
    def axes(self) -> int:
        return int(self.encoding.planes.axis_count)

    def angles(self, times: Tensor) -> Tensor:
        """The angle of every token and plane before orientation, [..., T, planes]."""
        theta = self.frequencies(self.encoding.spectrum, self.encoding.planes.count)
        return torch.stack([times[axis] for axis in self.encoding.planes.axes()], -1) * theta

    def exponent(self, times: Tensor) -> Tensor:
        angles = self.encoding.orientation * self.angles(times)
        exponent = torch.zeros(*angles.shape[:-1], HEAD_DIM, HEAD_DIM, dtype=torch.float64)
        for j, (first, second) in enumerate(self.encoding.planes.pairs()):
            exponent[..., second, first] += angles[..., j]
            exponent[..., first, second] -= angles[..., j]
        return exponent

    def in_basis(self, heads: Tensor) -> Tensor:
        return heads if self.encoding.basis is None else heads @ self.filled[self.encoding.basis]

    def scales(self) -> Tensor:
        scales = torch.ones(HEAD_DIM, dtype=torch.float64)
        scales[self._moves()[0]] = self.encoding.scale
        return scales

    def _moves(self) -> tuple[list[int], list[int]]:
        """Coordinates in planes, before and after."""
        before, after = (
            [c for pair in planes.pairs() for c in pair]
            for planes in (self.encoding.planes, self.encoding.output)
        )
        return before, after

    def placed(self, turned: Tensor) -> Tensor:
        before, after = self._moves()
        wanted = torch.empty_like(turned)
        wanted[..., after] = (self.scales() * turned)[..., before]
        rest = [[c for c in range(HEAD_DIM) if c not in inside] for inside in (before, after)]
        wanted[..., rest[1]] = turned[..., rest[0]]
        return wanted

    def after(self) -> Rotation:
        """Planes where this one left them."""
        plain: Rotation = replace(self.encoding, basis=None, scale=1.0)
        back = plain.inverse()
        return replace(back, out=None if back.out is None else back.planes, orientation=plain.orientation)

    def undo(self) -> Rotation:
        plain: Rotation = replace(self.encoding, basis=None)
        return plain.inverse()

    def timed(self, encoding: Turning, times: Tensor) -> tuple[Turning, dict[str, Tensor]]:
        if isinstance(encoding.clock, Tables):
            angles = self.angles(times)
            return encoding, {**self.filled, "cos": angles.cos(), "sin": angles.sin()}
        return super().timed(encoding, times)


def clocked_of(function: Rotate, sample: Sample) -> Clocked:
    return (Planar if isinstance(sample.encoding, Rotation) else Clocked)(function, sample)


def _times(clocked: Clocked, seed: int) -> Tensor:
    return tensor(clocked.axes, LENGTH, seed=seed) * 5


def _heads(seed: int = 1) -> Tensor:
    return tensor(BATCH, HEADS, LENGTH, HEAD_DIM, seed=seed)


def _acted(exponent: Tensor, heads: Tensor) -> Tensor:
    turned: Tensor = torch.linalg.matrix_exp(exponent) @ heads.unsqueeze(-1)
    return turned.squeeze(-1)


def turns_like_the_exponential(function: Rotate, sample: Sample) -> None:
    """G(n) = expm(n X), X the sum of theta_j L_j (3.1), w (a b^T - b a^T) (2.1) or E L_r E^T (App. D)."""
    clocked = clocked_of(function, sample)
    times, heads = _times(clocked, 2), _heads()
    wanted = _acted(clocked.exponent(times), clocked.in_basis(heads))
    same(clocked(heads, times), clocked.placed(wanted))


def rests_at_zero(function: Rotate, sample: Sample) -> None:
    """G(0) = I: what is left are basis, places and scale."""
    clocked = clocked_of(function, sample)
    heads = _heads()
    found = clocked(heads, torch.zeros(clocked.axes, LENGTH, dtype=torch.float64))
    same(found, clocked.placed(clocked.in_basis(heads)))


def composes(function: Rotate, sample: Sample) -> None:
    """G(m) G(n) = G(m + n)."""
    clocked = clocked_of(function, sample)
    first, second, heads = _times(clocked, 2), _times(clocked, 3), _heads()
    same(clocked(clocked(heads, first), second, clocked.after()), clocked(heads, first + second))


def inverts(function: Rotate, sample: Sample) -> None:
    """G(n)^-1 G(n) = I, with the inverse of the algebra."""
    clocked = clocked_of(function, sample)
    times, heads = _times(clocked, 2), _heads()
    same(clocked(clocked(heads, times), times, clocked.undo()), clocked.in_basis(heads))


def keeps_norms(function: Rotate, sample: Sample) -> None:
    """|G x| = |x|: in the planes times the scale, elsewhere as it was."""
    clocked = clocked_of(function, sample)
    heads = _heads()
    sizes = (clocked(heads, _times(clocked, 2)) / clocked.placed(torch.ones_like(heads))).square().sum(-1)
    same(sizes, heads.square().sum(-1))


def has_no_origin(function: Rotate, sample: Sample) -> None:
    """(G_t q) . (G_j k) depends on the offset alone: the same for t + c and j + c."""
    clocked = clocked_of(function, sample)
    times, query, key = _times(clocked, 2), _heads(1), _heads(4)
    moved = times + tensor(clocked.axes, 1, seed=5) * 5
    logits = [clocked(query, at) @ clocked(key, at).mT for at in (times, moved)]
    same(logits[0], logits[1], 1e-11)


def depends_on_what_is_between(function: Rotate, sample: Sample) -> None:
    """(G_t q) . (G_j k) = q . exp((Phi_j - Phi_t) X) k, with Phi the sample's own clock (GRAPE 3)."""
    clocked = clocked_of(function, sample)
    phases = own_times(sample)
    if phases is None:
        return
    between = (phases[..., None, :] - phases[..., :, None]).flatten(-2)
    acted = torch.linalg.matrix_exp(clocked.exponent(between)).unflatten(-3, (LENGTH, LENGTH))
    heads = [_heads(1), _heads(4)]
    query, key = (clocked.in_basis(part) * clocked.scales() for part in heads)
    wanted = torch.einsum("...td,...tjde,...je->...tj", query, acted, key)
    turned = function(heads, sample.encoding, sample.slots())
    same(turned[0] @ turned[1].mT, wanted.expand(BATCH, HEADS, LENGTH, LENGTH), 1e-11)


def streams(function: Rotate, sample: Sample) -> None:
    """One token at a time equals the whole sequence."""
    clocked = clocked_of(function, sample)
    times, heads = _times(clocked, 2), _heads()
    tokens = [clocked(heads[:, :, t : t + 1], times[:, t : t + 1]) for t in range(LENGTH)]
    same(torch.cat(tokens, 2), clocked(heads, times))


def own_times(sample: Sample) -> Tensor | None:
    """The times of a sample, [axes, ..., T]; None for tables."""
    encoding, slots = sample.encoding, sample.slots()
    assert isinstance(encoding, Turning)
    axes = encoding.planes.axis_count if isinstance(encoding, Rotation) else 1
    if isinstance(encoding.clock, Steps):
        return torch.arange(LENGTH, dtype=torch.float64)[None]
    if isinstance(encoding.clock, Tables):
        return None
    (name,) = encoding.clock.slots
    times = slots[name].double()
    if isinstance(encoding.clock, Accumulated):
        sums = [torch.zeros_like(times[..., :1])]
        for rate in times.unbind(-1):
            sums.append(sums[-1] + rate.unsqueeze(-1))
        times = torch.cat(sums[1:] if encoding.clock.inclusive else sums[:-1], -1)
    return times if axes > 1 else times[None]


def keeps_time(function: Rotate, sample: Sample) -> None:
    """Steps count 0, 1, 2, ...; accumulated rates are running sums, inclusive or exclusive."""
    clocked, times = clocked_of(function, sample), own_times(sample)
    if times is None:
        return
    heads = _heads()
    (found,) = function([heads], sample.encoding, sample.slots())
    same(found, clocked(heads, times))


def differentiates_to_the_transpose(function: Rotate, sample: Sample) -> None:
    """<G x, g> = <x, G^T g>, with G^T g the gradient."""
    slots, heads, cotangent = sample.slots(), _heads().requires_grad_(), _heads(6)
    (turned,) = function([heads], sample.encoding, slots)
    (gradient,) = torch.autograd.grad(turned, heads, cotangent)
    probe = _heads(7)
    (moved,) = function([probe], sample.encoding, slots)
    same((moved * cotangent).sum(), (probe * gradient).sum(), 1e-11)


ROTATE_LAWS: tuple[Callable[[Rotate, Sample], None], ...] = (
    turns_like_the_exponential,
    rests_at_zero,
    composes,
    inverts,
    keeps_norms,
    has_no_origin,
    depends_on_what_is_between,
    streams,
    keeps_time,
    differentiates_to_the_transpose,
)
