"""A million contextual rates: the phase loses nothing that an angle could show, and neither do the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Encoding,
    Geometric,
    Half,
    Learned,
    NonCommuting,
    Positions,
    Rank2,
    Rotation,
)
from grape_compile.operators import rotate
from grape_compile.operators.angles import accumulate, accumulate_gradient

TOKENS = 1_000_000
#: Cosine, sine and result are rounded to float32 once each, the angle is not: 3 u of numbers up to 1.
TOLERANCE = 3 * 2.0**-24


def rates(scale: float) -> Tensor:
    """float32 numbers below `scale`, whole multiples of 2^-24 scale."""
    return torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) * scale


def exact_phases(filled: Tensor, scale: float, inclusive: bool) -> Tensor:
    """Running sums in whole numbers."""
    whole = (filled.double() * (2**24 / scale)).round().to(torch.int64)
    sums = whole.cumsum(0) if inclusive else whole.cumsum(0) - whole
    return sums.double() * (scale / 2**24)


@pytest.mark.parametrize("inclusive", [True, False], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10], ids=["large", "as_trained"])
@pytest.mark.parametrize("spectrum", [Geometric(10000.0), Learned("theta")], ids=["closed", "learned"])
def test_cosine_and_sine_after_a_million_tokens(
    spectrum: Geometric | Learned, scale: float, inclusive: bool
) -> None:
    encoding = Rotation(Half(4), spectrum, Accumulated("rates", inclusive))
    filled = rates(scale)
    theta = torch.tensor(Geometric(10000.0).frequencies(2), dtype=torch.float64)
    slots = {"rates": filled, "theta": theta.float()}
    # The first coordinates are 1 and the others 0: what comes out are the cosines, then the sines.
    heads = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(TOKENS, 4)
    (found,) = rotate([heads], encoding, slots)
    angles = exact_phases(filled, scale, inclusive)[:, None] * (
        slots["theta"].double() if isinstance(spectrum, Learned) else theta
    )
    wanted = torch.cat([angles.cos(), angles.sin()], -1)
    assert found.dtype == torch.float32
    assert float((found.double() - wanted).abs().max()) <= TOLERANCE < 1e-6


def test_float64_positions_are_as_exact() -> None:
    """Phases that a cache has summed already."""
    filled = rates(1.0)
    heads = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(TOKENS, 4)
    spectrum = Geometric(10000.0)
    found = rotate([heads], Rotation(Half(4), spectrum, Accumulated("n", True)), {"n": filled})
    cached = exact_phases(filled, 1.0, True)
    assert torch.equal(
        found[0], rotate([heads], Rotation(Half(4), spectrum, Positions("n")), {"n": cached})[0]
    )


GENERATED: dict[str, tuple[Encoding, dict[str, Tensor]]] = {
    "rank2": (
        Rank2(2, Geometric(1.0), Accumulated("rates", False)),
        {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, 0.0])},
    ),
    "non_commuting": (
        NonCommuting(2, Accumulated("rates", False)),
        {"basis": torch.eye(2), "generator": torch.tensor([[0.0, -1.0], [1.0, 0.0]])},
    ),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generators_after_a_million_tokens(name: str) -> None:
    """One plane that turns by the phase; G - I is rounded where a rotation rounds G, which is twice as large."""
    encoding, slots = GENERATED[name]
    filled = rates(1.0)
    heads = torch.tensor([1.0, 0.0]).expand(TOKENS, 2)
    (found,) = rotate([heads], encoding, {**slots, "rates": filled})
    angles = exact_phases(filled, 1.0, False)
    wanted = torch.stack([angles.cos(), angles.sin()], -1)
    assert float((found.double() - wanted).abs().max()) <= 2 * TOLERANCE < 1e-6


def test_gradients_of_a_million_rates() -> None:
    """Sums from the end, of float32 terms with a relative error of 8 u each, in float64: no error of their own."""
    encoding = Rotation(Half(4), Geometric(10000.0), Accumulated("rates", True))
    filled = rates(1.0)
    random = torch.Generator().manual_seed(1)
    heads, cotangent = (torch.randn(TOKENS, 4, generator=random) for _ in range(2))
    gradients: list[Tensor] = []
    for dtype in (torch.float32, torch.float64):
        leaf = filled.to(dtype).requires_grad_()
        (turned,) = rotate([heads.to(dtype)], encoding, {"rates": leaf})
        gradients += torch.autograd.grad(turned, leaf, cotangent.to(dtype))
    found, wanted = gradients
    largest = float(heads.abs().max() * cotangent.abs().max()) * 2
    # Errors of many terms have either sign: a random walk of TOKENS steps, six deviations long.
    walk = 6 * TOKENS**0.5 * 8 * 2.0**-24 * largest
    assert float((found.double() - wanted).abs().max()) <= walk + 2.0**-24 * float(wanted.abs().max())


def test_sums_are_float64_and_exact() -> None:
    clock, filled = Accumulated("rates", True), rates(1.0)
    total = accumulate(clock, filled, (TOKENS,))
    assert total.dtype == torch.float64
    assert torch.equal(total, exact_phases(filled, 1.0, True))
    back = accumulate_gradient(clock, filled)
    assert torch.equal(back, exact_phases(filled.flip(0), 1.0, True).flip(0))
    assert accumulate(Positions("n"), filled, (TOKENS,)) is filled


def test_bfloat16_heads_have_exact_phases_too() -> None:
    encoding = Rotation(Half(4), Geometric(10000.0), Accumulated("rates", False))
    filled = rates(1.0)
    heads = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(TOKENS, 4)
    (narrow,), (wide,) = (rotate([part], encoding, {"rates": filled}) for part in (heads.bfloat16(), heads))
    assert torch.equal(narrow, wide.bfloat16())
