"""Attention kernels against the definition in float64: values and every gradient, by the interpreter or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from operator_errors import leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    Bias,
    Compose,
    Encoding,
    Euclidean,
    Gate,
    Learned,
    Positions,
    Steps,
    Uniform,
    alibi,
    fox,
    gated_alibi,
    grape_ap,
    nope,
    rope,
)
from grape_compile.kernels.attention_configurations import Configuration
from grape_compile.kernels.attention_reach import Reach
from grape_compile.kernels.attention_terms import Terms
from grape_compile.operators import attend, providers, reference_attend, reference_bias
from grape_compile.operators.attention import attend_call
from grape_compile.operators.providers import Provider, attend_lowering
from grape_compile.operators.samples import tensor, unit_roundoff

HEADS, HEAD = 2, 8
SLOPES = Bias(Learned("slopes"), Steps())
PHASE = Bias(Learned("slopes"), Accumulated("rates", False))
GATED = Bias(Learned("slopes"), Steps(), gate=Gate("gate_query", "gate_key"))
ABSOLUTE = Bias(Learned("slopes"), Positions("times"), distance=Absolute())
CLOCKED = Bias(Learned("slopes"), Positions("times"), gate=Gate("gate_query", "gate_key"))
EVERYTHING = Compose(
    (
        rope(HEAD),
        alibi(HEADS),
        fox(),
        Bias(Learned("slopes"), Positions("times"), gate=Gate(key="gate_key"), distance=Absolute()),
    )
)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Leave the kernels alone to compute `grape::attend`, wherever they run."""
    before = providers.PROVIDERS
    providers.PROVIDERS = (Provider("triton", "grape_compile.kernels.attention", priority=20),)
    try:
        yield
    finally:
        providers.PROVIDERS = before


@dataclass(frozen=True)
class Case:
    """Tiles of 16 by 16: by default two of queries over three of keys, the last of each ragged."""

    encoding: Encoding
    options: dict[str, Any] = field(default_factory=lambda: {"is_causal": True})
    queries: int = 25
    keys: int = 33
    key_heads: int = 1
    values: int = HEAD
    head: int = HEAD
    dtype: torch.dtype = torch.float32
    mask: str = ""
    batch: int = 1


OPEN: dict[str, Any] = {}
WINDOW = {"is_causal": True, "window": 12}
CASES = {
    "none": Case(nope()),
    "none_open": Case(nope(), OPEN, values=20, dtype=torch.float16),
    "none_band": Case(nope(), {"window": 12, "scale": 0.5}),
    "no_keys_for_some": Case(alibi(HEADS), queries=33, keys=17),
    "alibi": Case(alibi(HEADS), key_heads=2, batch=2, queries=17, keys=17),
    "alibi_open": Case(alibi(HEADS), OPEN, dtype=torch.float16),
    "slopes_window": Case(SLOPES, WINDOW),
    "slopes_band": Case(SLOPES, {"window": 12}),
    "fox": Case(fox(), head=20),
    "phase": Case(PHASE, OPEN),
    "gated": Case(GATED),
    "gated_window": Case(gated_alibi(HEADS, query=None), WINDOW),
    "gated_clock": Case(CLOCKED),
    "absolute": Case(ABSOLUTE, OPEN),
    "everything": Case(EVERYTHING, key_heads=2),
    "summed": Case(
        Compose((Bias(Uniform(0.25), Positions("times")), Bias(Uniform(0.5), Accumulated("rates", True)))),
        {"is_causal": True},
    ),
    "mask_of_keys": Case(SLOPES, mask="keys", batch=2, queries=17, keys=17),
    "mask_of_numbers": Case(fox(), OPEN, mask="numbers", queries=17, keys=17),
    "lowest_numbers": Case(gated_alibi(HEADS, key=None), mask="lowest", queries=17, keys=17),
}


