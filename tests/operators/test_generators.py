"""Generators by the matrix exponential: known rotations, degenerate cases, rounding, and planted mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from operator_laws import Rotate, Slots, same
from rotation_laws import ROTATE_LAWS, Clocked
from torch import Tensor

from grape_compile.encoding import (
    Encoding,
    Geometric,
    Half,
    Learned,
    Multiplicative,
    NonCommuting,
    Positions,
    Rank2,
    Rotation,
    Steps,
    rope,
)
from grape_compile.operators import reference_rotate, rotate
from grape_compile.operators.actions import ACTIONS
from grape_compile.operators.non_commuting import schur_planes, spectral_form
from grape_compile.operators.rank2 import sine_cosine_quotients
from grape_compile.operators.samples import (
    BATCH,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    Sample,
    generator_tolerance,
    tensor,
)

TIMED2 = Rank2(HEAD_DIM, Learned("w"), Positions("n"))
MIXED = NonCommuting(HEAD_DIM, Positions("n"))
J = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def names(value: object) -> str:
    return value.name if isinstance(value, Sample) else str(getattr(value, "__name__", value))


def orthonormal(count: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(tensor(HEAD_DIM, count, seed=3)).Q
    return basis


def unit(at: int) -> Tensor:
    return torch.eye(HEAD_DIM, dtype=torch.float64)[at]


#: Generators whose angles meet, vanish or come in any order.
DEGENERATE = {
    "equal": torch.block_diag(0.7 * J, 0.7 * J),
    "opposite": torch.block_diag(0.7 * J, -0.7 * J),
    "nearly_equal": torch.block_diag(0.7 * J, (0.7 + 1e-13) * J),
    "equal_and_still": torch.block_diag(0.7 * J, 0.7 * J, torch.zeros(1, 1, dtype=torch.float64)),
    "one_plane": torch.block_diag(0.7 * J, 0 * J),
    "nearly_still": torch.block_diag(1e-14 * J, 0.7 * J, 1e-9 * J),
    "zero": torch.zeros(4, 4, dtype=torch.float64),
    "number": torch.ones(1, 1, dtype=torch.float64),
    "symmetric": torch.ones(3, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_generators_are_exact_and_differentiable_twice(name: str) -> None:
    generator = DEGENERATE[name]
    basis, times = orthonormal(len(generator)), torch.tensor([0.0, 1.0, -40.0], dtype=torch.float64)
    slots = {"n": times, "basis": basis, "generator": generator}
    heads = tensor(2, 3, HEAD_DIM)
    whole = basis @ (generator - generator.mT) / 2 @ basis.mT
    wanted = (torch.linalg.matrix_exp(times[:, None, None] * whole) @ heads.unsqueeze(-1)).squeeze(-1)
    same(rotate([heads], MIXED, slots)[0], wanted)

    def function(query: Tensor, *filled: Tensor) -> tuple[Tensor, ...]:
        return rotate([query], MIXED, dict(zip(slots, filled, strict=True)))

    operands = [part.clone().requires_grad_() for part in (heads, *slots.values())]
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


VECTORS = {
    "parallel": (tensor(HEAD_DIM), -2 * tensor(HEAD_DIM)),
    "nearly_parallel": (tensor(HEAD_DIM), tensor(HEAD_DIM) + 1e-9 * tensor(HEAD_DIM, seed=1)),
    "no_a": (torch.zeros(HEAD_DIM, dtype=torch.float64), tensor(HEAD_DIM)),
    "nothing": (torch.zeros(HEAD_DIM, dtype=torch.float64),) * 2,
    "orthogonal": (unit(0), unit(5)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_degenerate_vectors_are_exact_and_differentiable_twice(name: str) -> None:
    times = torch.tensor([0.0, 1e-9, 1.0, -3.0], dtype=torch.float64)
    slots = dict(zip(("w", "n", "a", "b"), (torch.ones(1).double(), times, *VECTORS[name]), strict=True))
    heads = tensor(2, 4, HEAD_DIM)
    same(rotate([heads], TIMED2, slots)[0], reference_rotate([heads], TIMED2, slots)[0], 1e-11)

    def function(query: Tensor, *filled: Tensor) -> tuple[Tensor, ...]:
        return rotate([query], TIMED2, dict(zip(slots, filled, strict=True)))

    operands = [part.clone().requires_grad_() for part in (heads, *slots.values())]
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


@pytest.mark.parametrize("length", [4096, 1_000_000])
def test_far_positions_equal_the_matrix_exponential(length: int) -> None:
    """To 1e-10 for angles of thousands; beyond, an angle is as exact as float64 has it: 4 n theta u."""
    times = torch.linspace(0, length, 5, dtype=torch.float64)
    heads = tensor(1, 5, HEAD_DIM)
    generator = tensor(5, 5, seed=4)
    slots = {"n": times, "basis": orthonormal(5), "generator": generator}
    whole = slots["basis"] @ (generator - generator.mT) / 2 @ slots["basis"].mT
    # The exponential squares its matrix log2(n |L|) times, and each squaring doubles the error.
    angle = length * float(torch.linalg.matrix_norm(whole, 2))
    wanted = (torch.linalg.matrix_exp(times[:, None, None] * whole) @ heads.unsqueeze(-1)).squeeze(-1)
    same(rotate([heads], MIXED, slots)[0], wanted, max(1e-10, 40 * angle * 2.0**-53))


def test_quotients_meet_where_the_series_ends() -> None:
    u = torch.tensor(
        [-1e-3, 0.0, 1e-12, 0.5, 1.0, 1.0 + 1e-15, 2.0, 1e6], dtype=torch.float64
    ).requires_grad_()
    sine, cosine = sine_cosine_quotients(u)
    z = u.detach().to(torch.complex128).sqrt()
    near = z.abs() < 1e-3
    same(sine.detach(), torch.where(near, 1 - u.detach() / 6, (z.sin() / z).real))
    same(cosine.detach()[~near], ((1 - z.cos()) / z.square()).real[~near])
    # d/du of both, from 2 u S' = cos z - S and 2 u C' = S - 2 C; -1/6 and -1/24 at zero.
    by_sine = torch.autograd.grad(sine.sum(), u, retain_graph=True)[0]
    by_cosine = torch.autograd.grad(cosine.sum(), u)[0]
    far = ~near & (u.detach().abs() > 1e-2)
    with torch.no_grad():
        same(by_sine[far], ((z.cos().real - sine) / (2 * u))[far])
        same(by_cosine[far], ((sine - 2 * cosine) / (2 * u))[far])
    assert by_sine[1].item() == pytest.approx(-1 / 6, rel=1e-15)
    assert by_cosine[1].item() == pytest.approx(-1 / 24, rel=1e-15)


def test_the_schur_form_is_the_generator() -> None:
    """T is orthonormal and L = T (theta J) T^T, also where angles are equal."""
    mixed = tensor(6, 6, seed=5)
    mixed = mixed - mixed.mT
    turned = orthonormal(6)[:6]
    turned = torch.linalg.qr(turned).Q
    equal = turned @ torch.block_diag(0.7 * J, 0.7 * J, 0.7 * J) @ turned.mT
    for generator in (mixed, equal):
        theta, planes = schur_planes(*spectral_form(generator))
        same(planes.mT @ planes, torch.eye(6, dtype=torch.float64))
        first, second = planes[:, :3], planes[:, 3:]
        same(second * theta @ first.mT - first * theta @ second.mT, generator)


def test_b_orthogonal_to_a_turns_the_plane_by_the_square_of_a() -> None:
    """b = J a: a planar rotation by n w |a|^2 (GRAPE 2.1), from b to a."""
    a = tensor(HEAD_DIM)
    b = torch.block_diag(*[J] * (HEAD_DIM // 2)) @ a
    times, w = tensor(LENGTH, seed=2), torch.tensor([0.3], dtype=torch.float64)
    (found,) = rotate([a.expand(LENGTH, -1)], TIMED2, {"a": a, "b": b, "w": w, "n": times})
    angle = (times * w * a.square().sum())[:, None]
    same(found, angle.cos() * a - angle.sin() * b)


def test_rank2_planes_and_a_diagonal_mixture_are_rope() -> None:
    """Commuting generators over the planes of RoPE, one after another or at once (GRAPE 3.1)."""
    heads = tensor(BATCH, HEADS, LENGTH, HEAD_DIM)
    (wanted,) = rotate([heads], rope(HEAD_DIM, 100.0))
    theta = Geometric(100.0).frequencies(HEAD_DIM // 2)
    turned, generator = heads, torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    for frequency, (first, second) in zip(theta, Half(HEAD_DIM).pairs(), strict=True):
        slots = {"a": frequency * unit(second), "b": unit(first)}
        (turned,) = rotate([turned], Rank2(HEAD_DIM, Geometric(1.0), Steps()), slots)
        generator[second, first], generator[first, second] = frequency, -frequency
    same(turned, wanted)
    slots = {"basis": torch.eye(HEAD_DIM, dtype=torch.float64), "generator": generator}
    same(rotate([heads], NonCommuting(HEAD_DIM, Steps()), slots)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", GENERATORS, ids=names)
def test_a_generator_rounds_once(sample: Sample, dtype: torch.dtype) -> None:
    slots = {name: slot.float() for name, slot in sample.slots().items()}
    exact = {name: slot.double() for name, slot in slots.items()}
    heads = tensor(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=dtype).requires_grad_()
    wide = heads.detach().double().requires_grad_()
    (found,), (wanted,) = (
        rotate([heads], sample.encoding, slots),
        reference_rotate([wide], sample.encoding, exact),
    )
    gain = 2.0
    if isinstance(sample.encoding, Rank2):
        # |F| |M| |F| with |f1| <= |t| and |f2| <= t^2 / 2, and no more than 1 / s and 2 / s^2 where the plane is thin.
        acting = ACTIONS[Rank2](sample.encoding).prepare(slots, heads.detach().float())
        entries = torch.stack(torch.broadcast_tensors(*acting.entries)).square().sum(0).sqrt()
        gain = max(2.0, float(entries.max() * torch.linalg.matrix_norm(acting.frame, 2).max() ** 2))
    largest = float(wide.detach().abs().max())
    tolerance = generator_tolerance(dtype, largest, gain)
    assert found.dtype == dtype
    assert float((found.double() - wanted).detach().abs().max()) <= tolerance
    cotangent = tensor(*found.shape, seed=3, dtype=dtype)
    (back,) = torch.autograd.grad(found, heads, cotangent)
    (exact_back,) = torch.autograd.grad(wanted, wide, cotangent.double())
    tolerance = generator_tolerance(dtype, float(cotangent.abs().max()), gain)
    assert float((back.double() - exact_back).abs().max()) <= tolerance


def _changed(change: Callable[[Any, dict[str, Tensor]], tuple[Encoding, dict[str, Tensor]]]) -> Rotate:
    def mutant(tensors: Sequence[Tensor], encoding: Encoding, slots: Slots) -> tuple[Tensor, ...]:
        return reference_rotate(tensors, *change(encoding, dict(slots)))

    return mutant


def _later(encoding: Any, slots: dict[str, Tensor]) -> tuple[Encoding, dict[str, Tensor]]:
    if isinstance(encoding.clock, Steps):
        return replace(encoding, clock=Positions("later")), {**slots, "later": torch.arange(LENGTH) + 1}
    return encoding, {**slots, encoding.clock.slot: slots[encoding.clock.slot] + 1}


def _faster(encoding: Any, slots: dict[str, Tensor]) -> tuple[Encoding, dict[str, Tensor]]:
    name = encoding.a if isinstance(encoding, Rank2) else encoding.generator
    return encoding, {**slots, name: 1.001 * slots[name]}


def _other_plane(encoding: Any, slots: dict[str, Tensor]) -> tuple[Encoding, dict[str, Tensor]]:
    name, axis = (encoding.b, -1) if isinstance(encoding, Rank2) else (encoding.basis, -2)
    return encoding, {**slots, name: slots[name].roll(1, axis)}


def first_order(tensors: Sequence[Tensor], encoding: Encoding, slots: Slots) -> tuple[Tensor, ...]:
    """x + sin(.) part alone: half the difference to the inverse, added to x."""
    assert isinstance(encoding, Multiplicative)
    there = reference_rotate(tensors, encoding, slots)
    back = reference_rotate(tensors, encoding.inverse(), slots)
    return tuple(x + (y - z) / 2 for x, y, z in zip(tensors, there, back, strict=True))


def wrong_second_order(tensors: Sequence[Tensor], encoding: Encoding, slots: Slots) -> tuple[Tensor, ...]:
    """The 1 - cos part with the wrong sign."""
    assert isinstance(encoding, Multiplicative)
    back = reference_rotate(tensors, encoding.inverse(), slots)
    return tuple(2 * x - z for x, z in zip(tensors, back, strict=True))


def nothing(tensors: Sequence[Tensor], encoding: Encoding, slots: Slots) -> tuple[Tensor, ...]:
    return tuple(part.clone() for part in tensors)


def scaled(tensors: Sequence[Tensor], encoding: Encoding, slots: Slots) -> tuple[Tensor, ...]:
    return tuple(1.001 * part for part in reference_rotate(tensors, encoding, slots))


MUTANTS: dict[str, Rotate] = {
    "wrong_sign": _changed(lambda encoding, slots: (encoding.inverse(), slots)),
    "off_by_one": _changed(_later),
    "faster": _changed(_faster),
    "other_plane": _changed(_other_plane),
    "first_order": first_order,
    "wrong_second_order": wrong_second_order,
    "nothing": nothing,
    "scaled": scaled,
}
MOVING = [sample for sample in GENERATORS if sample.name not in ("rank2_parallel", "non_commuting_zero")]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("sample", MOVING, ids=names)
def test_a_mutant_breaks_a_law(sample: Sample, mutant: str) -> None:
    broken = []
    for law in ROTATE_LAWS:
        try:
            law(MUTANTS[mutant], sample)
        except AssertionError:
            broken.append(law)
    assert broken


def test_every_encoding_that_turns_has_its_action() -> None:
    assert set(ACTIONS) == {Rotation, Rank2, NonCommuting}
    assert all(issubclass(kind, Multiplicative) for kind in ACTIONS)
    assert all(isinstance(sample.encoding, Multiplicative) for sample in GENERATORS)


def test_clocked_generators_know_their_exponent() -> None:
    """The laws' own generator is the one of the definition: skew, and of rank 2 for two vectors."""
    for sample in MOVING:
        generator = Clocked(reference_rotate, sample).generator()
        same(generator, -generator.mT)
        if isinstance(sample.encoding, Rank2):
            assert int(torch.linalg.matrix_rank(generator).max()) == 2
    assert math.isclose(float(torch.linalg.matrix_norm(DEGENERATE["equal"], 2)), 0.7)
