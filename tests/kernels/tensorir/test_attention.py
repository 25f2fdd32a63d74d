from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("tvm")

import torch
from tensorir_cases import call, compiled, double, host, operand
from torch import Tensor

from grape_compile.encoding import Encoding, alibi, fox, grape_ap, nope, parse, rope
from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.attention import attention, attention_space, hand
from grape_compile.kernels.tensorir.attention_call import Attention, supports
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.operators.reference import reference_attend, reference_bias
from grape_compile.operators.sample import BATCH, HEAD_DIM, HEADS, LENGTH, Sample
from grape_compile.operators.samples import BIASES, COMPOSITIONS, PATHS, attend_tolerance

SAMPLES = [sample for sample in (*BIASES, *PATHS, *COMPOSITIONS) if supports(sample.encoding) is True]
#: Small tiles: short programs, and block edges in short sequences.
SMALL = {"lanes": 8, "vectors": 1, "keys": 3, "columns": 5, "tiles": 2}


def heads(
    queries: int, keys: int, width: int = HEAD_DIM, kv_heads: int = HEADS, dtype: Any = None
) -> list[Tensor]:
    torch.manual_seed(queries + keys)
    shapes = [
        (BATCH, HEADS, queries, width),
        (BATCH, kv_heads, keys, width),
        (BATCH, kv_heads, keys, width + 3),
    ]
    return [torch.randn(shape, dtype=torch.float64).to(dtype or torch.float32) for shape in shapes]


def check(
    encoding: Encoding,
    tensors: list[Tensor],
    slots: Mapping[str, Tensor],
    point: Mapping[str, int] | None = SMALL,
    **options: Any,
) -> None:
    extra = {name: options.pop(name) for name in ("mask", "sinks") if name in options}
    described = {name: operand(each) for name, each in extra.items()}
    attending = Attention(
        encoding,
        *map(operand, tensors),
        slots={name: operand(slot) for name, slot in slots.items()},
        **described,
        **options,
    )
    function = compiled(attention(attending, host(), point), "attend")
    query, _, value = tensors
    output = torch.full((*query.shape[:3], value.shape[3]), 7.0, dtype=query.dtype)
    given = [*tensors, *extra.values(), *(slots[name] for name in encoding.slots)]
    hold(call(function, given, output), encoding, tensors, slots, extra, options)


