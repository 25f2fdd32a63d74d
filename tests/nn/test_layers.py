"""Layers for models written by hand: attention with any encoding, whole, streamed, traced and exported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grape_compile.encoding import Positions, alibi, fox, rope
from grape_compile.errors import OperandError
from grape_compile.export.onnx import export
from grape_compile.nn import (
    AdditiveGRAPE,
    GRAPEAttention,
    LearnedRotation,
    MixedRotation,
    PathIntegralGRAPE,
    RotaryGRAPE,
    StreamingCache,
)
from grape_compile.operators import reference_attend, reference_rotate

BATCH, HEADS, KEY_HEADS, LENGTH, SIZE, HIDDEN = 2, 4, 2, 9, 8, 32
NAMES = (
    *("nope", "rope", "alibi", "grape-m", "grape-m-ctx", "grape-a-q", "grape-a-k", "grape-a-qk", "fox"),
    *("grape-ap", "grape-m+grape-ap", "rope+fox"),
)
names = pytest.mark.parametrize("name", NAMES)


def layer(name: str, dtype: torch.dtype = torch.float64) -> GRAPEAttention:
    """Attention over fewer keys, its encoding not at its start."""
    torch.manual_seed(0)
    encodings = {
        "cayley": LearnedRotation(rope(SIZE), basis="cayley"),
        "mixed": MixedRotation(rope(SIZE), 4, basis="householder"),
    }
    made = GRAPEAttention(HIDDEN, HEADS, encodings.get(name, name), key_heads=KEY_HEADS, bias=True)
    with torch.no_grad():
        for parameter in made.grape.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.to(dtype)


def hidden(dtype: torch.dtype = torch.float64, length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype)


def heads(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, count, LENGTH, SIZE, generator=random, dtype=dtype)


@names
def test_attention_is_the_reference_between_projections(name: str) -> None:
    attention, states = layer(name), hidden()
    query, key, value = (
        proj(states).view(BATCH, LENGTH, -1, SIZE).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    slots = attention.grape(states, query, key)
    out = reference_attend(query, key, value, attention.encoding, slots, is_causal=True, scale=0.3)
    expected = attention.o_proj(out.transpose(1, 2).reshape(BATCH, LENGTH, -1))
    torch.testing.assert_close(attention(states, scale=0.3), expected, rtol=0, atol=1e-12)


@names
def test_streaming_is_the_whole(name: str) -> None:
    attention, states = layer(name), hidden()
    with torch.no_grad():
        whole = attention(states)
        cache = attention.new_cache()
        pieces = [attention(piece, cache=cache) for piece in states.split((4, 1, 3, 1), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


@names
def test_training_reaches_every_parameter(name: str) -> None:
    attention = layer(name, torch.float32)
    out = attention(hidden(torch.float32))
    out.backward(torch.randn_like(out))
    # A number that is the same for all keys of a row: softmax does not see it.
    unseen = {"k_proj.bias"} if name in {"nope", "alibi", "fox"} else set()
    for parameter_name, parameter in attention.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0 or parameter_name in unseen


@pytest.mark.parametrize("name", ["grape-m-ctx", "grape-a-qk", "rope+fox", "grape-ap", "cayley", "mixed"])
def test_traces(name: str) -> None:
    """torch.export, Dynamo and torch.func see what runs: the numbers are the same."""
    attention, states = layer(name), hidden()
    expected = attention(states)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(attention, (states,), dynamic_shapes={"hidden": axes})
    torch.testing.assert_close(program.module()(states), expected, rtol=0, atol=1e-12)
    longer = hidden(length=14)
    torch.testing.assert_close(program.module()(longer), attention(longer), rtol=0, atol=1e-12)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(states), expected, rtol=0, atol=1e-12)
    parameters = {key: value.detach() for key, value in attention.named_parameters()}

    def loss(own: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(attention, own, (states,))
        return out.square().sum()

    attention(states).square().sum().backward()
    for key, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, attention.get_parameter(key).grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in (*NAMES, "cayley"))]
)
def test_is_exported_to_onnx(name: str, tmp_path: Path) -> None:
    """The export runs the file and holds it to the model in float64."""
    report = export(layer(name, torch.float32).eval(), (hidden(torch.float32),), path=tmp_path / "layer.onnx")
    assert report.comparisons


def test_rotary_turns_queries_and_keys() -> None:
    query, key = heads(HEADS, 0), heads(KEY_HEADS, 1)
    rotary = RotaryGRAPE(HIDDEN, HEADS).double()
    for found, expected in zip(rotary(query, key), reference_rotate([query, key], rope(SIZE)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    places = torch.arange(LENGTH) + 7
    by_place = RotaryGRAPE(HIDDEN, HEADS, rope(SIZE).by(Positions("n")))
    later = by_place(query, key, slots={"n": places})
    torch.testing.assert_close(
        later[0] @ later[1][:, :1].mT, rotary(query, key)[0] @ rotary(query, key)[1][:, :1].mT
    )


def test_additive_stands_where_fused_attention_stood() -> None:
    query, key, value = heads(HEADS, 0), heads(HEADS, 1), heads(HEADS, 2)
    additive = AdditiveGRAPE(HIDDEN, HEADS, alibi(HEADS))
    seen = torch.ones(LENGTH, LENGTH).tril().bool() & (torch.arange(LENGTH) != 2)
    seen[2, 0] = True
    slopes = torch.tensor([2.0 ** (-2 * (head + 1)) for head in range(HEADS)])
    places = torch.arange(LENGTH, dtype=torch.float64)
    bias = slopes[:, None, None] * (places[None, :] - places[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, bias.masked_fill(~seen, -math.inf), scale=0.5
    )
    found = additive(query, key, value, attn_mask=seen, scale=0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    floats = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(
        additive(query, key, value, attn_mask=floats, scale=0.5), expected, rtol=0, atol=1e-12
    )


def test_a_path_sums_its_edges() -> None:
    query, key, value = heads(HEADS, 0), heads(HEADS, 1), heads(HEADS, 2)
    path = PathIntegralGRAPE(HIDDEN, HEADS).double()
    states = hidden()
    expected = reference_attend(query, key, value, path.encoding, path.grape(states), is_causal=True)
    torch.testing.assert_close(path(query, key, value, states, is_causal=True), expected, rtol=0, atol=1e-12)


def test_a_cache_is_cropped() -> None:
    attention, states = layer("rope+fox"), hidden()
    with torch.no_grad():
        cache = attention.new_cache()
        attention(states, cache=cache)
        cache.crop(4)
        again = attention(states[:, 4:], cache=cache)
        torch.testing.assert_close(again, attention(states)[:, 4:], rtol=0, atol=1e-12)


def _wrong() -> dict[str, tuple[Callable[[], object], str]]:
    query, key, value = heads(HEADS, 0), heads(HEADS, 1), heads(HEADS, 2)
    attention, states = layer("fox"), hidden()
    return {
        "size": (lambda: GRAPEAttention(30, 4), "as `head_dim`"),
        "groups": (lambda: GRAPEAttention(32, 4, key_heads=3), "a divisor of 4"),
        "a_bias_turns": (lambda: RotaryGRAPE(32, 4, "fox"), "only Multiplicative"),
        "a_rotation_adds": (lambda: AdditiveGRAPE(32, 4, "rope+fox"), "GRAPEAttention takes all"),
        "no_path": (lambda: PathIntegralGRAPE(32, 4, "alibi"), "only PathBias"),
        "no_states": (lambda: AdditiveGRAPE(32, 4, "fox")(query, key, value), "`hidden` [B, T, hidden_size]"),
        "no_slot": (lambda: AdditiveGRAPE(32, 4, fox())(query, key, value), "a mapping with log_forget"),
        "two_axes": (lambda: attention(states[0]), "[B, T, 32]"),
        "channels": (lambda: attention(states[..., :31]), "[B, T, 32]"),
        "future": (lambda: attention(states, is_causal=False, cache=attention.new_cache()), "holds the past"),
        "cache": (lambda: attention(states, cache=StreamingCache(alibi(4))), "`new_cache()`"),
        "path_both_ways": (lambda: layer("grape-ap")(states, is_causal=False), "is_causal=True"),
        "mask": (lambda: attention(states, attn_mask=torch.ones(3, 3).bool()), "broadcasts"),
    }


@pytest.mark.parametrize("name", _wrong())
def test_what_does_not_fit(name: str) -> None:
    wrong, works = _wrong()[name]
    with pytest.raises(OperandError) as caught:
        wrong()
    assert works in caught.value.works
