import pytest

pytest.importorskip("tvm")

import torch
from tensorir_cases import call, compiled, double, host, operand

from grape_compile.encoding import Half, Interleaved, Positions, Rotation, rope
from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.kernels.tensorir.rotation import rotation, rotation_space, supports
from grape_compile.operators.reference import reference_rotate
from grape_compile.operators.rotation_samples import ROTATIONS
from grape_compile.operators.sample import BATCH, HEAD_DIM, HEADS, LENGTH, Sample

SAMPLES = [sample for sample in ROTATIONS if supports(sample.encoding) is True]


def bound(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """An output is two products: each rounds, as do cosine and sine (by a little more), the sum and the result."""
    own = torch.finfo(tensor.dtype).eps / 2
    return (6 * torch.finfo(torch.float32).eps + own) * scale * tensor.double().abs().amax() * 2


@pytest.mark.parametrize(
    ("sample", "dtype"),
    [
        # In the quick run each sample in one dtype.
        pytest.param(sample, dtype, id=f"{sample.name}-{dtype}", marks=marks)
        for number, sample in enumerate(SAMPLES)
        for place, dtype in enumerate((torch.float32, torch.float16, torch.float64))
        for marks in [() if (number + place) % 3 == 0 else pytest.mark.slow]
    ],
)
def test_a_tensor_turns_as_defined(sample: Sample, dtype: torch.dtype) -> None:
    assert isinstance(sample.encoding, Rotation)
    torch.manual_seed(0)
    tensor = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64).to(dtype)
    slots = sample.slots(torch.float64 if dtype == torch.float64 else torch.float32)
    written = rotation(
        sample.encoding, operand(tensor), {name: operand(slot) for name, slot in slots.items()}, host()
    )
    inputs = [tensor, *(slots[name] for name in sample.encoding.slots)]
    found = call(compiled(written, "rotate"), inputs, torch.zeros_like(tensor))
    (wanted,) = reference_rotate([tensor.double()], sample.encoding, double(slots))
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().amax()
    if dtype == torch.float64:
        assert error <= 1e-14 * tensor.abs().amax() * max(sample.encoding.scale, 1.0) * 4
    else:
        assert error <= bound(tensor, max(sample.encoding.scale, 1.0))


def test_one_function_serves_every_length_and_batch() -> None:
    encoding = Rotation(Half(16), rope(16).spectrum, Positions("positions"))
    names = {0: "batch", 2: "length"}
    example = torch.zeros(2, 4, 8, 16)
    slots = {"positions": Operand(("batch", 1, "length"), "int64")}
    function = compiled(rotation(encoding, operand(example, names), slots, host()), "rotate")
    for batch, length in ((1, 1), (2, 15), (3, 33)):
        tensor = torch.randn(batch, 4, length, 16)
        positions = torch.randint(0, 100_000, (batch, 1, length))
        found = call(function, [tensor, positions], torch.zeros_like(tensor))
        (wanted,) = reference_rotate([tensor.double()], encoding, {"positions": positions})
        assert (found.double() - wanted).abs().amax() <= bound(tensor, 1.0)


@pytest.mark.parametrize("planes", [Half(12), Interleaved(12)], ids=str)
def test_every_point_of_the_space_is_the_same_function(planes: Half | Interleaved) -> None:
    encoding = Rotation(planes, rope(12).spectrum, rope(12).clock)
    tensor = torch.randn(1, 3, 21, 12)
    space = rotation_space(encoding, operand(tensor), {}, host())
    points = space.candidates()
    assert points[0] == space.hand
    assert len(points) == len({tuple(point.items()) for point in points}) == 28
    (wanted,) = reference_rotate([tensor.double()], encoding)
    for point in points[::9]:
        found = call(compiled(space.write(point), "rotate"), [tensor], torch.zeros_like(tensor))
        assert (found.double() - wanted).abs().amax() <= bound(tensor, 1.0)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(OperandError, match="a last axis of 16"):
        rotation(rope(16), Operand((1, 4, 8, 12)), {}, host())
    with pytest.raises(OperandError, match="product of matrices"):
        rotation(
            Rotation(Half(4), rope(4).spectrum, rope(4).clock, basis="basis"), Operand((2, 4)), {}, host()
        )
    with pytest.raises(OperandError, match="none named positions"):
        rotation(Rotation(Half(4), rope(4).spectrum, Positions("positions")), Operand((2, 4)), {}, host())