def slots_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Slots of every kind, in float32: slopes and gates above zero, log f below."""
    shapes = {
        "slopes": (HEADS,),
        "gate_query": (case.batch, HEADS, case.queries),
        "gate_key": (1, HEADS, case.keys),
        "rates": (case.batch, case.keys),
        "times": (case.keys,),
        "log_forget": (case.batch, HEADS, case.keys),
    }
    found = {name: tensor(*shapes[name], seed=seed + 20).abs() for name in case.encoding.slots}
    found |= {name: -slot for name, slot in found.items() if name == "log_forget"}
    return {name: slot.float().to(DEVICE) for name, slot in found.items()}


def mask_of(case: Case) -> Tensor | None:
    if not case.mask:
        return None
    hidden = torch.zeros(case.batch, 1, 1, case.keys, dtype=torch.bool)
    hidden[-1, ..., :5] = True
    if case.mask == "keys":
        return (~hidden).to(DEVICE)
    if case.mask == "numbers":
        return tensor(1, HEADS, case.queries, case.keys, seed=30, dtype=torch.float32).to(DEVICE)
    # As models write padding: rows of the padding are the lowest number from end to end, and softmax is their mean.
    lowest = torch.zeros(case.batch, 1, case.queries, case.keys)
    lowest.masked_fill_(hidden | torch.ones(case.queries, case.keys, dtype=torch.bool).triu(1), -math.inf)
    return lowest.clamp_(min=torch.finfo(torch.float32).min).to(DEVICE)


def compare(case: Case) -> None:
    """Values, and gradients for a random cotangent of queries, keys, values and every floating slot."""
    shapes = [
        (case.batch, HEADS, case.queries, case.head),
        (case.batch, case.key_heads, case.keys, case.head),
        (case.batch, case.key_heads, case.keys, case.values),
    ]
    heads = [tensor(*shape, seed=seed, dtype=case.dtype).to(DEVICE) for seed, shape in enumerate(shapes)]
    slots, mask = slots_of(case), mask_of(case)
    results: list[list[Tensor]] = []
    cotangent = tensor(case.batch, HEADS, case.queries, case.values, seed=9, dtype=case.dtype).to(DEVICE)
    functions: tuple[tuple[Callable[..., Tensor], bool], ...] = ((attend, False), (reference_attend, True))
    for function, wide in functions:
        parts = leaves(*(part.double() if wide else part for part in heads))
        filled = dict(
            zip(slots, leaves(*(slot.double() if wide else slot for slot in slots.values())), strict=True)
        )
        with kernels_only():
            output = function(*parts, case.encoding, filled, mask=mask, **case.options)
            assert output.dtype == parts[0].dtype
            found = torch.autograd.grad(output, [*parts, *filled.values()], cotangent.to(output.dtype))
        results.append([output, *found])
    # A number is a sum of at most T + D products, off by as many roundings; weights, their gradients and results are
    # rounded to the dtype once each, and a gradient is a difference of two such numbers.
    bound = 8 * (case.keys + case.head) * unit_roundoff(torch.float32) + 8 * unit_roundoff(case.dtype)
    for ours, wanted in zip(*results, strict=True):
        assert ours.shape == wanted.shape
        error = float(((ours.double() - wanted).norm() / (wanted.norm() + 1e-30)).detach())
        assert error <= bound, (case, error, bound)


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


def test_the_report_says_what_computes_a_layer() -> None:
    """By tensors that only stand for those of a GPU; on a CPU it is the operator."""
    with FakeTensorMode():
        query = torch.empty(1, HEADS, 5, HEAD, device="cuda", dtype=torch.float16)
        call = attend_call(query, query, query, [], str(nope()), None, True, None, None)
        assert attend_lowering(call) == "grape::attend by triton"
        call = attend_call(query, query, query, [], str(nope()), None, True, -1.0, None)
        assert attend_lowering(call) == "grape::attend by chunked (triton: a scale of -1.0, not positive)"
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
    """Of log f, a sum over all pairs around a token, in which the rounding of the output must not pile up (contract)."""
    errors = []
    for seed in range(3):
        heads = [tensor(1, 1, 65, HEAD, seed=10 * seed + each, dtype=torch.float16) for each in range(3)]
        log_forget = -0.1 * tensor(1, 1, 65, seed=seed).abs().float()
        cotangent = tensor(1, 1, 65, HEAD, seed=9)
        found = []
        for function, dtype in ((attend, torch.float16), (_eager, torch.float16), (_eager, torch.float64)):
            query, key, value = (head.to(DEVICE, dtype) for head in heads)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            (slot,) = leaves(log_forget.to(DEVICE, wide))
            with kernels_only():
                output = function(query, key, value, fox(), {"log_forget": slot}, is_causal=True)
            found.append(torch.autograd.grad(output, slot, cotangent.to(DEVICE, dtype))[0].double())
        exact = found.pop()
        errors.append([float((each - exact).norm() / exact.norm()) for each in found])
    ours, eager = (sum(column) / len(column) for column in zip(*errors, strict=True))
    assert ours <= 1.25 * eager + 1e-7


def _eager(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, slots: Any, is_causal: bool
) -> Tensor:
    """As models write it: a bias matrix in the dtype of the heads, softmax in float32 or more."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = reference_bias(encoding, slots, query.shape[2], key.to(wide)).to(query.dtype)
    logits = (query @ key.mT) * query.shape[3] ** -0.5 + bias
    hidden = torch.ones(logits.shape[2:], dtype=torch.bool, device=query.device).triu(1)
    return logits.masked_fill(hidden, -math.inf).softmax(-1, dtype=wide).to(query.dtype) @ value


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


LENGTH = 81
#: Heads of which the first forgets within a few tiles of 16 keys, and the last does not.
FORGETTING: dict[str, tuple[Encoding, dict[str, Tensor]]] = {
    "slopes": (SLOPES, {"slopes": torch.tensor([8.0, 0.01])}),
    "fox": (fox(), {"log_forget": -torch.tensor([8.0, 0.0])[:, None] * torch.ones(1, HEADS, LENGTH)}),
    "gated": (
        GATED,
        {
            "slopes": torch.tensor([6.0, -6.0]),
            "gate_query": 1 + torch.rand(1, HEADS, LENGTH),
            "gate_key": torch.rand(1, HEADS, LENGTH),
        },
    ),
    "absolute": (ABSOLUTE, {"slopes": torch.tensor([8.0, -8.0]), "times": torch.arange(float(LENGTH))}),
    "backwards": (
        Bias(Learned("slopes"), Positions("times")),
        {"slopes": torch.tensor([8.0, -8.0]), "times": torch.arange(float(LENGTH))},
    ),
}


