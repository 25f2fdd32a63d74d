"""Attention kernels against the definition in float64: values and every gradient, by the interpreter or on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from attention_cases import ABSOLUTE, CASES, GATED, HEAD, HEADS, SLOPES, Case, compare, kernels_only
from kernel_cases import DEVICE
from operator_errors import leaves
from operator_laws import only
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from grape_compile.encoding import (
    Bias,
    Compose,
    Encoding,
    Euclidean,
    Positions,
    Uniform,
    alibi,
    fox,
    grape_ap,
    nope,
    rope,
)
from grape_compile.kernels.attention_configurations import Configuration
from grape_compile.operators import attend, providers, reference_attend
from grape_compile.operators.attention import attend_call
from grape_compile.operators.providers import Provider, attend_lowering
from grape_compile.operators.samples import tensor


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    compare(CASES[name])


TILES = {"forward": (32, 16), "by_query": (16, 32), "by_key": (32, 16)}


@pytest.mark.parametrize("name", ["gated", "fox", "slopes_window"])
def test_tiles_of_other_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose tiles differ from each other's, longer one way and the other."""

    def chosen(kernel: str, call: object, capability: int | None = None) -> Configuration:
        return Configuration(*TILES[kernel], 4, 1)

    monkeypatch.setattr("grape_compile.kernels.attention.configuration", chosen)
    case = CASES[name]
    compare(Case(case.encoding, case.options, 41, 57, key_heads=2))


