"""The operators inside torch: opcheck, gradcheck, vmap, fake tensors, export, compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import (  # type: ignore[import-untyped]  # torch ships it without annotations
    aot_module_simplified,
    make_boxed_func,
)
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


def named(samples: tuple[Sample, ...], *names: str) -> list[Sample]:
    return [sample for sample in samples if sample.name in names]


def inputs(*tensors: Tensor) -> list[Tensor]:
    return [part.detach().requires_grad_(part.is_floating_point()) for part in tensors]


def heads(count: int, length: int = LENGTH, number: int = 3) -> list[Tensor]:
    return [tensor(BATCH, count, length, HEAD_DIM, seed=seed) for seed in range(number)]


@pytest.mark.parametrize(
    "sample",
    [
        *named(ROTATIONS, "half", "moved", "irregular", "per_head", "tables", "axes_accumulated", "basis"),
        *named(GENERATORS, "rank2", "rank2_contextual", "non_commuting_per_head", "non_commuting_repeated"),
    ],
    ids=lambda sample: sample.name,
)
def test_opcheck_of_rotate(sample: Sample) -> None:
    query, key = inputs(*heads(HEADS, number=2))
    slots = inputs(*(sample.slots()[name] for name in sample.encoding.slots))
    torch.library.opcheck(torch.ops.grape.rotate.default, ([query, key], slots, str(sample.encoding)))


@pytest.mark.parametrize(
    "sample",
    [
        *named(BIASES, "nope", "alibi", "learned_clock", "euclidean", "fox", "gated_both"),
        *named(PATHS, "grape_ap"),
        *named(COMPOSITIONS, "contextual_fox", "dictionary"),
    ],
    ids=lambda sample: sample.name,
)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_opcheck_of_attend(sample: Sample, masked: bool) -> None:
    query, key, value = inputs(*heads(HEADS))
    slots = inputs(*(sample.slots()[name] for name in sample.encoding.slots))
    mask = tensor(BATCH, 1, LENGTH, LENGTH, seed=9).requires_grad_() if masked else None
    options = {"mask": mask, "is_causal": not masked, "window": 4 if masked else None}
    torch.library.opcheck(
        torch.ops.grape.attend.default, (query, key, value, slots, str(sample.encoding)), options
    )


WITH_OPTIONS = [
    *named(BIASES, "nope", "learned_clock", "fox", "gated_both"),
    *named(PATHS, "path_learned"),
    *named(COMPOSITIONS, "contextual_fox"),
]


@pytest.mark.parametrize("cap", [None, 0.75], ids=["", "capped"])
@pytest.mark.parametrize("sample", WITH_OPTIONS, ids=lambda sample: sample.name)
def test_sinks_segments_and_cap(sample: Sample, cap: float | None) -> None:
    """opcheck and gradcheck, the sinks' gradient with all others."""
    slots = sample.slots()
    segments = torch.arange(LENGTH) // 5
    parts = inputs(*heads(HEADS), tensor(HEADS, seed=21), *slots.values())
    options: dict[str, Any] = {"is_causal": True, "cap": cap, "segments": segments}

    def function(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *filled: Tensor) -> Tensor:
        named_slots = dict(zip(slots, filled, strict=True))
        return attend(query, key, value, sample.encoding, named_slots, sinks=sinks, **options)

    assert torch.autograd.gradcheck(function, parts, fast_mode=True)
    query, key, value, sinks, *filled = inputs(*parts)
    torch.library.opcheck(
        torch.ops.grape.attend.default,
        (query, key, value, filled, str(sample.encoding)),
        {**options, "sinks": sinks},
    )


@pytest.mark.parametrize("dim", [None, 0], ids=["shared", "mapped"])
def test_vmap_of_sinks_and_segments(dim: int | None) -> None:
    parts = [*heads(HEADS), tensor(HEADS, seed=21), torch.arange(LENGTH) // 4]
    dims = (0, 0, 0, dim, dim)
    mapped = [
        part if each is None else torch.stack([part, part + 1, part])
        for part, each in zip(parts, dims, strict=True)
    ]

    def function(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, segments: Tensor) -> Tensor:
        return attend(query, key, value, alibi(HEADS), sinks=sinks, segments=segments, cap=2.0)

    found = torch.vmap(function, in_dims=dims)(*mapped)
    torch.testing.assert_close(found, loop(function, dims, *mapped), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample", [*ROTATIONS, *GENERATORS], ids=lambda sample: sample.name)
def test_gradcheck_of_rotate(sample: Sample) -> None:
    slots = sample.slots()
    parts = inputs(tensor(BATCH, HEADS, LENGTH, HEAD_DIM), *slots.values())

    def function(query: Tensor, *filled: Tensor) -> tuple[Tensor, ...]:
        return rotate([query], sample.encoding, dict(zip(slots, filled, strict=True)))

    assert torch.autograd.gradcheck(function, parts, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, parts, fast_mode=True)


@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 4}], ids=["causal", "band"])
def test_gradcheck_of_attend(sample: Sample, options: dict[str, Any]) -> None:
    slots = sample.slots()
    parts = inputs(*heads(HEADS), *slots.values())

    def function(query: Tensor, key: Tensor, value: Tensor, *filled: Tensor) -> Tensor:
        return attend(query, key, value, sample.encoding, dict(zip(slots, filled, strict=True)), **options)

    assert torch.autograd.gradcheck(function, parts, fast_mode=True)


@pytest.mark.parametrize("sample", [*PATHS, *COMPOSITIONS], ids=lambda sample: sample.name)
def test_gradcheck_of_paths_and_compositions(sample: Sample) -> None:
    test_gradcheck_of_attend(sample, {"is_causal": True})


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], *operands: Tensor) -> Tensor:
    """What vmap means."""
    size = next(part.shape[dim] for part, dim in zip(operands, in_dims, strict=True) if dim is not None)
    rows = [
        function(
            *(
                part if dim is None else part.select(dim, at)
                for part, dim in zip(operands, in_dims, strict=True)
            )
        )
        for at in range(size)
    ]
    return torch.stack(rows)


