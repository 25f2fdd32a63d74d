"""RMSNorm and rotation in one pass: by the kernel and by torch operations, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_cases import DEVICE, kernels_only, rounding, worst
from operator_errors import gradients, leaves

from grape_compile.encoding import (
    Geometric,
    Half,
    Interleaved,
    Learned,
    Pairs,
    Partial,
    Planes,
    Positions,
    Rotation,
)
from grape_compile.errors import OperandError
from grape_compile.operators import reference_rotate, rotate_normed
from grape_compile.operators.sample import tensor
from grape_compile.operators.turn_call import Place

PLANES = (Half(16), Interleaved(16), Partial(Half(8), 4, 16), Pairs(((0, 3), (5, 1), (2, 7)), 16))
PLACES: tuple[Place, ...] = ("before", "after", "across")


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "torch":
        yield
        return
    with kernels_only():
        yield


def norm(heads: Tensor, weight: Tensor, place: Place, epsilon: float, offset: float) -> Tensor:
    axes = (1, 3) if place == "across" else (3,)
    weight = weight.reshape(heads.shape[1], 1, 16) if place == "across" else weight
    return heads / (heads.square().mean(axes, keepdim=True) + epsilon).sqrt() * (weight + offset)


def defined(
    given: list[Tensor], weights: list[Tensor], encoding: Rotation, slots: dict[str, Tensor], place: Place
) -> list[Tensor]:
    if place == "after":
        turned = reference_rotate(given, encoding, slots)
        return [norm(*each, place, 1e-5, 1.0) for each in zip(turned, weights, strict=True)]
    return list(
        reference_rotate(
            [norm(*each, place, 1e-5, 1.0) for each in zip(given, weights, strict=True)], encoding, slots
        )
    )


def operands(place: Place, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Queries of four heads, keys of two, as projections leave them, and their weights."""
    given = [
        tensor(2, 7, heads, 16, dtype=dtype, seed=seed).to(DEVICE).transpose(1, 2)
        for seed, heads in ((1, 4), (2, 2))
    ]
    sizes = [16 * heads.shape[1] if place == "across" else 16 for heads in given]
    return given, [tensor(size, dtype=dtype, seed=3).to(DEVICE) for size in sizes]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("planes", PLANES, ids=str)
def test_normed_as_defined(planes: Planes, place: Place, dtype: torch.dtype) -> None:
    encoding = Rotation(planes, Geometric(100.0), Positions("n"), scale=1.25)
    slots = {"n": torch.arange(7, device=DEVICE)}
    given, weights = operands(place, dtype)
    found = rotate_normed(given, weights, encoding, slots, epsilon=1e-5, place=place, offset=1.0)
    wanted = defined(
        [each.double() for each in given], [each.double() for each in weights], encoding, slots, place
    )
    assert [each.dtype for each in found] == [dtype] * 2
    largest = max(float(each.abs().max()) for each in wanted)
    # One rounding to the dtype, and 16 + 4 of float32 on the way.
    assert worst(found, wanted) <= largest * (rounding(dtype) + 40 * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("place", PLACES)
def test_gradients(place: Place) -> None:
    encoding = Rotation(Partial(Half(8), 4, 16), Learned("theta"), Positions("n"))
    theta = tensor(4, dtype=torch.float32, seed=5).to(DEVICE)
    positions = torch.arange(7, device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.float64):
        given, weights = (leaves(*(each.to(dtype) for each in group)) for group in operands(place))
        (learned,) = leaves(theta.to(dtype))
        slots = {"theta": learned, "n": positions}
        turned = (
            rotate_normed(given, weights, encoding, slots, epsilon=1e-5, place=place, offset=1.0)
            if dtype == torch.float32
            else defined(given, weights, encoding, slots, place)
        )
        results.append(gradients(turned, [*given, *weights, learned]))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_float64_is_exact() -> None:
    encoding = Rotation(Half(16), Geometric(100.0), Positions("n"))
    slots = {"n": torch.arange(7, device=DEVICE)}
    for place in PLACES:
        given, weights = operands(place, torch.float64)
        found = rotate_normed(given, weights, encoding, slots, epsilon=1e-5, place=place, offset=1.0)
        assert worst(found, defined(given, weights, encoding, slots, place)) < 1e-12


@pytest.mark.parametrize(
    ("size", "place"), [(16, "across"), (64, "before"), (16, "beside")], ids=["size", "heads", "place"]
)
def test_operands_that_do_not_fit(size: int, place: Place) -> None:
    given = torch.zeros(2, 4, 7, 16, device=DEVICE)
    encoding = Rotation(Half(16), Geometric(100.0), Positions("n"))
    with pytest.raises(OperandError, match=r"RMSNorm"):
        rotate_normed(
            [given],
            [torch.zeros(size, device=DEVICE)],
            encoding,
            {"n": torch.arange(7, device=DEVICE)},
            epsilon=0.0,
            place=place,
        )


def test_compiles_to_one_graph() -> None:
    encoding = Rotation(Half(16), Geometric(100.0), Positions("n"))
    given, weights = operands("before")
    slots = {"n": torch.arange(7, device=DEVICE)}

    def layer(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        return rotate_normed([query, key], weights, encoding, slots, epsilon=1e-5)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert worst(compiled(*given), layer(*given)) < 1e-6
