"""Every encoding of the algebra as ONNX nodes, run by ONNX Runtime, against its definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx_samples import File
from torch import Tensor

from grape_compile.encoding import Encoding, alibi
from grape_compile.export.onnx.emit_attention import attend
from grape_compile.export.onnx.emit_operators import Call
from grape_compile.export.onnx.emit_rotation import rotate
from grape_compile.export.onnx.hold_past import hold_past
from grape_compile.export.onnx.targets import TARGETS, Target
from grape_compile.operators import attend as grape_attend
from grape_compile.operators import reference_attend, reference_rotate
from grape_compile.operators import rotate as grape_rotate
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


def _operands(encoding: Encoding, slots: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Slots that may be computed, and those that ONNX needs to know: matrices whose eigenvalues are taken."""
    known = {"generator", "basis"} if "non_commuting" in str(encoding) else set()
    return (
        {name: slot for name, slot in slots.items() if name not in known},
        {name: slot for name, slot in slots.items() if name in known},
    )


def _error(found: np.ndarray, expected: Tensor) -> float:
    return float((torch.from_numpy(found).double() - expected).abs().max())


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("sample", [*ROTATIONS, *GENERATORS], ids=lambda sample: sample.name)
def test_every_rotation_is_its_definition(sample: Sample, target: Target) -> None:
    slots = sample.slots(torch.float32)
    x = tensor(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=torch.float32)
    inputs, constants = _operands(sample.encoding, slots)
    file = File({"x": x, **inputs}, constants, target)
    emitted = rotate(file.builder, [file.values["x"]], sample.encoding, file.values, target)
    (found,) = file.run(emitted)
    wide = {name: slot.double() if slot.is_floating_point() else slot for name, slot in slots.items()}
    (expected,) = reference_rotate([x.double()], sample.encoding, wide)
    (ours,) = grape_rotate([x], sample.encoding, slots)
    assert _error(found, expected) <= 1.25 * _error(ours.numpy(), expected) + 2e-6, emitted.how


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("queries", [LENGTH, 2], ids=["whole", "last"])
@pytest.mark.parametrize("sample", [*BIASES, *PATHS, *COMPOSITIONS], ids=lambda sample: sample.name)
def test_every_bias_is_its_definition(sample: Sample, queries: int, target: Target) -> None:
    slots = sample.slots(torch.float32, queries=queries)
    query = tensor(BATCH, HEADS, queries, HEAD_DIM, dtype=torch.float32, seed=1)
    key, value = (tensor(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=torch.float32, seed=seed) for seed in (2, 3))
    file = File({"query": query, "key": key, "value": value, **slots}, {}, target)
    given = file.values
    call = Call(given["query"], given["key"], given["value"], sample.encoding, given, is_causal=True)
    emitted = attend(file.builder, call, target)
    (found,) = file.run(emitted)
    wide = {name: slot.double() if slot.is_floating_point() else slot for name, slot in slots.items()}
    expected = reference_attend(
        query.double(), key.double(), value.double(), sample.encoding, wide, is_causal=True
    )
    ours = grape_attend(query, key, value, sample.encoding, slots, is_causal=True)
    assert _error(found, expected) <= 1.25 * _error(ours.numpy(), expected) + 5e-6, emitted.how


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("queries", [LENGTH, 2], ids=["whole", "last"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [HEADS, 1])
def test_sinks_and_segments_beside_a_bias(
    key_heads: int, cap: float | None, queries: int, target: Target
) -> None:
    query = tensor(BATCH, HEADS, queries, HEAD_DIM, dtype=torch.float32, seed=1)
    key, value = (
        tensor(BATCH, key_heads, LENGTH, HEAD_DIM, dtype=torch.float32, seed=seed) for seed in (2, 3)
    )
    sinks = tensor(HEADS, dtype=torch.float32, seed=4)
    segments = torch.arange(LENGTH).expand(BATCH, -1) // (LENGTH // 2)
    given = {"query": query, "key": key, "value": value, "sinks": sinks, "segments": segments}
    file = File(given, {}, target)
    values = file.values
    call = Call(values["query"], values["key"], values["value"], alibi(HEADS), is_causal=True, cap=cap)
    emitted = attend(file.builder, replace(call, sinks=values["sinks"], segments=values["segments"]), target)
    (found,) = file.run(emitted)
    options: dict[str, Any] = {"is_causal": True, "cap": cap, "sinks": sinks, "segments": segments}
    expected = reference_attend(query.double(), key.double(), value.double(), alibi(HEADS), **options)
    ours = grape_attend(query, key, value, alibi(HEADS), **options)
    assert _error(found, expected) <= 1.25 * _error(ours.numpy(), expected) + 5e-6, emitted.how


@pytest.mark.parametrize("target", [TARGETS["standard"], TARGETS["ort"]], ids=["standard", "ort"])
def test_the_operator_appends_to_a_cache_and_has_no_factor(target: Target) -> None:
    """ONNX Runtime multiplies one row by keys three times as fast without a factor."""
    query = tensor(BATCH, HEADS, 2, HEAD_DIM, dtype=torch.float32, seed=1)
    key, value = (tensor(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=torch.float32, seed=seed) for seed in (2, 3))
    parts = {"key": key, "value": value}
    cache = {f"past_{name}": each[:, :, :-2] for name, each in parts.items()}
    new = {f"new_{name}": each[:, :, -2:] for name, each in parts.items()}
    file = File({"query": query, **cache, **new}, {}, target)
    values, builder = file.values, file.builder
    grown_key, grown_value = (
        builder.concat([values[f"past_{name}"], values[f"new_{name}"]], 2) for name in parts
    )
    call = Call(values["query"], grown_key, grown_value, alibi(HEADS), is_causal=True)
    emitted = attend(builder, call, target)
    result = builder.same("Identity", emitted.values[0])
    assert hold_past(file.graph) == 1
    (found,) = file.run(replace(emitted, values=(result,)))
    (operator,) = (node for node in file.graph if node.op_type in emitted.how.split(", "))
    assert operator.attributes["scale"].as_float() == 1.0
    assert {values["past_key"], values["past_value"]} <= set(operator.inputs)
    expected = reference_attend(query.double(), key.double(), value.double(), alibi(HEADS), is_causal=True)
    assert _error(found, expected) <= 5e-6
