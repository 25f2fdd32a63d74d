"""Caches: new tokens are written where they belong, nobody reads what lies behind them, prompts are read by blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_samples import File
from torch import Tensor

from grape_compile.encoding import alibi
from grape_compile.errors import GrapeError
from grape_compile.export.onnx.builder import Builder
from grape_compile.export.onnx.emit_attention import attend
from grape_compile.export.onnx.emit_operators import Call
from grape_compile.export.onnx.emit_rotation import Emitted
from grape_compile.export.onnx.hold_past import hold_past
from grape_compile.export.onnx.targets import TARGETS, Target
from grape_compile.export.onnx.write_in_place import write_in_place
from grape_compile.operators import reference_attend
from grape_compile.operators.samples import BATCH, HEAD_DIM, HEADS, tensor

TOKENS = 12
#: Past and new tokens of a prompt: of three blocks, the last of them shorter, or of two behind a past.
MANY = 150
#: What lies in a buffer where no token is.
LEFT = 1e3


def _tensors(
    key_heads: int, new: int, capacity: int, tokens: int = TOKENS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of a file whose caches hold all tokens but the new ones, and queries, keys and values of all."""
    query = tensor(BATCH, HEADS, new, HEAD_DIM, dtype=torch.float32, seed=1)
    inputs = {
        "query": query,
        "input_ids": torch.zeros(BATCH, new, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, tokens, dtype=torch.int64),
    }
    whole = {"query": query}
    for seed, part in ((2, "key"), (3, "value")):
        whole[part] = tensor(BATCH, key_heads, tokens, HEAD_DIM, dtype=torch.float32, seed=seed)
        buffer = torch.full((BATCH, key_heads, capacity, HEAD_DIM), LEFT)
        buffer[:, :, : tokens - new] = whole[part][:, :, : tokens - new]
        inputs |= {f"past_key_values.0.{part}": buffer, f"new_{part}": whole[part][:, :, tokens - new :]}
    return inputs, whole


def _file(inputs: dict[str, Tensor], target: Target) -> tuple[File, list[ir.Value]]:
    """A graph that puts new keys and values behind a cache and returns them, as a model with a cache is translated."""
    file, grown = File(inputs, {}, target), []
    sizes: dict[str, list[int | str]] = {
        "input_ids": ["rows", "new"],
        "attention_mask": ["rows", "all"],
        "query": ["rows", HEADS, "new", HEAD_DIM],
    }
    for name, value in file.values.items():
        heads = inputs[name].shape[1]
        own: list[int | str] = ["rows", heads, "new" if name.startswith("new_") else "past", HEAD_DIM]
        value.shape = ir.Shape(sizes.get(name, own))
    for at in range(len(file.anchor.inputs)):
        file.anchor.replace_input_with(at, None)
    for part in ("key", "value"):
        present = file.builder.concat(
            [file.values[f"past_key_values.0.{part}"], file.values[f"new_{part}"]], 2
        )
        present.name = f"present.0.{part}"
        present.shape = ir.Shape(["rows", inputs[f"new_{part}"].shape[1], "all", HEAD_DIM])
        file.graph.outputs.append(present)
        grown.append(present)
    return file, grown


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("capacity", [TOKENS, TOKENS + 1, 4 * TOKENS])
@pytest.mark.parametrize("new", [1, 3, TOKENS])
@pytest.mark.parametrize("key_heads", [HEADS, 1])
def test_attention_over_a_buffer_is_attention_over_its_tokens(
    key_heads: int, new: int, capacity: int, target: Target
) -> None:
    inputs, whole = _tensors(key_heads, new, capacity)
    file, emitted = _attended(inputs, target, is_buffer=True)
    assert emitted.how.endswith("over a cache in place")
    found, *held = file.run(emitted)
    assert _error(found, whole) <= 5e-6
    for part, buffer in zip(("key", "value"), held, strict=True):
        assert np.array_equal(buffer[:, :, :TOKENS], whole[part].numpy())
        assert (buffer[:, :, TOKENS:] == LEFT).all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("capacity", [TOKENS + 1, 4 * TOKENS])
@pytest.mark.parametrize("new", [1, TOKENS])
def test_a_buffer_in_half_precision_is_attended_to(new: int, capacity: int, target: Target) -> None:
    """Scores up to 5 are rounded by 5 * 2^-11, and weights relatively by as much: 2.5e-3 of values up to 4."""
    inputs, whole = _tensors(HEADS, new, capacity)
    halves = {name: each.half() if each.is_floating_point() else each for name, each in inputs.items()}
    file, emitted = _attended(halves, target, is_buffer=True)
    found, *held = file.run(emitted)
    assert _error(found, {name: each.half() for name, each in whole.items()}) <= 1e-2
    assert all((buffer[:, :, TOKENS:] == LEFT).all() for buffer in held)


