"""ONNX graphs written by hand: one rotation of one tensor, in the spellings of a file, and what is wrong with each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

HEADS, WIDTH = 4, 8


class Graph:
    """Nodes and constants put together one by one; names of values are told or made up."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, array: Any) -> str:
        """An initializer, its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", result: str = "", **attributes: Any) -> str:
        """A node of one result, its name."""
        name = result or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def cut(self, value: str, start: int, end: int, step: int = 1) -> str:
        """Channels start, start + step, ... of a value."""
        bounds = (self.constant(np.array([each], np.int64)) for each in (start, end, -1, step))
        return self.op("Slice", value, *bounds)

    def save(
        self,
        path: Path,
        inputs: Sequence[tuple[str, int, Sequence[int | str]]],
        outputs: Sequence[tuple[str, int, Sequence[int | str]] | str],
        opset: int = 18,
    ) -> Path:
        """The graph as a file; a result may be told by its name alone."""
        graph = helper.make_graph(
            self.nodes,
            "by hand",
            [helper.make_tensor_value_info(*each) for each in inputs],
            [
                ValueInfoProto(name=each) if isinstance(each, str) else helper.make_tensor_value_info(*each)
                for each in outputs
            ],
            self.constants,
        )
        domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=9)
        onnx.save(model, path)
        return path


def tables(graph: Graph, positions: str) -> tuple[str, str]:
    """Cosine and sine of positions times 100^(-2j/8), [B, 1, T, 4]."""
    times = graph.op("Cast", positions, to=TensorProto.FLOAT)
    times = graph.op("Unsqueeze", times, graph.constant(np.array([1, 3], np.int64)))
    frequencies = graph.constant(100.0 ** (-np.arange(0, WIDTH, 2, dtype=np.float32) / WIDTH))
    angle = graph.op("Mul", times, frequencies)
    return graph.op("Cos", angle), graph.op("Sin", angle)


def turned(graph: Graph, value: str, cos: str, sin: str, spelling: str) -> str:
    """A value [B, H, T, 8] turned by tables in one of `TURNS`, or spoiled as one of `NEAR_MISSES` says."""
    if spelling == "neighbours":
        first, second = graph.cut(value, 0, WIDTH, 2), graph.cut(value, 1, WIDTH, 2)
    else:
        first, second = graph.cut(value, 0, WIDTH // 2), graph.cut(value, WIDTH // 2, WIDTH)
    if spelling == "one half":
        second = first
    sums = "Add" if spelling == "reflection" else "Sub"
    real = graph.op(sums, graph.op("Mul", first, cos), graph.op("Mul", second, sin))
    across = graph.op("Mul", first, cos if spelling == "wrong table" else sin)
    imag = graph.op("Add", across, graph.op("Mul", second, cos))
    if spelling == "doubled sine":
        imag = graph.op("Add", imag, across)
    if spelling == "neighbours":
        last = graph.constant(np.array([-1], np.int64))
        parts = [graph.op("Unsqueeze", part, last) for part in (real, imag)]
        pairs = graph.op("Concat", *parts, axis=-1)
        return graph.op("Reshape", pairs, graph.constant(np.array([0, 0, 0, WIDTH], np.int64)))
    return graph.op("Concat", real, imag, axis=-1)


TURNS = {"halves": "half(8)", "neighbours": "interleaved(8)"}
NEAR_MISSES = ("reflection", "one half", "wrong table", "doubled sine")


def attention(path: Path, spelling: str, opset: int = 18, activation: tuple[str, str] = ("Tanh", "")) -> Path:
    """A file of one layer: projections of an activation, queries and keys turned, scores, values; input `positions`."""
    graph = Graph()
    query, key, value = _heads(graph, graph.op(activation[0], "hidden", domain=activation[1]))
    cos, sin = tables(graph, "positions")
    query, key = (turned(graph, each, cos, sin, spelling) for each in (query, key))
    _mixed(graph, _scores(graph, query, key), value)
    return graph.save(path, [HIDDEN, ("positions", TensorProto.INT64, ("batch", "tokens"))], [MIXED], opset)


def biased(path: Path, spelling: str) -> Path:
    """The same with a constant table of biases [4, 1, 64] whose last entries are added to the scores."""
    graph = Graph()
    query, key, value = _heads(graph, graph.op("Tanh", "hidden"))
    slopes = 2.0 ** -np.arange(1, HEADS + 1)
    table = slopes[:, None, None] * np.arange(-63, 1)
    if spelling == "saturating":  # far from what an example of a few tokens shows
        table = np.maximum(table, -40 * slopes[:, None, None])
    length = graph.op("Shape", "hidden", start=1, end=2)
    first = graph.op("Neg", length)
    end, axis = graph.constant(np.array([2**63 - 1])), graph.constant(np.array([2]))
    cut = graph.op("Slice", graph.constant(table.astype(np.float32)), first, end, axis)
    _mixed(graph, graph.op("Add", _scores(graph, query, key), cut), value)
    return graph.save(path, [HIDDEN], [MIXED])


HIDDEN = ("hidden", TensorProto.FLOAT, ("batch", "tokens", HEADS * WIDTH))
MIXED = ("mixed", TensorProto.FLOAT, ("batch", "tokens", HEADS, WIDTH))


def _heads(graph: Graph, hidden: str) -> list[str]:
    """Queries, keys and values [B, H, T, 8] of an activation."""
    random, heads = np.random.default_rng(0), []
    for _ in range(3):
        weight = random.standard_normal((HEADS * WIDTH, HEADS * WIDTH)) / (HEADS * WIDTH) ** 0.5
        flat = graph.op("MatMul", hidden, graph.constant(weight.astype(np.float32)))
        apart = graph.op("Reshape", flat, graph.constant(np.array([0, 0, HEADS, WIDTH], np.int64)))
        heads.append(graph.op("Transpose", apart, perm=[0, 2, 1, 3]))
    return heads


def _scores(graph: Graph, query: str, key: str) -> str:
    product = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    return graph.op("Mul", product, graph.constant(np.float32(WIDTH**-0.5)))


def _mixed(graph: Graph, scores: str, value: str) -> None:
    product = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    graph.op("Transpose", product, perm=[0, 2, 1, 3], result="mixed")
