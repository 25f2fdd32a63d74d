from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("tvm")

import torch
from tensorir_cases import Case, call, compiled, heads, host, operand

from grape_compile.encoding import Encoding, alibi, fox, grape_ap, nope, parse, rope
from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.attention import attention, attention_space, hand
from grape_compile.kernels.tensorir.attention_call import Attention, supports
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.operators.sample import BATCH, HEAD_DIM, HEADS, LENGTH, Sample
from grape_compile.operators.samples import BIASES, COMPOSITIONS, PATHS

SAMPLES = [sample for sample in (*BIASES, *PATHS, *COMPOSITIONS) if supports(sample.encoding) is True]
CAUSAL: Mapping[str, Any] = {"is_causal": True}
#: Small tiles: short programs, and block edges in short sequences.
SMALL = {"lanes": 8, "vectors": 1, "keys": 3, "columns": 5, "tiles": 2}


def check(case: Case, point: Mapping[str, int] | None = SMALL) -> None:
    function = compiled(attention(case.described(), host(), point), "attend")
    case.hold(call(function, list(case.named.values()), case.output()))


@pytest.mark.parametrize(
    ("sample", "queries"),
    [
        # Both bodies in the quick run, each with half of the samples; paths with both.
        pytest.param(sample, queries, id=f"{sample.name}-{queries}", marks=marks)
        for number, sample in enumerate(SAMPLES)
        for queries in (LENGTH, 4)
        for marks in [() if sample.name.startswith("grape") or (number + queries) % 2 else pytest.mark.slow]
    ],
)
def test_a_bias_is_what_it_is_defined_to_be(sample: Sample, queries: int) -> None:
    causal = sample in PATHS or queries < LENGTH
    slots = sample.slots(torch.float32, queries=queries)
    check(Case(sample.encoding, heads(queries, LENGTH), slots, {"is_causal": causal}))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False},
        {"is_causal": True, "window": 7},
        {"window": 3},
        {"is_causal": True, "cap": 2.0, "scale": 0.4},
        {"is_causal": True, "sinks": torch.tensor([[0.5, -1.0, 2.0, 0.0]])},
        {"mask": torch.rand(BATCH, 1, 37, 41, generator=torch.Generator().manual_seed(1)) > 0.5},
        {"mask": torch.randn(1, HEADS, 1, 41, generator=torch.Generator().manual_seed(2))},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_a_query_sees(options: dict[str, Any]) -> None:
    check(Case(alibi(HEADS), heads(37, 41), {}, options))


def test_heads_of_keys_serve_several_heads_of_queries() -> None:
    check(Case(alibi(HEADS), heads(30, 30, kv_heads=2), {}, CAUSAL))


def test_half_precision_is_rounded_once() -> None:
    check(Case(alibi(HEADS), heads(30, 30, kv_heads=2, dtype=torch.float16), {}, CAUSAL))


def test_a_query_that_sees_no_key_gets_zero() -> None:
    """More queries than keys: the first ones stand before every key."""
    check(Case(nope(), heads(20, 11), {}, CAUSAL))
    mask = torch.ones(1, 1, 20, 11, dtype=torch.bool)
    mask[:, :, 3] = False
    check(Case(nope(), heads(20, 11), {}, {"mask": mask}))
    numbers = torch.zeros(1, 1, 20, 11)
    numbers[:, :, 3] = -torch.inf
    check(Case(nope(), heads(20, 11), {}, {"mask": numbers}))


def test_the_lowest_number_of_a_mask_hides_nothing_where_it_is_everywhere() -> None:
    """As padded rows are masked in many models: all keys alike, so their mean."""
    numbers = torch.zeros(1, 1, 12, 12)
    numbers[:, :, 3] = torch.finfo(torch.float32).min
    case = Case(nope(), heads(12, 12), {}, {"mask": numbers})
    function = compiled(attention(case.described(), host(), SMALL), "attend")
    found = call(function, list(case.named.values()), case.output())
    assert torch.allclose(found[:, :, 3], case.heads[2].mean(2), atol=1e-6)


def test_one_function_serves_every_length() -> None:
    encoding = parse(
        'compose((bias(alibi_slopes(4), steps), bias(uniform(-1.0), accumulated("log_forget", true))))'
    )
    names = {0: "batch", 2: "queries"}
    keys = {0: "batch", 2: "keys"}
    query, key, value = heads(8, 8)
    attending = Attention(
        encoding,
        operand(query, names),
        operand(key, keys),
        operand(value, keys),
        slots={"log_forget": Operand(("batch", HEADS, "keys"))},
        is_causal=True,
    )
    function = compiled(attention(attending, host(), SMALL), "attend")
    for queries, length in ((1, 1), (1, 19), (23, 23), (5, 40)):
        slots = {"log_forget": torch.rand(BATCH, HEADS, length).log()}
        case = Case(encoding, heads(queries, length), slots, CAUSAL)
        case.hold(call(function, list(case.named.values()), case.output()))


@pytest.mark.parametrize("encoding", [alibi(HEADS), fox(), grape_ap(HEADS)], ids=["alibi", "fox", "grape_ap"])
def test_the_schedule_by_hand(encoding: Encoding) -> None:
    slots: dict[str, torch.Tensor] = {}
    if encoding.slots == ("log_forget",):
        slots = {"log_forget": torch.rand(BATCH, HEADS, 150).log()}
    elif encoding.slots:
        slots = {name: torch.randn(BATCH, HEADS, 150, 8) for name in encoding.slots}
    check(Case(encoding, heads(150, 150, width=33), slots, CAUSAL), None)


@pytest.mark.slow
def test_points_of_the_space_are_the_same_function() -> None:
    case = Case(alibi(HEADS), heads(150, 150, width=32), {}, CAUSAL)
    points = attention_space(case.described(), host()).candidates()
    assert points[0] == hand(case.described(), host())
    for point in points[:: max(len(points) // 12, 1)]:
        check(case, point)


def test_the_space_keeps_its_tiles_in_registers() -> None:
    case = Case(alibi(HEADS), heads(64, 64, width=32), {}, CAUSAL)
    points = attention_space(case.described(), host()).candidates()
    assert len(points) > 64
    assert all(point["keys"] * point["vectors"] < 32 for point in points)


def test_what_does_not_fit_is_said() -> None:
    query, key, value = map(operand, heads(8, 8))
    with pytest.raises(OperandError, match="turns queries and keys before"):
        Attention(rope(HEAD_DIM), query, key, value)
    with pytest.raises(OperandError, match="one slope for each query head"):
        Attention(alibi(8), query, key, value)
    with pytest.raises(OperandError, match="a path leads from a query"):
        Attention(grape_ap(HEADS), query, key, value)
    with pytest.raises(OperandError, match="none named log_forget"):
        Attention(fox(), query, key, value)
    with pytest.raises(OperandError, match="a multiple of H_kv"):
        Attention(nope(), query, Operand((BATCH, 3, 8, HEAD_DIM)), Operand((BATCH, 3, 8, HEAD_DIM)))
