"""The operators under torch's own checks, and under vmap: opcheck, gradcheck, mapped operands and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_errors import heads, leaves, named
from torch import Tensor

from grape_compile.encoding import alibi
from grape_compile.operators import attend, rotate
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


@pytest.mark.parametrize(
    "sample",
    [
        *named(ROTATIONS, "half", "moved", "irregular", "per_head", "tables", "axes_accumulated", "basis"),
        *named(GENERATORS, "rank2", "rank2_contextual", "non_commuting_per_head", "non_commuting_repeated"),
    ],
    ids=lambda sample: sample.name,
)
def test_opcheck_of_rotate(sample: Sample) -> None:
    query, key = leaves(*heads(HEADS, number=2))
    slots = leaves(*(sample.slots()[name] for name in sample.encoding.slots))
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
    query, key, value = leaves(*heads(HEADS))
    slots = leaves(*(sample.slots()[name] for name in sample.encoding.slots))
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
    parts = leaves(*heads(HEADS), tensor(HEADS, seed=21), *slots.values())
    options: dict[str, Any] = {"is_causal": True, "cap": cap, "segments": segments}

    def function(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *filled: Tensor) -> Tensor:
        named_slots = dict(zip(slots, filled, strict=True))
        return attend(query, key, value, sample.encoding, named_slots, sinks=sinks, **options)

    assert torch.autograd.gradcheck(function, parts, fast_mode=True)
    query, key, value, sinks, *filled = leaves(*parts)
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
    parts = leaves(tensor(BATCH, HEADS, LENGTH, HEAD_DIM), *slots.values())

    def function(query: Tensor, *filled: Tensor) -> tuple[Tensor, ...]:
        return rotate([query], sample.encoding, dict(zip(slots, filled, strict=True)))

    assert torch.autograd.gradcheck(function, parts, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, parts, fast_mode=True)


@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 4}], ids=["causal", "band"])
def test_gradcheck_of_attend(sample: Sample, options: dict[str, Any]) -> None:
    slots = sample.slots()
    parts = leaves(*heads(HEADS), *slots.values())

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
    query, key, value = leaves(*heads(HEADS))
    (mask,) = leaves(tensor(LENGTH, LENGTH, seed=8))
    output = attend(query, key, value, alibi(HEADS), mask=mask)
    cotangents = tensor(3, *output.shape, seed=9)

    def gradients(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, (query, key, value, mask), cotangent, retain_graph=True)

    for at, found in enumerate(torch.vmap(gradients)(cotangents)):
        wanted = loop(lambda cotangent, at=at: gradients(cotangent)[at], (0,), cotangents)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
