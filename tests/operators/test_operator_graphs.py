"""The operators in graphs: exported, decomposed, compiled, as fake tensors; a graph plans for what is computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import (  # type: ignore[import-untyped]  # torch ships it without annotations
    aot_module_simplified,
    make_boxed_func,
)
from operator_errors import heads, leaves, named
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Learned, Positions, Rotation, Steps, alibi, nope, rope
from grape_compile.operators import attend, decompositions, rotate
from grape_compile.operators.samples import (
    BATCH,
    BIASES,
    COMPOSITIONS,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    PATHS,
    ROTATIONS,
    Sample,
    tensor,
)


class Layer(torch.nn.Module):
    """Rotated queries and keys under ALiBi."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        turned_query, turned_key = rotate([query, key], rope(HEAD_DIM))
        return attend(turned_query, turned_key, value, alibi(HEADS), is_causal=True)


def exported() -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=2, max=64)
    parts = [part.float() for part in heads(HEADS)]
    return torch.export.export(Layer(), tuple(parts), dynamic_shapes=[{2: length}] * 3)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_export_keeps_the_nodes() -> None:
    program = exported()
    assert targets(program).count("grape.rotate.default") == 1
    assert targets(program).count("grape.attend.default") == 1
    assert "grape.rotate.default" in targets(program.run_decompositions({}))
    shorter = [part.float()[:, :, :5] for part in heads(HEADS)]
    torch.testing.assert_close(program.module()(*shorter), Layer()(*shorter))


@pytest.mark.parametrize(
    "sample",
    [
        *named(BIASES, "fox", "gated_both"),
        *named(PATHS, "grape_ap", "rope_grape_ap"),
        *named(COMPOSITIONS, "dictionary", "contextual_fox"),
    ],
    ids=lambda sample: sample.name,
)
def test_an_exported_bias_is_one_node_and_reads_back(sample: Sample, tmp_path: Path) -> None:
    names = sample.encoding.slots

    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *slots: Tensor) -> Tensor:
            filled = dict(zip(names, slots, strict=True))
            return attend(query, key, value, sample.encoding, filled, is_causal=True)

    parts = (*heads(HEADS), *(sample.slots()[name] for name in names))
    program = torch.export.export(Attention(), parts)
    assert targets(program).count("grape.attend.default") == 1
    torch.export.save(program, tmp_path / "attention.pt2")
    found = torch.export.load(tmp_path / "attention.pt2").module()(*parts)
    torch.testing.assert_close(found, Attention()(*parts), rtol=1e-12, atol=1e-12)


def test_decompositions_leave_plain_aten() -> None:
    program = exported().run_decompositions(decompositions())
    assert "grape.rotate.default" not in targets(program)
    shorter = [part.float()[:, :, :5] for part in heads(HEADS)]
    torch.testing.assert_close(program.module()(*shorter), Layer()(*shorter))


