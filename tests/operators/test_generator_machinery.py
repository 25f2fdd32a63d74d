"""Generators inside torch: several tensors, operands that do not fit, export and the compiler."""

from __future__ import annotations

import pytest
import torch
from operator_laws import same
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Compose,
    Encoding,
    Learned,
    NonCommuting,
    Positions,
    Rank2,
    Steps,
    rope,
)
from grape_compile.errors import OperandError
from grape_compile.operators import decompositions, reference_rotate, rotate
from grape_compile.operators.samples import BATCH, GENERATORS, HEAD_DIM, HEADS, LENGTH, Sample, tensor

TIMED2 = Rank2(HEAD_DIM, Learned("w"), Positions("n"))
MIXED = NonCommuting(HEAD_DIM, Positions("n"))


def names(sample: Sample) -> str:
    return sample.name


def test_several_tensors_and_compositions() -> None:
    """Tensors of other lengths and heads turn by their own steps; parts of a composition act in order."""
    sample = GENERATORS[0]
    slots, query, key = (
        sample.slots(),
        tensor(BATCH, HEADS, 5, HEAD_DIM),
        tensor(BATCH, 1, 7, HEAD_DIM).float(),
    )
    together = rotate([query, key], sample.encoding, slots)
    for found, alone in zip(together, (query, key), strict=True):
        assert torch.equal(found, rotate([alone], sample.encoding, slots)[0])
    mixed = NonCommuting(HEAD_DIM, Steps())
    slots |= {"basis": torch.linalg.qr(tensor(HEAD_DIM, 3, seed=3)).Q, "generator": tensor(3, 3)}
    composed = Compose((sample.encoding, rope(HEAD_DIM), mixed))
    found = rotate(rotate([query], composed, slots), composed.inverse(), slots)[0]
    same(found, query)
    assert not torch.allclose(
        rotate([query], composed, slots)[0], rotate([query], composed.parts[0], slots)[0]
    )
    same(rotate([query], composed, slots)[0], reference_rotate([query], composed, slots)[0])


HEADS_OF = torch.zeros(2, 4, 9, HEAD_DIM)
N, W, A, E = torch.arange(9), torch.ones(1), torch.ones(HEAD_DIM), torch.eye(HEAD_DIM)[:, :3]
WRONG: dict[str, tuple[Encoding, dict[str, Tensor], Tensor, str, str]] = {
    "a_shape": (TIMED2, {"w": W, "n": N, "a": A[:6], "b": A}, HEADS_OF, "(6,)", "a vector [8]"),
    "a_by_token": (TIMED2, {"w": W, "n": N, "a": A.expand(9, 8), "b": A}, HEADS_OF, "(9, 8)", "[..., 1, 8]"),
    "a_heads": (TIMED2, {"w": W, "n": N, "a": A.expand(3, 1, 8), "b": A}, HEADS_OF, "(3,", "(2, 4)"),
    "a_integer": (TIMED2, {"w": W, "n": N, "a": A.long(), "b": A}, HEADS_OF, "int64", "float32"),
    "two_frequencies": (
        TIMED2,
        {"w": torch.ones(2), "n": N, "a": A, "b": A},
        HEADS_OF,
        "(2,)",
        "(2, 4, 9, 1)",
    ),
    "no_b": (TIMED2, {"w": W, "n": N, "a": A}, HEADS_OF, "no tensor named b", "a mapping with w, n, a, b"),
    "no_tokens": (TIMED2, {"w": W, "n": N[0], "a": A, "b": A}, A, "shape (8,)", "[..., T, head_dim]"),
    "head_dim": (TIMED2, {"w": W, "n": N, "a": A, "b": A}, HEADS_OF[..., :7], "(2, 4, 9, 7)", "of size 8"),
    "times": (MIXED, {"n": N[:4], "basis": E, "generator": torch.eye(3)}, HEADS_OF, "(4,)", "(2, 4, 9)"),
    "not_square": (
        MIXED,
        {"n": N, "basis": E, "generator": E},
        HEADS_OF,
        "(8, 3)",
        "a square matrix [..., 3, 3]",
    ),
    "another_rank": (
        MIXED,
        {"n": N, "basis": E, "generator": torch.eye(4)},
        HEADS_OF,
        "(4, 4)",
        "[..., 3, 3]",
    ),
    "generator_vector": (MIXED, {"n": N, "basis": E, "generator": W}, HEADS_OF, "(1,)", "a square matrix"),
    "more_columns": (
        MIXED,
        {"n": N, "basis": torch.ones(8, 9), "generator": torch.eye(9)},
        HEADS_OF,
        "(8, 9)",
        "1 to 8 columns",
    ),
    "transposed": (
        MIXED,
        {"n": N, "basis": E.mT, "generator": torch.eye(3)},
        HEADS_OF,
        "(3, 8)",
        "[..., 8, r]",
    ),
    "basis_heads": (
        MIXED,
        {"n": N, "basis": E.expand(3, 8, 3), "generator": torch.eye(3)},
        HEADS_OF,
        "(3,)",
        "(2, 4)",
    ),
    "rates_of_all": (
        NonCommuting(HEAD_DIM, Accumulated("r", True)),
        {"r": W, "basis": E, "generator": torch.eye(3)},
        HEADS_OF,
        "(1,)",
        "one rate for each token",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands(case: str) -> None:
    encoding, slots, heads, found, works = WRONG[case]
    with pytest.raises(OperandError) as caught:
        rotate([heads], encoding, slots)
    assert found in caught.value.found
    assert works in caught.value.works


class Layer(torch.nn.Module):
    """Queries and keys turned by one of the samples."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.encoding = sample.encoding

    def forward(self, query: Tensor, key: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return rotate([query, key], self.encoding, slots)


def operands(sample: Sample) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    query, key = (tensor(BATCH, HEADS, LENGTH, HEAD_DIM, seed=seed).float() for seed in (1, 2))
    return query, key, {name: sample.slots(torch.float32)[name] for name in sample.encoding.slots}


@pytest.mark.parametrize("sample", [GENERATORS[0], GENERATORS[4]], ids=names)
def test_export_keeps_one_node_that_decomposes(sample: Sample) -> None:
    inputs = operands(sample)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length}, {2: length}, dict.fromkeys(inputs[2]))
    program = torch.export.export(Layer(sample), inputs, dynamic_shapes=shapes)
    shorter = (inputs[0][:, :, :5], inputs[1][:, :, :5], inputs[2])
    plain = program.run_decompositions(decompositions())
    counts = [
        sum(str(node.target) == "grape.rotate.default" for node in each.graph.nodes)
        for each in (program, plain)
    ]
    assert counts == [1, 0]
    for each in (program, plain):
        for found, wanted in zip(each.module()(*shorter), Layer(sample)(*shorter), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("sample", [GENERATORS[1], GENERATORS[5], GENERATORS[7]], ids=names)
def test_compiled_generator_equals_eager(sample: Sample) -> None:
    """Forward and backward through one graph."""
    query, key, slots = operands(sample)
    leaves = [part.requires_grad_() for part in (query, key, *slots.values())]
    layer = Layer(sample)
    results = [function(query, key, slots) for function in (torch.compile(layer, fullgraph=True), layer)]
    cotangents = [tensor(*query.shape, seed=seed).float() for seed in (5, 6)]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(
        *(torch.autograd.grad(result, leaves, cotangents) for result in results), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