def hold(
    found: Tensor,
    encoding: Encoding,
    tensors: list[Tensor],
    slots: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    wide = double({**slots, **extra})
    wanted = reference_attend(
        *(each.double() for each in tensors),
        encoding,
        {name: wide[name] for name in slots},
        **{name: wide[name] for name in extra},
        **options,
    )
    query, key, value = tensors
    repeated = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    bias = reference_bias(encoding, {name: wide[name] for name in slots}, query.shape[2], repeated)
    offset = 0.0 if "mask" not in extra or extra["mask"].dtype == torch.bool else 4.0
    tolerance = attend_tolerance(query.dtype, query, key, value, float(bias.abs().max()), offset)
    assert (found.double() - wanted).abs().amax() <= tolerance


@pytest.mark.parametrize("queries", [LENGTH, 4])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_bias_is_what_it_is_defined_to_be(sample: Sample, queries: int) -> None:
    causal = sample in PATHS or queries < LENGTH
    check(
        sample.encoding,
        heads(queries, LENGTH),
        sample.slots(torch.float32, queries=queries),
        is_causal=causal,
    )


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
    check(alibi(HEADS), heads(37, 41), {}, **dict(options))


def test_heads_of_keys_serve_several_heads_of_queries() -> None:
    check(alibi(HEADS), heads(30, 30, kv_heads=2), {}, is_causal=True)


def test_half_precision_is_rounded_once() -> None:
    check(alibi(HEADS), heads(30, 30, kv_heads=2, dtype=torch.float16), {}, is_causal=True)


def test_a_query_that_sees_no_key_gets_zero() -> None:
    """More queries than keys: the first ones stand before every key."""
    check(nope(), heads(20, 11), {}, is_causal=True)
    mask = torch.ones(1, 1, 20, 11, dtype=torch.bool)
    mask[:, :, 3] = False
    check(nope(), heads(20, 11), {}, mask=mask)
    numbers = torch.zeros(1, 1, 20, 11)
    numbers[:, :, 3] = -torch.inf
    check(nope(), heads(20, 11), {}, mask=numbers)


def test_the_lowest_number_of_a_mask_hides_nothing_where_it_is_everywhere() -> None:
    """As padded rows are masked in many models: all keys alike, so their mean."""
    query, key, value = heads(12, 12)
    numbers = torch.zeros(1, 1, 12, 12)
    numbers[:, :, 3] = torch.finfo(torch.float32).min
    attending = Attention(nope(), *map(operand, (query, key, value)), mask=operand(numbers))
    function = compiled(attention(attending, host(), SMALL), "attend")
    found = call(function, [query, key, value, numbers], torch.zeros(BATCH, HEADS, 12, HEAD_DIM + 3))
    assert torch.allclose(found[:, :, 3], value.mean(2), atol=1e-6)


def test_one_function_serves_every_length() -> None:
    encoding = parse(
        'compose((bias(alibi_slopes(4), steps), bias(uniform(-1.0), accumulated("log_forget", true))))'
    )
    names = {0: "batch", 2: "queries"}
    keys = {0: "batch", 2: "keys"}
    example = heads(8, 8)
    attending = Attention(
        encoding,
        operand(example[0], names),
        operand(example[1], keys),
        operand(example[2], keys),
        slots={"log_forget": Operand(("batch", HEADS, "keys"))},
        is_causal=True,
    )
    function = compiled(attention(attending, host(), SMALL), "attend")
    for queries, length in ((1, 1), (1, 19), (23, 23), (5, 40)):
        tensors = heads(queries, length)
        slots = {"log_forget": torch.rand(BATCH, HEADS, length).log()}
        output = torch.zeros(BATCH, HEADS, queries, HEAD_DIM + 3)
        found = call(function, [*tensors, slots["log_forget"]], output)
        hold(found, encoding, tensors, slots, {}, {"is_causal": True})


@pytest.mark.parametrize("encoding", [alibi(HEADS), fox(), grape_ap(HEADS)], ids=["alibi", "fox", "grape_ap"])
def test_the_schedule_by_hand(encoding: Encoding) -> None:
    slots = {}
    if encoding.slots == ("log_forget",):
        slots = {"log_forget": torch.rand(BATCH, HEADS, 150).log()}
    elif encoding.slots:
        slots = {name: torch.randn(BATCH, HEADS, 150, 8) for name in encoding.slots}
    check(encoding, heads(150, 150, width=33), slots, None, is_causal=True)


@pytest.mark.slow
def test_points_of_the_space_are_the_same_function() -> None:
    tensors = heads(150, 150, width=32)
    attending = Attention(alibi(HEADS), *map(operand, tensors), is_causal=True)
    points = attention_space(attending, host()).candidates()
    assert points[0] == hand(attending, host())
    for point in points[:: max(len(points) // 12, 1)]:
        check(alibi(HEADS), tensors, {}, point, is_causal=True)


def test_the_space_keeps_its_tiles_in_registers() -> None:
    attending = Attention(alibi(HEADS), *map(operand, heads(64, 64, width=32)), is_causal=True)
    points = attention_space(attending, host()).candidates()
    assert len(points) > 64
    assert all(point["keys"] * point["vectors"] < 32 for point in points)


def test_what_does_not_fit_is_said() -> None:
    tensors = [operand(each) for each in heads(8, 8)]
    with pytest.raises(OperandError, match="turns queries and keys before"):
        Attention(rope(HEAD_DIM), *tensors)
    with pytest.raises(OperandError, match="one slope for each query head"):
        Attention(alibi(8), *tensors)
    with pytest.raises(OperandError, match="a path leads from a query"):
        Attention(grape_ap(HEADS), *tensors)
    with pytest.raises(OperandError, match="none named log_forget"):
        Attention(fox(), *tensors)
    with pytest.raises(OperandError, match="a multiple of H_kv"):
        Attention(nope(), tensors[0], Operand((BATCH, 3, 8, HEAD_DIM)), Operand((BATCH, 3, 8, HEAD_DIM)))