@pytest.mark.parametrize("sample", [*ROTATIONS, *GENERATORS], ids=lambda sample: sample.name)
def test_decomposition_is_the_operator(sample: Sample) -> None:
    decomposed = decompositions()[torch.ops.grape.rotate.default]
    slots = [sample.slots()[name] for name in sample.encoding.slots]
    operands = (heads(HEADS, number=2), slots, str(sample.encoding))
    for found, wanted in zip(decomposed(*operands), torch.ops.grape.rotate(*operands), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_layer_equals_eager() -> None:
    """Forward and backward through one graph."""
    encoding = Compose((rope(HEAD_DIM), Bias(Learned("slopes"), Steps())))
    (slopes,) = leaves(torch.rand(HEADS))
    parts = leaves(*(part.float() for part in heads(HEADS)))

    def function(query: Tensor, key: Tensor, value: Tensor, steep: Tensor) -> Tensor:
        return attend(query, key, value, encoding, {"slopes": steep}, is_causal=True)

    compiled = torch.compile(function, fullgraph=True)
    query, key, value = parts
    results = [compiled(query, key, value, slopes), function(query, key, value, slopes)]
    torch.testing.assert_close(results[0], results[1])
    cotangent = torch.randn_like(results[0])
    for found, wanted in zip(
        *(torch.autograd.grad(result, [*parts, slopes], cotangent) for result in results), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sample", [*named(BIASES, "fox", "gated_both"), *named(PATHS, "grape_ap")], ids=lambda sample: sample.name
)
@pytest.mark.parametrize("length", [1, LENGTH], ids=["one query", "all queries"])
def test_compiled_attention_equals_eager(sample: Sample, length: int) -> None:
    """Slots in the layout of a projection, forward and backward; one query leaves no node, its definition is fused."""
    query, key, value = heads(HEADS)
    slots = {
        name: slot.transpose(1, 2).contiguous().transpose(1, 2) if slot.dim() > 2 else slot
        for name, slot in sample.slots().items()
    }
    if length == 1:
        slots = {
            name: slot[:, :, -1:] if name in ("gate_query", "path_query") else slot
            for name, slot in slots.items()
        }
    parts = leaves(query[:, :, -length:], key, value, *slots.values())
    nodes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        return aot_module_simplified(graph, examples, fw_compiler=seen)

    def seen(graph: torch.fx.GraphModule, _: object) -> Any:
        nodes.extend(node.target for node in graph.graph.nodes if "grape" in str(node.target))
        return make_boxed_func(graph.forward)

    def function(query: Tensor, key: Tensor, value: Tensor, *filled: Tensor) -> Tensor:
        return attend(
            query, key, value, sample.encoding, dict(zip(slots, filled, strict=True)), is_causal=True
        )

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = [compiled(*parts), function(*parts)]
    torch.testing.assert_close(results[0], results[1])
    cotangent = torch.randn_like(results[0])
    found, wanted = (torch.autograd.grad(result, parts, cotangent) for result in results)
    torch.testing.assert_close(found, wanted)
    assert len(nodes) == (0 if length == 1 else 2)


@pytest.mark.parametrize("sample", [*BIASES, *PATHS], ids=lambda sample: sample.name)
def test_gradients_have_the_layout_of_the_fake_kernel(sample: Sample) -> None:
    """Compilers plan memory by it, whatever the layout of the slots."""
    query, key, value = heads(HEADS)
    slots = [
        slot.mT.contiguous().mT if slot.dim() > 1 else slot
        for slot in (sample.slots()[name] for name in sample.encoding.slots)
    ]
    encoding = str(sample.encoding)
    output, logsumexp = torch.ops.grape.attend(query, key, value, slots, encoding, None, True)
    operands = (query, query, key, value, output, logsumexp, slots, encoding)
    found = torch.ops.grape.attend_backward(*operands, None, True, None, None, None, None, None, True, False)
    assert all(gradient.is_contiguous() for gradient in found)


@pytest.mark.slow
def test_compiled_rotation_is_one_kernel() -> None:
    """Inductor fuses both tensors and computes the tables once."""
    from torch._inductor.utils import run_and_get_code  # noqa: TID251 - what is compiled is what is tested

    encoding = Rotation(rope(HEAD_DIM).planes, Learned("theta"), Positions("n"))

    def function(query: Tensor, key: Tensor, theta: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        return rotate([query, key], encoding, {"theta": theta, "n": times})

    operands = (
        *(part.float() for part in heads(HEADS, number=2)),
        torch.rand(HEAD_DIM // 2),
        torch.arange(LENGTH),
    )
    found, (code, *_) = run_and_get_code(torch.compile(function, fullgraph=True), *operands)
    for turned, wanted in zip(found, function(*operands), strict=True):
        torch.testing.assert_close(turned, wanted)
    assert code.count("async_compile.cpp_pybinding(") == 1
    assert "grape" not in code.partition("def call(")[2]


def test_fake_tensors_have_shapes_and_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    parts = [tensor(BATCH, LENGTH, HEADS, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    real = torch.ops.grape.attend(*parts, [], str(nope()))
    with FakeTensorMode() as mode:
        fake = torch.ops.grape.attend(*(mode.from_tensor(part) for part in parts), [], str(nope()))
    for found, wanted in zip(fake, real, strict=True):
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_operators_load_no_backend() -> None:
    code = "import sys, grape_compile.operators; print({'triton', 'onnx', 'tvm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
