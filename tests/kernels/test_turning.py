"""The kernel turns as the definitions say: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_cases import DEVICE, kernels_only, on_device, rounding, worst
from operator_errors import gradients, leaves

from grape_compile.encoding import (
    Accumulated,
    Geometric,
    Half,
    Interleaved,
    Learned,
    Partial,
    Positions,
    Rank2,
    Rotation,
    Steps,
    Table,
    Tables,
    rope,
)
from grape_compile.errors import OperandError
from grape_compile.kernels import turning
from grape_compile.operators import reference_rotate, rotate, rotate_into
from grape_compile.operators.samples import (
    BATCH,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    ROTATIONS,
    Sample,
    generator_tolerance,
    rotate_tolerance,
    tensor,
)
from grape_compile.operators.turn_call import TurnCall

#: Positions stay below 60 and frequencies below 1 radian per position.
LARGEST_ANGLE = 60.0
NARROW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def by_kernel() -> Iterator[None]:
    with kernels_only():
        yield


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return tensor(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("sample", ROTATIONS, ids=lambda sample: sample.name)
def test_turns_as_defined(sample: Sample, dtype: torch.dtype) -> None:
    assert isinstance(sample.encoding, Rotation)
    slots, exact = on_device(sample.slots(), torch.float32), on_device(sample.slots(), torch.float32)
    exact = {name: slot.double() if slot.is_floating_point() else slot for name, slot in exact.items()}
    given = [heads(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2)]
    found = rotate(given, sample.encoding, slots)
    wanted = reference_rotate([each.double() for each in given], sample.encoding, exact)
    assert all(each.dtype == dtype and each.is_contiguous() for each in found)
    largest = max(float(each.abs().max()) for each in given) * (3 if sample.encoding.basis else 1)
    assert worst(found, wanted) <= rotate_tolerance(dtype, largest, LARGEST_ANGLE, sample.encoding.scale)


RANK2 = tuple(sample for sample in GENERATORS if isinstance(sample.encoding, Rank2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", RANK2, ids=lambda sample: sample.name)
def test_turns_in_the_plane_of_two_vectors(sample: Sample, dtype: torch.dtype) -> None:
    slots = on_device(sample.slots(), torch.float32)
    exact = {name: slot.double() if slot.is_floating_point() else slot for name, slot in slots.items()}
    given = [heads(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2)]
    found = rotate(given, sample.encoding, slots)
    wanted = reference_rotate([each.double() for each in given], sample.encoding, exact)
    largest = max(float(each.abs().max()) for each in given)
    assert worst(found, wanted) <= generator_tolerance(dtype, largest) + largest * rounding(dtype)


@pytest.mark.parametrize("sample", [*ROTATIONS, *RANK2], ids=lambda sample: sample.name)
def test_gradients(sample: Sample) -> None:
    """Of tensors and all floating slots, against autograd through the definition in float64."""
    slots = on_device(sample.slots(), torch.float32)
    given = [heads(BATCH, HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (1, 2)]
    results = []
    for function, dtype in ((rotate, torch.float32), (reference_rotate, torch.float64)):
        tensors = leaves(*(each.to(dtype) for each in given))
        learned = {
            name: leaves(slot.to(dtype))[0] if slot.is_floating_point() else slot
            for name, slot in slots.items()
        }
        floats = [slot for slot in learned.values() if slot.is_floating_point()]
        turned = function(tensors, sample.encoding, learned)
        results.append(gradients(turned, [*tensors, *floats]))
    for found, wanted in zip(*results, strict=True):
        # Sums of BATCH * HEADS * LENGTH * HEAD_DIM products of numbers and positions up to 50.
        torch.testing.assert_close(
            found.double(), wanted, rtol=1e-4, atol=1e-3 * float(wanted.abs().max() + 1) / 10
        )


LAYOUTS = {
    "tokens last": (2, 3, 1),
    "heads last": (2, 1, 3),
}


def both(length: int, size: int, layout: str, *, query: int = 4, key: int = 2) -> list[Tensor]:
    """Queries and keys [B, H, T, D], in memory [B, H, T, D] or [B, T, H, D], cut out of wider tensors."""
    made = []
    for seed, count in ((1, query), (2, key)):
        if layout == "heads last":
            made.append(heads(2, length, count, size + 8, seed=seed)[..., :size].transpose(1, 2))
        else:
            made.append(heads(2, count, length, size + 8, seed=seed)[..., 8:])
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 5, 37])
@pytest.mark.parametrize(
    "planes",
    [Half(16), Interleaved(16), Half(12), Partial(Half(8), 0, 20), Partial(Interleaved(6), 10, 20)],
    ids=str,
)
def test_one_launch_for_ragged_grouped_views(planes: Half, length: int, layout: str) -> None:
    encoding = Rotation(planes, Geometric(100.0), Positions("n"), orientation=-1, scale=1.5)
    given = both(length, planes.head_dim, layout)
    assert not any(each.is_contiguous() for each in given)
    slots = {"n": torch.arange(2 * length, device=DEVICE).reshape(2, 1, length)}
    call = TurnCall(tuple(given), encoding, slots)
    outputs = [torch.empty_like(each) for each in given]
    assert len(list(turning.launches(call, outputs))) == 1
    wanted = reference_rotate([each.double() for each in given], encoding, slots)
    assert worst(rotate(given, encoding, slots), wanted) <= rotate_tolerance(torch.float32, 4.0, 80.0, 1.5)


def test_the_other_order_of_axes() -> None:
    """[B, T, H, D] with positions [B, T, 1] is the same rotation."""
    encoding = Rotation(Half(16), Geometric(100.0), Positions("n"))
    given = [each.transpose(1, 2) for each in both(9, 16, "heads last")]
    slots = {"n": torch.arange(18, device=DEVICE).reshape(2, 9, 1)}
    call = TurnCall(tuple(given), encoding, slots)
    assert len(list(turning.launches(call, [torch.empty_like(each) for each in given]))) == 1
    wanted = reference_rotate([each.double() for each in given], encoding, slots)
    assert worst(rotate(given, encoding, slots), wanted) <= rotate_tolerance(torch.float32, 4.0, 20.0)


@pytest.mark.parametrize("planes", [Half(16), Interleaved(16), Partial(Half(8), 4, 24)], ids=str)
def test_in_place(planes: Half) -> None:
    """What stays where it is need not be moved: the rest of a partly turned head is not even read."""
    encoding = Rotation(planes, Geometric(100.0), Steps())
    given = both(11, planes.head_dim, "heads last")
    wanted = rotate(given, encoding)
    (launch,) = turning.launches(TurnCall(tuple(given), encoding, {}), given)
    assert launch.arguments["REST_0"] == launch.arguments["REST_1"] == 0
    rotate_into(given, given, encoding)
    # A compiler may contract the sums of two kernels differently: one rounding of a product.
    assert worst(given, wanted) <= 8 * torch.finfo(torch.float32).eps


def test_planes_that_move_refuse_to_turn_in_place() -> None:
    encoding = Rotation(Interleaved(16), Geometric(100.0), Steps(), out=Half(16))
    given = both(3, 16, "heads last")
    with pytest.raises(OperandError, match="planes that move"):
        rotate_into(given, given, encoding)
    with pytest.raises(OperandError, match="share memory"):
        rotate_into([given[0].flip(0), given[0][:, :2]], given, rope(16))


def test_into_a_cache() -> None:
    """A key can be turned straight into its place among the keys so far."""
    query, key = both(3, 16, "heads last")
    cache = torch.zeros(2, 2, 10, 16, device=DEVICE)
    turned = torch.empty_like(query)
    slots = {"n": torch.arange(5, 8, device=DEVICE)}
    encoding = Rotation(Half(16), Geometric(100.0), Positions("n"))
    rotate_into([turned, cache[:, :, 5:8]], [query, key], encoding, slots)
    wanted = rotate([query, key], encoding, slots)
    assert torch.equal(turned, wanted[0])
    assert torch.equal(cache[:, :, 5:8], wanted[1])
    assert not cache[:, :, :5].any()
    assert not cache[:, :, 8:].any()


#: Frequencies of Llama 3: the slowest turns once in two million positions.
FAR = Geometric(500000.0)


@pytest.mark.parametrize("position", [0, 4095, 131_071, 1_000_000 - 8, 1_000_000, 10_000_000])
def test_float64_positions_are_exact_everywhere(position: int) -> None:
    """Within 1e-6 on unit vectors; every angle is computed modulo one turn in whole numbers."""
    encoding = Rotation(Half(128), FAR, Positions("n"))
    given = torch.nn.functional.normalize(heads(1, 2, 8, 128, seed=3), dim=-1)
    slots = {"n": (position + torch.arange(8, dtype=torch.float64)).to(DEVICE)}
    (found,) = rotate([given], encoding, slots)
    (wanted,) = reference_rotate([given.double()], encoding, slots)
    assert worst([found], [wanted]) <= 1e-6


@pytest.mark.parametrize("position", [0.25, -3.5, 1234.567, -1_000_000.125, 3e8])
def test_real_positions_are_exact_too(position: float) -> None:
    encoding = Rotation(Interleaved(32), Table("f"), Positions("n"))
    given = torch.nn.functional.normalize(heads(1, 2, 5, 32, seed=3), dim=-1)
    slots = {
        "n": (position + torch.arange(5, dtype=torch.float64) / 7).to(DEVICE),
        "f": torch.tensor([9.5, 3.2, *FAR.frequencies(14)], dtype=torch.float64, device=DEVICE),
    }
    (found,) = rotate([given], encoding, slots)
    (wanted,) = reference_rotate([given.double()], encoding, slots)
    assert worst([found], [wanted]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_other_positions_are_those_of_the_model(dtype: torch.dtype) -> None:
    """One product in float32, as models compute it: the same angle, its cosine and sine within 1e-6."""
    encoding = Rotation(Half(128), Table("f"), Positions("n"))
    given = torch.nn.functional.normalize(heads(1, 2, 8, 128, seed=3), dim=-1)
    positions = torch.tensor([0, 1, 2047, 40_001, 131_071, 999_983, 1_000_000, 5_000_000], device=DEVICE)
    frequencies = torch.tensor(FAR.frequencies(64), device=DEVICE)
    (found,) = rotate([given], encoding, {"n": positions.to(dtype), "f": frequencies})
    angle = (positions.float()[:, None] * frequencies).double()
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    (wanted,) = reference_rotate([given.double()], Rotation(Half(128), None, Tables()), tables)
    assert worst([found], [wanted]) <= 1e-6


def test_angles_beyond_float32_keep_lengths() -> None:
    """Where float32 numbers are further apart than a turn no angle is meant; nothing grows, and NaN stays NaN."""
    encoding = Rotation(Half(4), Table("f"), Positions("n"))
    far = torch.tensor([3e7, 1e10, 1e20, 3e38], device=DEVICE)
    given = torch.ones(1, 1, 4, 4, device=DEVICE)
    (found,) = rotate([given], encoding, {"n": far, "f": torch.ones(2, device=DEVICE)})
    assert float((found.norm(dim=-1) - 2).abs().max()) < 1e-2
    (lost,) = rotate([given], encoding, {"n": far * torch.inf, "f": torch.ones(2, device=DEVICE)})
    assert bool(lost.isnan().all())


def test_inverse_and_origin() -> None:
    encoding = rope(16)
    given = heads(1, 2, 9, 16)
    (turned,) = rotate([given], encoding)
    (back,) = rotate([turned], encoding.inverse())
    assert worst([back], [given]) < 1e-6
    assert torch.equal(turned[:, :, 0], given[:, :, 0])


def test_learned_phases_of_a_running_sum() -> None:
    """Rates are summed in float64, and the sum turns exactly."""
    encoding = Rotation(Half(8), Learned("theta"), Accumulated("rates", True))
    rates = torch.full((1, 1, 4096), 1000.1, device=DEVICE)
    theta = torch.tensor([1.0, 0.5, 0.25, 0.125], device=DEVICE)
    given = torch.nn.functional.normalize(heads(1, 1, 4096, 8), dim=-1)
    (found,) = rotate([given], encoding, {"theta": theta, "rates": rates})
    exact = {"theta": theta.double(), "rates": rates.double()}
    (wanted,) = reference_rotate([given.double()], encoding, exact)
    assert worst([found], [wanted]) <= 1e-6


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.zeros(2, 4, 8, dtype=torch.float64), "float64"),
        (torch.zeros(8, 4, 2).transpose(0, 2), "neighbours in memory"),
        (torch.zeros(2, 2, 2, 2, 4, 8), "more than two"),
    ],
    ids=["float64", "strides", "axes"],
)
def test_refusals_say_why(given: Tensor, sentence: str) -> None:
    assert sentence in str(turning.supports(TurnCall((given,), rope(8), {})))
