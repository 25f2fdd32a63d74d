"""Operators of ONNX read as ATen operators: each computes what ONNX Runtime does, at sizes it was not read at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sympy  # type: ignore[import-untyped]
import torch
from onnx import TensorProto, helper
from onnx_graphs import Graph

from grape_compile.export.onnx.reading.call import READERS
from grape_compile.export.onnx.reading.examples import Example
from grape_compile.export.onnx.reading.opening import open_file
from grape_compile.export.onnx.reading.trace import import_graph
from grape_compile.passes.replay import Replay, exact
from grape_compile.passes.sizes import Sizes

RANDOM = np.random.default_rng(0)


def _ints(graph: Graph, *numbers: int) -> str:
    return graph.constant(np.array(numbers, np.int64))


def _int(graph: Graph, number: int) -> str:
    return graph.constant(np.int64(number))


def _weights(graph: Graph, *shape: int) -> str:
    return graph.constant(RANDOM.standard_normal(shape).astype(np.float32))


def _scalar(graph: Graph, number: float) -> str:
    return graph.constant(np.float32(number))


def _length(graph: Graph, value: str, axis: int) -> str:
    return graph.op("Shape", value, start=axis, end=axis + 1)


def _number(graph: Graph, value: str, axis: int) -> str:
    return graph.op("Squeeze", _length(graph, value, axis), _ints(graph, 0))


def _causal(graph: Graph) -> str:
    """A mask [T, T] made of sizes."""
    tokens = graph.op("Range", *_range(graph))
    rows = graph.op("Unsqueeze", tokens, _ints(graph, 1))
    return graph.op("LessOrEqual", tokens, rows)


def _range(graph: Graph) -> tuple[str, str, str]:
    zero, one = (_int(graph, each) for each in (0, 1))
    return zero, _number(graph, "x", 1), one


def _heads(graph: Graph) -> str:
    """x [B, T, 8] as [B, 2, T, 4]."""
    apart = graph.op("Reshape", "x", _ints(graph, 0, 0, 2, 4))
    return graph.op("Transpose", apart, perm=[0, 2, 1, 3])


def _column(graph: Graph) -> str:
    return graph.op("Unsqueeze", "ids", _ints(graph, 2))


def _unary(kind: str, **attributes: Any) -> Callable[[Graph], str]:
    return lambda graph: graph.op(
        kind, graph.op("Abs", "x") if kind in ("Sqrt", "Log") else "x", **attributes
    )


def _binary(kind: str) -> Callable[[Graph], str]:
    return lambda graph: graph.op(kind, "x", _weights(graph, 8))


def _compared(kind: str) -> Callable[[Graph], str]:
    return lambda graph: graph.op(kind, "ids", _int(graph, 3))


def _logical(kind: str) -> Callable[[Graph], str]:
    return lambda graph: graph.op(kind, _compared("Less")(graph), _compared("Equal")(graph))


def _reduced(kind: str) -> Callable[[Graph], str]:
    return lambda graph: graph.op(kind, "x", _ints(graph, -1), keepdims=0)


def _of_sizes(kind: str) -> Callable[[Graph], str]:
    """A reduction of sizes, as the length of a range."""

    def build(graph: Graph) -> str:
        count = graph.op(kind, graph.op("Shape", "ids"), keepdims=0)
        return graph.op("Range", _int(graph, 0), count, _int(graph, 1))

    return build


def _sized(kind: str, *numbers: int) -> Callable[[Graph], str]:
    """Arithmetic on a size, as the length of a range."""

    def build(graph: Graph) -> str:
        count = graph.op(kind, _number(graph, "x", 1), *(_int(graph, each) for each in numbers))
        return graph.op("Range", _int(graph, 0), count, _int(graph, 1))

    return build


def _picked(kind: str, **attributes: Any) -> Callable[[Graph], str]:
    return lambda graph: graph.op(kind, _weights(graph, 6, 5), "ids", **attributes)


def _grouped_attention(graph: Graph) -> str:
    query = _heads(graph)
    key = graph.cut("x", 0, 4)
    key = graph.op("Unsqueeze", key, _ints(graph, 1))
    return graph.op("Attention", query, key, key, _causal(graph), scale=0.3)


def _rotary(interleaved: int, width: int) -> Callable[[Graph], str]:
    def build(graph: Graph) -> str:
        tables = [_weights(graph, 20, width // 2) for _ in range(2)]
        options: dict[str, Any] = {"interleaved": interleaved, "rotary_embedding_dim": width, "num_heads": 2}
        return graph.op("RotaryEmbedding", _heads(graph), *tables, "ids", **options)

    return build


CASES: dict[str, Callable[[Graph], str]] = {
    **{kind: _unary(kind) for kind in (
        "Neg", "Sqrt", "Reciprocal", "Exp", "Log", "Cos", "Sin", "Tanh", "Sigmoid", "Erf", "Abs", "IsNaN", "Relu",
        "Softplus", "Floor", "Ceil", "Round", "Sign", "Identity", "Gelu", "LeakyRelu", "Elu", "Softmax", "LogSoftmax",
        "Dropout", "ArgMax", "Trilu",
    )},
    **{kind: _binary(kind) for kind in ("Add", "Sub", "Mul", "Div", "Min", "Max")},
    **{kind: _compared(kind) for kind in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Mod")},
    **{kind: _logical(kind) for kind in ("And", "Or", "Xor")},
    **{kind: _reduced(kind) for kind in (
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL2",
    )},
    **{f"{kind} of sizes": _of_sizes(kind) for kind in ("ReduceProd", "ReduceMax", "ReduceMin", "ReduceSum")},
    **{f"{kind} of a size": _sized(kind, 2) for kind in ("Add", "Mul", "Div", "Max", "Mod")},
    "Size": lambda graph: graph.op("Range", _int(graph, 0), graph.op("Size", "x"), _int(graph, 1)),
    "Gelu by tanh": _unary("Gelu", approximate="tanh"),
    "Softmax of tokens": _unary("Softmax", axis=1),
    "ArgMax of tokens": _unary("ArgMax", axis=1, keepdims=0),
    "Trilu below": lambda graph: graph.op("Trilu", "x", _int(graph, -1), upper=0),
    "Div of integers": lambda graph: graph.op("Div", graph.op("Sub", "ids", _int(graph, 3)), _int(graph, 2)),
    "Not": lambda graph: graph.op("Not", _compared("Less")(graph)),
    "BitwiseAnd": lambda graph: graph.op("BitwiseAnd", "ids", _int(graph, 3)),
    "BitwiseOr": lambda graph: graph.op("BitwiseOr", "ids", _int(graph, 3)),
    "Pow": lambda graph: graph.op("Pow", "x", _scalar(graph, 2.0)),
    "Clip": lambda graph: graph.op("Clip", "x", _scalar(graph, -0.5), _scalar(graph, 0.5)),
    "Cast": lambda graph: graph.op("Cast", "ids", to=TensorProto.FLOAT),
    "CastLike": lambda graph: graph.op("CastLike", "ids", "x"),
    "Where": lambda graph: graph.op("Where", _causal(graph), _scalar(graph, 0.0), _scalar(graph, -1e9)),
    "CumSum": lambda graph: graph.op("CumSum", "x", _int(graph, 1)),
    "CumSum from the end": lambda graph: graph.op("CumSum", "x", _int(graph, 1), reverse=1, exclusive=1),
    "MatMul": lambda graph: graph.op("MatMul", "x", _weights(graph, 8, 3)),
    "Gemm": lambda graph: graph.op(
        "Gemm", graph.op("Reshape", "x", _ints(graph, -1, 8)), _weights(graph, 3, 8), _weights(graph, 3),
        transB=1, alpha=0.5, beta=2.0,
    ),
    "Einsum": lambda graph: graph.op("Einsum", "x", _weights(graph, 8, 3), equation="btd,dk->bkt"),
    "Flatten": lambda graph: graph.op("Flatten", "x", axis=2),
    "Flatten all": lambda graph: graph.op("Flatten", "x", axis=0),
    "Reshape to sizes": lambda graph: graph.op(
        "Reshape", "x", graph.op("Concat", _length(graph, "x", 0), _ints(graph, -1), _length(graph, "x", 1), axis=0)
    ),
    "Expand": lambda graph: graph.op("Expand", _weights(graph, 8), graph.op("Shape", "x")),
    "Tile": lambda graph: graph.op("Tile", "x", _ints(graph, 1, 2, 1)),
    "Split": lambda graph: _split(graph, _ints(graph, 3, 5)),
    "Split in equal parts": lambda graph: _split(graph, None),
    "Slice of tokens": lambda graph: graph.op("Slice", "x", _ints(graph, -3), _ints(graph, 2**63 - 1), _ints(graph, 1)),
    "Slice backwards": lambda graph: graph.op(
        "Slice", "x", _ints(graph, -1), _ints(graph, -(2**63) + 1), _ints(graph, 1), _ints(graph, -1)
    ),
    "Slice to a size": lambda graph: graph.op(
        "Slice", _weights(graph, 40, 3), _ints(graph, 0), _length(graph, "x", 1), _ints(graph, 0)
    ),
    "Gather": _picked("Gather", axis=0),
    "Gather channels": lambda graph: graph.op("Gather", "x", _ints(graph, 3, 1, 0), axis=-1),
    "Gather by two axes": lambda graph: graph.op("Gather", "x", graph.constant(np.array([[3, 1], [0, 2]])), axis=2),
    "Gather the last": lambda graph: graph.op("Gather", "x", _int(graph, -1), axis=1),
    "GatherElements": lambda graph: graph.op("GatherElements", "x", _column(graph), axis=2),
    "GatherND": lambda graph: graph.op("GatherND", _weights(graph, 6, 6, 2), _column(graph)),
    "ConstantOfShape": lambda graph: graph.op("ConstantOfShape", graph.op("Shape", "ids")),
    "Constant": lambda graph: graph.op("Add", "x", graph.op("Constant", value_float=2.0)),
    "Pad": lambda graph: graph.op("Pad", "x", _ints(graph, 0, 1, 0, 0, 0, 2), _scalar(graph, 3.0)),
    "ScatterElements": lambda graph: graph.op(
        "ScatterElements", "x", _column(graph), graph.cut("x", 0, 1), axis=2
    ),
    "LayerNormalization": lambda graph: graph.op("LayerNormalization", "x", _weights(graph, 8), _weights(graph, 8)),
    "RMSNormalization": lambda graph: graph.op("RMSNormalization", "x", _weights(graph, 8)),
    "Attention": _grouped_attention,
    "RotaryEmbedding": _rotary(0, 4),
    "RotaryEmbedding of neighbours": _rotary(1, 2),
}  # fmt: skip
"""An operator, or a form of one, by a graph of `x` [B, T, 8] and `ids` [B, T] of 0 ... 5."""


def _split(graph: Graph, lengths: str | None) -> str:
    names = [f"{name}_part_{len(graph.nodes)}" for name in ("first", "second")]
    inputs = ["x"] if lengths is None else ["x", lengths]
    options: dict[str, Any] = {"num_outputs": 2} if lengths is None else {}
    graph.nodes.append(helper.make_node("Split", inputs, names, axis=-1, **options))
    return graph.op("Concat", *reversed(names), axis=-1)


def test_every_reader_computes_what_onnx_runtime_does(tmp_path: Path) -> None:
    graph = Graph()
    results = {
        name: graph.op("Identity", build(graph), result=f"result of {name}") for name, build in CASES.items()
    }
    path = graph.save(
        tmp_path / "all.onnx",
        [("x", TensorProto.FLOAT, ("rows", "tokens", 8)), ("ids", TensorProto.INT64, ("rows", "tokens"))],
        list(results.values()),
        opset=23,
    )
    session = onnxruntime.InferenceSession(str(path))
    model = open_file(path)
    example = Example({"rows": 2, "tokens": 9})
    imported = import_graph(model.graph, [example], lambda values: pytest.fail("every operator has a reader"))
    symbols = {name: symbol for symbol, name in imported.symbols.items()}
    outputs: Any = imported.program.graph.output_node().args[0]
    places = imported.program.graph.find_nodes(op="placeholder")
    for rows, tokens in ((2, 9), (1, 5), (3, 7)):
        feeds = {
            "x": RANDOM.standard_normal((rows, tokens, 8)).astype(np.float32),
            "ids": RANDOM.integers(0, 6, (rows, tokens)),
        }
        sizes = Sizes({symbols["rows"]: sympy.Integer(rows), symbols["tokens"]: sympy.Integer(tokens)})
        bound = {
            place: exact(torch.from_numpy(each)) for place, each in zip(places, feeds.values(), strict=False)
        }
        replay = Replay(imported.program, sizes, bound)
        for name, output, wanted in zip(results, outputs, session.run(None, feeds), strict=True):
            found = replay.tensor(output).numpy()
            assert found.shape == wanted.shape, name
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    seen = {node.op_type for node in model.graph}
    assert {name for domain, name in READERS if domain == ""} - seen == UNTRIED


UNTRIED = {"Mish", "Swish", "SimplifiedLayerNormalization"}
"""What ONNX Runtime has no kernel for, or onnx no schema."""