ROTATE_VMAPS = {
    "tensor": ("positions", (0, None)),
    "positions": ("positions", (None, 1)),
    "both": ("per_head", (2, 0, None)),
    "frequencies": ("learned", (None, 0)),
    "tables": ("tables", (0, 0, 0)),
    "axes": ("axes", (0, 2)),
    "running_sums": ("accumulated", (0, 0)),
    "basis": ("basis", (0, None, None, 0)),
    "basis_of_heads": ("basis_per_head", (1, 0, None, 2)),
    "nothing_but_the_tensor": ("half", (1,)),
    "vectors": ("rank2", (0, None, 1)),
    "vectors_of_heads": ("rank2_per_head", (None, 1, 0, 2, None)),
    "phases": ("rank2_contextual", (0, 0, 2, None, 0)),
    "generator": ("non_commuting", (0, None, 2)),
    "generators_of_heads": ("non_commuting_per_head", (0, 1, 0, 3)),
}


@pytest.mark.parametrize("case", ROTATE_VMAPS)
def test_vmap_of_rotate(case: str) -> None:
    name, dims = ROTATE_VMAPS[case]
    (sample,) = named((*ROTATIONS, *GENERATORS), name)
    slots = sample.slots()
    parts = [tensor(BATCH, HEADS, LENGTH, HEAD_DIM), *slots.values()]
    mapped = [
        part if dim is None else torch.stack([part, part * 2, part + 1], dim)
        for part, dim in zip(parts, dims, strict=True)
    ]

    def function(query: Tensor, *filled: Tensor) -> Tensor:
        return rotate([query], sample.encoding, dict(zip(slots, filled, strict=True)))[0]

    found = torch.vmap(function, in_dims=dims)(*mapped)
    torch.testing.assert_close(found, loop(function, dims, *mapped), rtol=1e-12, atol=1e-12)


ATTEND_VMAPS = {
    "queries": ("alibi", (0, None, None)),
    "all": ("alibi", (0, 1, 2)),
    "slopes": ("learned_slopes", (None, None, None, 0)),
    "shared_slopes": ("learned_slopes", (0, 0, 0, None)),
    "clock": ("learned_clock", (None, 0, 0, None, 1)),
    "shared_clock": ("counted", (0, 0, 0, None)),
    "axes": ("euclidean", (0, None, None, 1)),
    "forgetting": ("fox", (0, 0, 0, 0)),
    "gates": ("gated_both", (0, None, 0, None, 0, 1)),
    "edges": ("grape_ap", (0, 0, 0, 0, None)),
}


@pytest.mark.parametrize("mask", [None, (1, LENGTH), (BATCH, 1, LENGTH, LENGTH)], ids=["", "shared", "whole"])
@pytest.mark.parametrize("case", ATTEND_VMAPS)
def test_vmap_of_attend_and_its_gradients(case: str, mask: tuple[int, ...] | None) -> None:
    name, dims = ATTEND_VMAPS[case]
    (sample,) = named((*BIASES, *PATHS), name)
    slots = sample.slots()
    parts = [*heads(HEADS), *slots.values()]
    mapped = [
        part if dim is None else torch.stack([part, part + 1], dim)
        for part, dim in zip(parts, dims, strict=True)
    ]
    added = None if mask is None else tensor(*mask, seed=8)
    cotangent = tensor(BATCH, HEADS, LENGTH, HEAD_DIM, seed=9)

    def function(*operands: Tensor) -> Tensor:
        query, key, value, *filled = operands
        named_slots = dict(zip(slots, filled, strict=True))
        return attend(query, key, value, sample.encoding, named_slots, mask=added, is_causal=True)

    found = torch.vmap(function, in_dims=dims)(*mapped)
    torch.testing.assert_close(found, loop(function, dims, *mapped), rtol=1e-12, atol=1e-12)

    biased = bool(sample.encoding.slots)

    def gradient(*operands: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, floating slots and mask, as the operator returns them."""
        query, key, value, *filled = operands
        options = (added, True, None, None, None, None, None)
        text = str(sample.encoding)
        output, logsumexp = torch.ops.grape.attend(query, key, value, filled, text, *options)
        parts = (cotangent, query, key, value, output, logsumexp)
        return tuple(
            torch.ops.grape.attend_backward(*parts, filled, text, *options, biased, mask is not None)
        )

    for at, part in enumerate(torch.vmap(gradient, in_dims=dims)(*mapped)):
        wanted = loop(lambda *operands, at=at: gradient(*operands)[at], dims, *mapped)
        torch.testing.assert_close(part, wanted, rtol=1e-11, atol=1e-11)


def test_many_cotangents_at_once() -> None:
    """A Jacobian maps the backward pass alone."""
    query, key, value = inputs(*heads(HEADS))
    (mask,) = inputs(tensor(LENGTH, LENGTH, seed=8))
    output = attend(query, key, value, alibi(HEADS), mask=mask)
    cotangents = tensor(3, *output.shape, seed=9)

    def gradients(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, (query, key, value, mask), cotangent, retain_graph=True)

    for at, found in enumerate(torch.vmap(gradients)(cotangents)):
        wanted = loop(lambda cotangent, at=at: gradients(cotangent)[at], (0,), cotangents)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


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
    (slopes,) = inputs(torch.rand(HEADS))
    parts = inputs(*(part.float() for part in heads(HEADS)))

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
    parts = inputs(query[:, :, -length:], key, value, *slots.values())
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
