"""How exact rotations are: 1e-12 in float64, derived tolerances elsewhere, values and gradients."""

from __future__ import annotations

import pytest
import torch
from operator_errors import NARROW, gradients, largest_difference, leaves

from grape_compile.encoding import (
    Rotation,
    rope,
)
from grape_compile.operators import reference_rotate, rotate
from grape_compile.operators.samples import (
    BATCH,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    ROTATIONS,
    Sample,
    rotate_tolerance,
    tensor,
)

#: Positions stay below 60 and frequencies below 1 radian per position.
LARGEST_ANGLE = 60.0


@pytest.mark.parametrize("sample", [*ROTATIONS, *GENERATORS], ids=lambda sample: sample.name)
def test_rotation_in_float64(sample: Sample) -> None:
    slots = sample.slots()
    heads = leaves(*(tensor(BATCH, HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (1, 2)))
    learned = dict(zip(slots, leaves(*slots.values()), strict=True))
    results = [function(heads, sample.encoding, learned) for function in (rotate, reference_rotate)]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    inputs = [*heads, *learned.values()]
    for found, wanted in zip(*(gradients(result, inputs) for result in results), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("sample", ROTATIONS, ids=lambda sample: sample.name)
def test_rotation_rounds_once(sample: Sample, dtype: torch.dtype) -> None:
    assert isinstance(sample.encoding, Rotation)
    # Slots are float32 numbers in both computations: what is measured is the operator.
    slots = {
        name: slot.float() if slot.is_floating_point() else slot for name, slot in sample.slots().items()
    }
    exact = {name: slot.double() if slot.is_floating_point() else slot for name, slot in slots.items()}
    (heads,) = leaves(tensor(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=dtype))
    (wide,) = leaves(heads.double())
    (found,), (wanted,) = (
        rotate([heads], sample.encoding, slots),
        reference_rotate([wide], sample.encoding, exact),
    )
    assert found.dtype == dtype
    tolerance = rotate_tolerance(
        dtype, float(wide.detach().abs().max()) * 3, LARGEST_ANGLE, sample.encoding.scale
    )
    assert largest_difference(found, wanted) <= tolerance
    cotangent = tensor(*found.shape, seed=3, dtype=dtype)
    (back,) = torch.autograd.grad(found, heads, cotangent)
    (exact_back,) = torch.autograd.grad(wanted, wide, cotangent.double())
    assert back.dtype == dtype
    assert largest_difference(back, exact_back) <= tolerance


def test_rotation_in_bfloat16_keeps_float32_angles() -> None:
    """A table in bfloat16 would be off by 2^-9 of its angle; the result is the exact one rounded once."""
    heads = tensor(1, 2, 4096, 64, dtype=torch.bfloat16)
    (found,) = rotate([heads], rope(64))
    (wanted,) = reference_rotate([heads.double()], rope(64))
    rounded = wanted.to(torch.bfloat16)
    # The double rounding of float32 arithmetic may turn a tie the other way, rarely.
    assert float((found == rounded).double().mean()) > 0.98
