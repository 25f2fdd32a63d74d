"""What weights do in place of a map of their result: the order of a rotation's coordinates, an orthogonal basis."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from onnx_samples import File

from grape_compile.encoding import Geometric, Half, Interleaved, Partial, Rotation, Steps
from grape_compile.export.onnx.builder import Builder
from grape_compile.export.onnx.emit_rotation import rotate
from grape_compile.export.onnx.targets import TARGETS, Target
from grape_compile.operators import reference_rotate

HEADS, WIDTH, HIDDEN, TOKENS = 2, 12, 16, 5
#: Coordinates that do not turn, in front of those that do.
BEFORE = 4
PLANES = Partial(Interleaved(WIDTH - BEFORE), BEFORE, WIDTH)
PLACES = Partial(Half(WIDTH - BEFORE), BEFORE, WIDTH)
TURNED = Rotation(PLANES, Geometric(10000.0), Steps(), out=PLACES)
IN_A_BASIS = Rotation(PLACES, Geometric(10000.0), Steps(), basis="basis")


def _file(target: Target) -> tuple[File, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(2, TOKENS, HIDDEN, generator=random)}
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random))
    constants = {
        "weight": torch.randn(HIDDEN, HEADS * WIDTH, generator=random),
        "bias": torch.randn(HEADS * WIDTH, generator=random),
        "basis": basis,
    }
    return File(tensors, constants, target), {**tensors, **constants}


def _projected(builder: Builder, values: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """The heads [B, H, T, D] of a projection with a bias, and the projection."""
    flat = builder.binary("Add", builder.matmul(values["x"], values["weight"]), values["bias"])
    apart = builder.reshape(flat, (0, 0, HEADS, WIDTH), (2, TOKENS, HEADS, WIDTH))
    return builder.transpose(apart, 0, 2, 1, 3), flat


@pytest.mark.parametrize("seen_elsewhere", [False, True], ids=["alone", "seen elsewhere"])
@pytest.mark.parametrize("rotation", [TURNED, IN_A_BASIS], ids=["order", "basis"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_a_projection_makes_what_a_rotation_wants(
    target: Target, rotation: Rotation, seen_elsewhere: bool
) -> None:
    """Who else reads the projection gets what it read before: then nothing is folded."""
    file, tensors = _file(target)
    heads, flat = _projected(file.builder, file.values)
    other = file.builder.same("Neg", flat) if seen_elsewhere else None
    slots = {"basis": file.values["basis"]} if rotation.basis else {}
    emitted = rotate(file.builder, [heads], rotation, slots, target)
    if other is not None:
        file.graph.outputs.append(other)
    kinds = Counter(node.op_type for node in file.graph)
    found = [torch.from_numpy(each).double() for each in file.run(emitted)]
    projected = tensors["x"].double() @ tensors["weight"].double() + tensors["bias"].double()
    if other is not None:
        assert float((found.pop(0) + projected).abs().max()) <= 1e-5
    else:
        assert (kinds["MatMul"], kinds["Transpose"], kinds["Gather"]) == (1, 1, 0)
        assert [name for name in file.graph.initializers if str(name).endswith(".folded")]
    (expected,) = reference_rotate(
        [projected.reshape(2, TOKENS, HEADS, WIDTH).transpose(1, 2)],
        rotation,
        {"basis": tensors["basis"].double()} if rotation.basis else {},
    )
    assert float((found[0] - expected).abs().max()) <= 1e-5
