"""Every encoding of the algebra as ONNX nodes, run by ONNX Runtime, against its definition in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from grape_compile.encoding import Encoding
from grape_compile.export.onnx.builder import Builder
from grape_compile.export.onnx.emit_attention import attend
from grape_compile.export.onnx.emit_operators import Call
from grape_compile.export.onnx.emit_rotation import Emitted, rotate
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

# One short file for each sample and target: a second of a session each would be minutes.
_NAMES = {BATCH: "batch", LENGTH: "tokens"}


class _File:
    """A graph of inputs and one node that stands for the call, which is replaced by what is emitted."""

    def __init__(self, tensors: dict[str, Tensor], constants: dict[str, Tensor], target: Target) -> None:
        self.feeds = {name: each.numpy() for name, each in tensors.items()}
        self.values = {
            name: ir.Value(
                name=name,
                shape=ir.Shape([_NAMES.get(size, size) for size in each.shape]),
                type=ir.TensorType(ir.DataType.from_numpy(self.feeds[name].dtype)),
            )
            for name, each in tensors.items()
        }
        anchor = ir.Node("grape", "call", list(self.values.values()), num_outputs=1)
        anchor.outputs[0].name = "result"
        self.graph = ir.Graph(
            list(self.values.values()),
            [],
            nodes=[anchor],
            opset_imports={"": target.opset, "com.microsoft": 1},
            name="sample",
        )
        for name, each in constants.items():
            made = ir.tensor(each.numpy(), name=name)
            self.values[name] = ir.Value(
                name=name, shape=ir.Shape(each.shape), type=ir.TensorType(made.dtype), const_value=made
            )
            self.graph.register_initializer(self.values[name])
        self.anchor, self.builder = anchor, Builder(self.graph, anchor)

    def run(self, emitted: Emitted) -> list[np.ndarray]:
        self.graph.remove(self.anchor)
        for value in emitted.values:
            if value in self.graph.inputs:
                continue
            self.graph.outputs.append(value)
        proto = ir.to_proto(ir.Model(self.graph, ir_version=10))
        onnx.checker.check_model(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        used = {each.name for each in session.get_inputs()}
        return list(session.run(None, {name: each for name, each in self.feeds.items() if name in used}))


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
    file = _File({"x": x, **inputs}, constants, target)
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
    file = _File({"query": query, "key": key, "value": value, **slots}, {}, target)
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