REFUSED: dict[str, tuple[Encoding, torch.dtype, dict[str, Any], str]] = {
    "float64": (alibi(HEADS), torch.float64, {}, "float64"),
    "path": (grape_ap(HEADS, 4), torch.float32, {"is_causal": True}, "path bias"),
    "axes": (Bias(Uniform(1.0), Positions("r"), distance=Euclidean()), torch.float32, {}, "several axes"),
    "two": (Compose((GATED, ABSOLUTE)), torch.float32, {}, "more than one"),
    "scale": (nope(), torch.float32, {"scale": -1.0}, "not positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_for_another_provider(name: str) -> None:
    encoding, dtype, options, sentence = REFUSED[name]
    query, key, value = (tensor(1, HEADS, 5, HEAD, seed=seed, dtype=dtype).to(DEVICE) for seed in range(3))
    shapes = {
        "path_query": (1, HEADS, 5, 4),
        "path_key": (1, HEADS, 5, 4),
        "r": (2, 1, 5),
        "slopes": (HEADS,),
    }
    slots = {slot: tensor(*shapes.get(slot, (5,)), dtype=dtype).to(DEVICE) for slot in encoding.slots}
    with kernels_only(), pytest.raises(Exception, match=sentence):
        attend(query, key, value, encoding, slots, **options)


def test_another_provider_is_given_queries_that_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels would turn them, but take no float64."""
    table = (
        Provider("triton", "grape_compile.kernels.attention", priority=20, turns_queries=True),
        Provider("chunked", "grape_compile.operators.chunked", priority=0),
    )
    monkeypatch.setattr(providers, "PROVIDERS", table)
    query, key, value = (tensor(1, HEADS, 5, 16, seed=seed).to(DEVICE) for seed in range(3))
    encoding = Compose((rope(16), alibi(HEADS)))
    found = attend(query[:, :, 2:], key, value, encoding, is_causal=True)
    torch.testing.assert_close(
        found, reference_attend(query[:, :, 2:], key, value, encoding, is_causal=True), rtol=1e-10, atol=1e-10
    )


def test_the_report_says_what_computes_a_layer() -> None:
    """By tensors that only stand for those of a GPU; on a CPU it is the operator."""
    with FakeTensorMode():
        query = torch.empty(1, HEADS, 20, 16, device="cuda", dtype=torch.float16)
        call = attend_call(query, query, query, [], str(nope()), None, True, None, None)
        assert attend_lowering(call) == "grape::attend by triton"
        few = torch.empty(1, HEADS, 5, 16, device="cuda", dtype=torch.float16)
        call = attend_call(few, query, query, [], str(nope()), None, True, None, None)
        assert attend_lowering(call) == "grape::attend by triton decoding"
        call = attend_call(query, query, query, [], str(nope()), None, True, -1.0, None)
        assert attend_lowering(call) == (
            "grape::attend by flex (triton: a scale of -1.0, not positive; "
            "triton path: needs one path bias and no other)"
        )
        query = torch.empty(1, HEADS, 5, HEAD)
        call = attend_call(query, query, query, [], str(alibi(HEADS)), None, True, None, None)
        assert attend_lowering(call) == "grape::attend"


@pytest.mark.parametrize("encoding", [alibi(HEADS), fox()], ids=["alibi", "fox"])
def test_error_of_a_bias_is_that_of_a_difference(encoding: Encoding) -> None:
    """Multiplied out behind the diagonal, taken first around it: no worse than the definition in float32."""
    errors = []
    for seed in range(3):
        query, key, value = (
            tensor(1, HEADS, 49, HEAD, seed=10 * seed + each, dtype=torch.float32).to(DEVICE)
            for each in range(3)
        )
        slots = {name: -tensor(1, HEADS, 49, seed=seed).abs().float().to(DEVICE) for name in encoding.slots}
        wide = {name: slot.double() for name, slot in slots.items()}
        exact = reference_attend(query.double(), key.double(), value.double(), encoding, wide, is_causal=True)
        with kernels_only():
            ours = attend(query, key, value, encoding, slots, is_causal=True)
        written = reference_attend(query, key, value, encoding, slots, is_causal=True)
        errors.append([float((found.double() - exact).norm() / exact.norm()) for found in (ours, written)])
    ours, written = (sum(column) / len(column) for column in zip(*errors, strict=True))
    assert ours <= 1.25 * written + 1e-7


def test_error_of_a_gradient_summed_over_many_tokens() -> None:
    """Of log f: a sum over all pairs around a token, in which the rounding of the output must not pile up.

    The yardstick keeps output and weights of a row in float32 while it goes back.
    """
    errors = []
    for seed in range(3):
        heads = [tensor(1, 1, 65, HEAD, seed=10 * seed + each, dtype=torch.float16) for each in range(3)]
        log_forget = -0.1 * tensor(1, 1, 65, seed=seed).abs().float()
        exact = _slot_gradient(only("chunked"), heads, log_forget, torch.float64)
        found = [
            _slot_gradient(way, heads, log_forget, torch.float16) for way in (kernels_only(), only("chunked"))
        ]
        errors.append([float((each - exact).norm() / exact.norm()) for each in found])
    ours, theirs = (sum(column) / len(column) for column in zip(*errors, strict=True))
    assert ours <= 1.25 * theirs + 1e-7


def _slot_gradient(
    way: AbstractContextManager[None], heads: list[Tensor], log_forget: Tensor, dtype: torch.dtype
) -> Tensor:
    query, key, value = (head.to(DEVICE, dtype) for head in heads)
    (slot,) = leaves(log_forget.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32))
    with way:
        output = attend(query, key, value, fox(), {"log_forget": slot}, is_causal=True)
        cotangent = tensor(*output.shape, seed=9).to(DEVICE, dtype)
        return torch.autograd.grad(output, slot, cotangent)[0].double()


def test_the_same_call_has_the_same_result() -> None:
    query, key, value = (tensor(1, HEADS, 33, HEAD, seed=seed, dtype=torch.float16) for seed in range(3))
    slopes = torch.rand(HEADS)
    runs = []
    for _ in range(2):
        parts = leaves(*(part.to(DEVICE) for part in (query, key, value, slopes)))
        with kernels_only():
            output = attend(parts[0], parts[1], parts[2], SLOPES, {"slopes": parts[3]}, is_causal=True)
            runs.append([output, *torch.autograd.grad(output.float().square().sum(), parts)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
