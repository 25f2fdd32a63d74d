"""Attention by blocks of queries: the same numbers, and no key left out that a mask does not hide by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from onnx_samples import File
from torch import Tensor

from grape_compile.export.onnx.builder import BOOL, Builder
from grape_compile.export.onnx.emit_attention import attend
from grape_compile.export.onnx.emit_operators import Call
from grape_compile.export.onnx.targets import TARGETS, Target
from grape_compile.export.onnx.visible_keys import reach

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
#: Three blocks, the last of them shorter.
TOKENS = 150
WINDOW = 20
NEVER = -1e30


def _counted(builder: Builder, axis: int, start: int = 0, step: int = 1) -> ir.Value:
    """Numbers of the tokens along an axis of [1, 1, T, T]."""
    tokens = builder.size(builder.graph.inputs[0], 2)
    end = builder.squeeze(builder.binary("Mul", tokens, step), 0)
    if start:
        end = builder.binary("Add", end, start)
    numbers = builder.op(
        "Range",
        builder.constant(start),
        end,
        builder.constant(step),
        dtype=ir.DataType.INT64,
        shape=("tokens",),
    )
    return builder.unsqueeze(numbers, *(each for each in range(4) if each != axis))


def _relation(builder: Builder, kind: str, left: ir.Value, right: ir.Value) -> ir.Value:
    return builder.op(kind, left, right, dtype=BOOL, shape=(1, 1, "tokens", "tokens"))


def _causal(builder: Builder) -> ir.Value:
    return _relation(builder, "LessOrEqual", _counted(builder, 3), _counted(builder, 2))


def _windowed(builder: Builder) -> ir.Value:
    near = builder.binary("Sub", _counted(builder, 2), WINDOW)
    inside = _relation(builder, "Greater", _counted(builder, 3), near)
    return _relation(builder, "And", _causal(builder), inside)


def _added(builder: Builder) -> ir.Value:
    """Zero for a key that is seen, a low number for one ahead of the query."""
    ahead = _relation(builder, "Greater", _counted(builder, 3), _counted(builder, 2))
    low, zero = (builder.constant(each, ir.DataType.FLOAT) for each in (NEVER, 0.0))
    return builder.op("Where", ahead, low, zero, dtype=ir.DataType.FLOAT, shape=(1, 1, "tokens", "tokens"))


def _tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS}
    return {name: torch.randn(2, heads, TOKENS, WIDTH, generator=random) for name, heads in sizes.items()}


def _file(target: Target) -> File:
    file = File(_tensors(), {}, target)
    for name, tensor in _tensors().items():
        file.values[name].shape = ir.Shape(["batch", tensor.shape[1], "tokens", WIDTH])
    return file


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("mask", [None, _causal, _windowed, _added])
def test_blocks_compute_the_whole(mask: Callable[[Builder], ir.Value] | None, target: Target) -> None:
    file = _file(replace(target, loops=True))
    made = None if mask is None else mask(file.builder)
    given = file.values
    call = Call(given["query"], given["key"], given["value"], mask=made, is_causal=mask is None)
    emitted = attend(file.builder, call, replace(target, loops=True))
    assert emitted.how.startswith("a loop over blocks of queries")
    (found,) = file.run(emitted)
    apart = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    seen = (apart >= 0) & (apart < (WINDOW if mask is _windowed else TOKENS))
    query, key, value = (each.double() for each in _tensors().values())
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True
    )
    assert float((torch.from_numpy(found).double() - expected).abs().max()) <= 2e-6


@pytest.mark.parametrize(("low", "hides"), [(-65504.0, True), (-6e4, False)])
def test_the_lowest_number_of_half_precision_hides(low: float, hides: bool) -> None:
    builder = _file(TARGETS["standard"]).builder
    half, shape = ir.DataType.FLOAT16, (1, 1, "tokens", "tokens")
    numbers = [builder.constant(each, half) for each in (0.0, low)]
    mask = builder.op("Where", _causal(builder), *numbers, dtype=half, shape=shape)
    assert (reach(builder, mask).last is not None) is hides


def _opposite(builder: Builder) -> ir.Value:
    return builder.op("Not", _causal(builder), dtype=BOOL, shape=(1, 1, "tokens", "tokens"))


def _chosen(builder: Builder, seen: float, hidden: float) -> ir.Value:
    """One number where a key is not ahead of the query, another elsewhere."""
    numbers = (builder.constant(each, ir.DataType.FLOAT) for each in (seen, hidden))
    shape = (1, 1, "tokens", "tokens")
    return builder.op("Where", _causal(builder), *numbers, dtype=ir.DataType.FLOAT, shape=shape)


NEAR_MISSES: dict[str, Callable[[Builder], ir.Value]] = {
    "of two masks one holds": lambda to: _relation(to, "Or", _causal(to), _windowed(to)),
    "every second number": lambda to: _relation(to, "LessOrEqual", _counted(to, 3), _counted(to, 2, step=2)),
    "keys with keys": lambda to: _relation(to, "LessOrEqual", _counted(to, 3), _counted(to, 3)),
    "queries as keys": lambda to: _relation(to, "GreaterOrEqual", _counted(to, 2), _counted(to, 1)),
    "a number that does not hide": lambda to: _chosen(to, 0.0, -100.0),
    "a number for what is seen": lambda to: _chosen(to, NEVER, 0.0),
    "what lies ahead alone": _opposite,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_mask_that_hides_nothing_ahead_bounds_nothing_ahead(name: str) -> None:
    file = _file(TARGETS["standard"])
    assert reach(file.builder, NEAR_MISSES[name](file.builder)).last is None


@pytest.mark.parametrize(
    ("kind", "start", "bound"),
    [("LessOrEqual", 0, 0), ("Less", 0, -1), ("LessOrEqual", 3, 3), ("Less", 3, 2)],
)
def test_a_bound_is_where_the_comparison_puts_it(kind: str, start: int, bound: int) -> None:
    file = _file(TARGETS["standard"])
    mask = _relation(file.builder, kind, _counted(file.builder, 3), _counted(file.builder, 2, start))
    last = reach(file.builder, mask).last
    assert last is not None
    assert last.const_value is not None
    assert last.const_value.numpy().tolist() == [bound]
