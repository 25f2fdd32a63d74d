"""The attention that compilers are given: every encoding and option, grouped heads, few queries and many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_errors import gradients, largest_difference, leaves
from operator_laws import sequence_axes
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from grape_compile.encoding import Encoding, alibi
from grape_compile.operators import attend_decomposition, attention, reference_attend, reference_bias
from grape_compile.operators.operands import slot_list
from grape_compile.operators.samples import (
    BATCH,
    BIASES,
    COMPOSITIONS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    PATHS,
    Sample,
    attend_tolerance,
    tensor,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "one query": {"is_causal": True},
    "three queries": {"is_causal": True, "window": 4, "mask": tensor(BATCH, 1, 1, LENGTH, seed=5)},
    "everything": {
        "is_causal": True,
        "mask": tensor(HEADS, 1, LENGTH, seed=6) > -1,
        "scale": 0.5,
        "cap": 0.75,
        "sinks": tensor(HEADS, seed=7),
        "segments": torch.arange(LENGTH) // 5,
    },
}
QUERIES = {"one query": 1, "three queries": 3, "everything": LENGTH}


def dense_attend(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, slots: dict[str, Tensor], **given: Any
) -> Tensor:
    options = [given.get(name, False if name == "is_causal" else None) for name in attention.OPTIONS]
    return attend_decomposition(query, key, value, slot_list(encoding, slots), str(encoding), *options)[0]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sample", [*BIASES, *PATHS, *COMPOSITIONS], ids=lambda sample: sample.name)
def test_it_is_the_definition(sample: Sample, name: str) -> None:
    """Two query heads share a key head; in bfloat16 keys are cast on their way into the product."""
    slots = sample.slots(queries=QUERIES[name])
    sizes = [(HEADS, QUERIES[name]), (HEADS // 2, LENGTH), (HEADS // 2, LENGTH)]
    parts = [tensor(BATCH, *size, HEAD_DIM, seed=seed) for seed, size in enumerate(sizes)]
    results = []
    for function in (dense_attend, reference_attend):
        query, key, value, *filled = leaves(*parts, *slots.values())
        found = function(
            query, key, value, sample.encoding, dict(zip(slots, filled, strict=True)), **OPTIONS[name]
        )
        results.append([found, *gradients([found], [query, key, value, *filled])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)
    narrow = [part.bfloat16() for part in parts]
    found = dense_attend(narrow[0], narrow[1], narrow[2], sample.encoding, slots, **OPTIONS[name])
    query, key, value = (part.double() for part in narrow)
    wanted = reference_attend(query, key, value, sample.encoding, slots, **OPTIONS[name])
    steep = float(reference_bias(sample.encoding, slots, QUERIES[name], key).abs().max())
    assert largest_difference(found, wanted) <= attend_tolerance(
        torch.bfloat16, narrow[0], narrow[1], narrow[2], steep
    )


def test_a_row_without_a_key_is_zero() -> None:
    query, key, value = leaves(*(tensor(1, HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in range(3)))
    hidden = torch.arange(LENGTH)[:, None].expand(LENGTH, LENGTH) != 2
    found = dense_attend(query, key, value, alibi(HEADS), {}, mask=hidden)
    assert not found[:, :, 2].any()
    assert all(part.isfinite().all() for part in gradients([found], [query, key, value]))
    none = dense_attend(query, key[:, :, :0], value[:, :, :0], alibi(HEADS), {})
    assert none.shape == query.shape
    assert not none.any()


LENGTHENED = ("alibi", "learned_clock", "fox", "gated_both", "grape_ap")


@pytest.mark.parametrize(
    "sample", [each for each in (*BIASES, *PATHS) if each.name in LENGTHENED], ids=lambda sample: sample.name
)
def test_a_compiler_keeps_the_product_of_one_query(sample: Sample) -> None:
    """A `baddbmm` with the keys as they lie, in a graph that holds at every length, within a window or beyond it."""

    def function(query: Tensor, key: Tensor, slots: dict[str, Tensor]) -> Tensor:
        return dense_attend(query, key, key, sample.encoding, slots, is_causal=True, window=5)

    query, key = tensor(BATCH, HEADS, 1, HEAD_DIM), tensor(BATCH, HEADS // 2, LENGTH, HEAD_DIM, seed=1)
    graph = make_fx(function, tracing_mode="symbolic")(query, key[:, :, :7], until(7, sample))
    nodes = [node.target for node in graph.graph.nodes]
    assert nodes.count(torch.ops.aten.baddbmm.default) == 1
    assert torch.ops.aten.index.Tensor not in nodes
    for length in (3, LENGTH):
        operands = query, key[:, :, :length], until(length, sample)
        torch.testing.assert_close(graph(*operands), function(*operands), rtol=1e-12, atol=1e-12)


def until(length: int, sample: Sample) -> dict[str, Tensor]:
    """Slots for one query at the end of `length` keys."""
    slots, axes = sample.slots(queries=1), sequence_axes(sample.encoding)
    return {
        name: slot.narrow(axes[name], 0, min(length, slot.shape[axes[name]])) if name in axes else slot
        for name, slot in slots.items()
    }