def _attended(inputs: dict[str, Tensor], target: Target, *, is_buffer: bool) -> tuple[File, Emitted]:
    """A file that attends to its cache with the bias of ALiBi, and its results: what it mixes, and the caches."""
    file, grown = _file(inputs, target)
    mixing = file.builder.op("Concat", file.values["query"], *grown, shape=None, axis=0)
    producer = mixing.producer()
    assert producer is not None
    if is_buffer:
        assert write_in_place(file.graph) == 2
    query, key, value = producer.inputs
    assert query is not None
    assert key is not None
    assert value is not None
    call = Call(query, key, value, alibi(HEADS), is_causal=True)
    emitted = attend(Builder(file.graph, producer), call, target)
    file.graph.remove(producer, safe=True)
    hold_past(file.graph)
    presents = list(file.graph.outputs)
    file.graph.outputs.clear()
    return file, Emitted((*emitted.values, *presents), emitted.how)


def _error(found: np.ndarray, whole: dict[str, Tensor]) -> float:
    queries, keys, values = (each.double() for each in whole.values())
    expected = reference_attend(queries, keys, values, alibi(HEADS), is_causal=True)
    return float((torch.from_numpy(found).double() - expected).abs().max())


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("capacity", [0, MANY, 4 * MANY], ids=["growing", "full", "mostly empty"])
@pytest.mark.parametrize("new", [1, 70, MANY])
def test_a_prompt_behind_a_cache_is_computed_by_blocks(new: int, capacity: int, target: Target) -> None:
    """A step beside it reads the cache where it lies; neither makes a bias of all queries, keys and heads."""
    inputs, whole = _tensors(HEADS, new, capacity or MANY - new, MANY)
    file, emitted = _attended(inputs, replace(target, loops=True), is_buffer=bool(capacity))
    step, prompt = emitted.how.split("; for more than 64 queries ")
    assert ("over a cache in place" in step) == bool(capacity)
    assert "a loop over blocks of queries" in prompt
    # What is computed before the choice between the two, in front of the results.
    shared = [value for node in file.graph if node.op_type not in ("If", "call") for value in node.outputs]
    found, *others = file.run(replace(emitted, values=(emitted.values[0], *shared, *emitted.values[1:])))
    assert _error(found, whole) <= 2e-5
    made, held = others[: len(shared)], others[-2:]
    assert new == 1 or not any(
        each.ndim == 4 and each.shape[1:3] == (HEADS, new) and each.shape[3] >= MANY for each in made
    )
    for part, buffer in zip(("key", "value"), held, strict=True):
        assert np.array_equal(buffer[:, :, :MANY], whole[part].numpy())
        assert (buffer[:, :, MANY:] == LEFT).all()


@pytest.mark.parametrize("name", ["standard", "ort"])
def test_the_operator_of_a_step_appends_to_a_growing_cache(name: str) -> None:
    inputs, _ = _tensors(HEADS, 1, MANY - 1, MANY)
    file, _ = _attended(inputs, replace(TARGETS[name], loops=True), is_buffer=False)
    assert [
        node.op_type for node in file.graph if node.op_type in ("Concat", "Attention", "MultiHeadAttention")
    ] == []
    (choice,) = (node for node in file.graph if node.op_type == "If")
    step = choice.attributes["then_branch"].as_graph()
    (operator,) = (node for node in step if "Attention" in node.op_type)
    assert len(operator.outputs) == 3
    assert list(operator.outputs[1:]) == list(step.outputs[1:])


@pytest.mark.parametrize(
    ("capacity", "columns"), [(TOKENS - 1, TOKENS), (TOKENS, 1)], ids=["full", "short mask"]
)
def test_a_token_without_a_place_is_an_error(capacity: int, columns: int) -> None:
    """A short mask would put tokens before the first, which ONNX counts from the end of the buffer."""
    inputs, _ = _tensors(HEADS, 3, capacity)
    inputs["attention_mask"] = torch.ones(BATCH, columns, dtype=torch.int64)
    file, _ = _file(inputs, TARGETS["portable"])
    write_in_place(file.graph)
    presents = list(file.graph.outputs)
    file.graph.outputs.clear()
    with pytest.raises(Exception, match="ScatterND"):
        file.run(Emitted(tuple(presents), ""))


def test_a_cache_that_is_cut_is_no_buffer() -> None:
    inputs, _ = _tensors(HEADS, 1, TOKENS)
    file, (key, _) = _file(inputs, TARGETS["standard"])
    name, key.name = key.name, "grown"
    cut = file.builder.slice(key, 1, 5, axis=3)
    cut.name, file.graph.outputs[0] = name, cut
    with pytest.raises(
        GrapeError, match=r"present.0.key is not past_key_values.0.key with new tokens behind it"
    ):
        write_in_place(file.graph)
