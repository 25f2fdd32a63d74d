"""What only hardware shows: sizes no interpreter gets through, all dtypes, graphs that Inductor compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_cases import worst

from grape_compile.encoding import (
    Geometric,
    Half,
    Interleaved,
    Learned,
    Partial,
    Planes,
    Positions,
    Rotation,
    Table,
)
from grape_compile.operators import providers, reference_rotate, rotate, rotate_into, rotate_normed
from grape_compile.operators.sample import tensor
from grape_compile.operators.samples import rotate_tolerance
from grape_compile.operators.turn_call import TurnCall

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PLANES = (Half(128), Interleaved(128), Half(64), Partial(Half(32), 0, 80), Half(96))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(length: int, size: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Queries of eight heads and keys of two, as projections leave them."""
    return [
        tensor(batch, length, heads, size, dtype=dtype, seed=seed).cuda().transpose(1, 2)
        for seed, heads in ((1, 8), (2, 2))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 1023, 4096])
@pytest.mark.parametrize("planes", PLANES, ids=str)
def test_turns_as_defined(planes: Planes, length: int, dtype: torch.dtype) -> None:
    encoding = Rotation(planes, Geometric(10000.0), Positions("n"))
    given, slots = layer(length, planes.head_dim, dtype), {"n": torch.arange(length, device="cuda")}
    assert providers.choose_turn(TurnCall(tuple(given), encoding, slots)).name == "triton"
    found = rotate(given, encoding, slots)
    wanted = reference_rotate([each.double() for each in given], encoding, slots)
    largest = max(float(each.abs().max()) for each in given)
    assert worst(found, wanted) <= rotate_tolerance(dtype, largest, float(length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_positions(dtype: torch.dtype) -> None:
    """Every position up to a million, exactly; offsets beyond 2^31 elements where the memory allows."""
    encoding = Rotation(Half(128), Geometric(500000.0), Positions("n"))
    given = torch.nn.functional.normalize(tensor(1, 1, 2**20, 128).cuda(), dim=-1).to(dtype)
    slots = {"n": torch.arange(2**20, dtype=torch.float64, device="cuda")}
    (found,) = rotate([given], encoding, slots)
    (wanted,) = reference_rotate([given.double()], encoding, slots)
    assert worst([found], [wanted]) <= 1e-6 + torch.finfo(dtype).eps


def test_offsets_beyond_32_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    given = torch.ones(1, 2**20, 32, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    encoding = Rotation(Half(128), Geometric(500000.0), Positions("n"))
    (found,) = rotate([given], encoding, {"n": torch.arange(2**20, dtype=torch.float64, device="cuda")})
    last = {"n": torch.arange(2**20 - 8, 2**20, dtype=torch.float64, device="cuda")}
    (wanted,) = reference_rotate([given[:, -1:, -8:].double()], encoding, last)
    assert worst([found[:, -1:, -8:]], [wanted]) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_right_and_the_same_each_time(dtype: torch.dtype) -> None:
    encoding = Rotation(Half(128), Learned("theta"), Positions("n"))
    slots = {"n": torch.arange(2048, device="cuda")}
    results = []
    ways: tuple[tuple[Any, torch.dtype], ...] = (
        (rotate, dtype),
        (rotate, dtype),
        (reference_rotate, torch.float64),
    )
    for function, kind in ways:
        given = [each.to(kind).requires_grad_() for each in layer(2048, 128, dtype)]
        theta = torch.tensor(Geometric(10000.0).frequencies(64), device="cuda", dtype=torch.float32)
        theta = (theta if kind != torch.float64 else theta.double()).requires_grad_()
        turned = function(given, encoding, {**slots, "theta": theta})
        cotangents = [tensor(*each.shape, seed=7, dtype=dtype).cuda().to(kind) for each in turned]
        results.append(torch.autograd.grad(turned, [*given, theta], cotangents))
    assert all(torch.equal(one, two) for one, two in zip(results[0], results[1], strict=True))
    for found, wanted in zip(results[0], results[2], strict=True):
        largest = float(wanted.abs().max())
        assert worst([found], [wanted]) <= largest * (2 * torch.finfo(dtype).eps + 1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_the_launches(dynamic: bool) -> None:
    text = str(Rotation(Half(64), Table("theta"), Positions("n")))
    theta = torch.tensor(Geometric(10000.0).frequencies(32), device="cuda")

    def turned(query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
        one, two = torch.ops.grape.rotate([query * 2, key], [theta, positions], text)
        product: Tensor = one @ two.repeat_interleave(4, 1).mT
        return product

    compiled = torch.compile(turned, fullgraph=True, dynamic=dynamic)
    for length in (128, 200):
        query, key = (each.requires_grad_() for each in layer(length, 64, torch.bfloat16))
        positions = torch.arange(length, device="cuda")
        found, wanted = compiled(query, key, positions), turned(query, key, positions)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0.5)
        cotangent = torch.ones_like(wanted)
        pairs = zip(
            torch.autograd.grad(found, (query, key), cotangent),
            torch.autograd.grad(wanted, (query, key), cotangent),
            strict=True,
        )
        for one, two in pairs:
            torch.testing.assert_close(one, two, rtol=2e-2, atol=1.0)


def test_in_place_and_into_a_cache() -> None:
    encoding = Rotation(Half(128), Geometric(10000.0), Positions("n"))
    slots = {"n": torch.arange(37, device="cuda")}
    query, key = layer(37, 128, torch.bfloat16)
    wanted = rotate([query, key], encoding, slots)
    cache = torch.zeros(2, 2, 64, 128, dtype=torch.bfloat16, device="cuda")
    rotate_into([query, cache[:, :, 10:47]], [query, key], encoding, slots)
    assert torch.equal(query, wanted[0])
    assert torch.equal(cache[:, :, 10:47], wanted[1])
    assert not cache[:, :, :10].any()


def test_normed_layers() -> None:
    encoding = Rotation(Half(128), Geometric(10000.0), Positions("n"))
    slots = {"n": torch.arange(300, device="cuda")}
    given = layer(300, 128, torch.bfloat16)
    weights = [tensor(128, dtype=torch.bfloat16, seed=5).cuda() for _ in given]
    found = rotate_normed(given, weights, encoding, slots, epsilon=1e-6)
    normed = [
        each.double() * torch.rsqrt(each.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        for each, weight in zip(given, weights, strict=True)
    ]
    wanted = reference_rotate(normed, encoding, slots)
    largest = max(float(each.abs().max()) for each in wanted)
    assert worst(found, wanted) <= largest * torch.finfo(torch.bfloat16).eps
