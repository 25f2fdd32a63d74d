"""Small ONNX graphs of what emitters write, run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from torch import Tensor

from grape_compile.export.onnx.builder import Builder
from grape_compile.export.onnx.emit_rotation import Emitted
from grape_compile.export.onnx.targets import Target
from grape_compile.operators.samples import BATCH, LENGTH

# One short file for each sample and target: a second of a session each would be minutes.
_NAMES = {BATCH: "batch", LENGTH: "tokens"}


class File:
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