def reach_of(name: str, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], Reach]:
    encoding, slots = FORGETTING[name]
    query, key, value = (
        tensor(1, HEADS, LENGTH, HEAD, seed=seed + each, dtype=torch.float32) for each in range(3)
    )
    operands = [slots[slot] for slot in encoding.slots]
    call = attend_call(query, key, value, operands, str(encoding), None, True, None, None)
    return (query, key, value), Reach(call, Terms(call), 16, 16)


@pytest.mark.parametrize("name", FORGETTING)
def test_keys_left_out_weigh_less_than_a_rounding(name: str) -> None:
    """Some are left out of the first head, none where nothing is forgotten; by the weights of the definition."""
    encoding, slots = FORGETTING[name]
    for seed in range(0, 30, 3):
        (query, key, _), reach = reach_of(name, seed)
        value = torch.eye(LENGTH, dtype=torch.float64).expand(1, HEADS, LENGTH, LENGTH)
        wide = {slot: numbers.double() for slot, numbers in slots.items()}
        weights = reference_attend(query.double(), key.double(), value, encoding, wide, is_causal=True)
        first, last = (
            found.repeat_interleave(16, -1)[..., :LENGTH] for found in (reach.first(), reach.last())
        )
        tiles = torch.arange(LENGTH) // 16
        before = tiles[None, None, None, :] < first[..., :, None]
        behind = tiles[None, None, :, None] >= last[..., None, :]
        for left_out in (before, behind):
            assert float((weights * left_out).sum(-1).max()) < 2.0**-26
            assert bool(left_out[0, 0].tril().any())
            assert not bool(left_out[0, 1].tril().any())


def test_an_output_without_the_tiles_left_out_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit; gradients to a rounding of their largest."""
    encoding, slots = FORGETTING["slopes"]
    heads, _ = reach_of("slopes")
    results = []
    for shortest in (0, 10**9):
        monkeypatch.setattr("grape_compile.kernels.attention_reach.SHORTEST", shortest)
        query, key, value = leaves(*(head.to(DEVICE) for head in heads))
        with kernels_only():
            output = attend(
                query, key, value, encoding, {"slopes": slots["slopes"].to(DEVICE)}, is_causal=True
            )
        found = torch.autograd.grad(output.square().sum(), (query, key, value))
        results.append([output.detach(), *found])
    assert torch.equal(results[0][0], results[1][0])
    for pruned, whole in zip(*results, strict=True):
        bound = 4 * unit_roundoff(torch.float32) * float(whole.abs().max())
        torch.testing.assert_close(pruned, whole, rtol=0.0, atol=bound)


def test_tiles_are_looked_at_in_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tiles are left out, none that would not be otherwise."""
    query, key, value = (tensor(1, HEADS, 100, HEAD, seed=seed, dtype=torch.float32) for seed in range(3))
    call = attend_call(query, key, value, [torch.tensor([6.0, 3.0])], str(SLOPES), None, True, None, None)
    fine = Reach(call, Terms(call), 4, 8)
    monkeypatch.setattr("grape_compile.kernels.attention_reach.MOST", 5)
    coarse = Reach(call, Terms(call), 4, 8)
    assert fine.first().shape == coarse.first().shape == (1, HEADS, 25)
    assert fine.last().shape == coarse.last().shape == (1, HEADS, 13)
    assert bool((coarse.first() <= fine.first()).all())
    assert bool((coarse.last() >= fine.last()).all())
    assert bool(coarse.first().any())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(
    "name", ["none", "alibi", "slopes_window", "fox", "phase", "gated", "gated_clock", "absolute"]
)
def test_on_hardware(name: str, head: int, dtype: torch.dtype) -> None:
    """Tiles of the default configurations, ragged ends, all kinds of numbers."""
    case = CASES[name]
    options = {key: 300 if key == "window" else value for key, value in case.options.items()}
    compare(Case(case.encoding, options, 700, 900, 1, head, head, dtype, batch=2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("encoding", [alibi(HEADS), fox()], ids=["alibi", "fox"])
def test_long_sequences_on_hardware(encoding: Encoding) -> None:
    """The last 64 of 65536 queries, against the definition over all keys."""
    length = 65536
    query, key, value = (
        tensor(1, HEADS, length, 64, seed=seed, dtype=torch.bfloat16).to(DEVICE) for seed in range(3)
    )
    slots = {
        name: -0.01 * tensor(1, HEADS, length, seed=5).abs().float().to(DEVICE) for name in encoding.slots
    }
    with kernels_only():
        found = attend(query, key, value, encoding, slots, is_causal=True)[:, :, -64:]
    wide = {name: slot.double() for name, slot in slots.items()}
    wanted = reference_attend(
        query[:, :, -64:].double(), key.double(), value.double(), encoding, wide, is_causal=True
    )
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= 8 * unit_roundoff(torch.bfloat16)
