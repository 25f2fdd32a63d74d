"""How exact attention is: 1e-12 in float64, derived tolerances elsewhere, values and gradients."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from operator_errors import NARROW, gradients, largest_difference, leaves
from operator_laws import only
from torch import Tensor

from grape_compile.encoding import (
    Compose,
    alibi,
    nope,
    rope,
)
from grape_compile.operators import attend, reference_attend, reference_bias, reference_rotate, rotate
from grape_compile.operators.samples import (
    BATCH,
    BIASES,
    COMPOSITIONS,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    PATHS,
    ROTATIONS,
    Sample,
    attend_gradient_tolerance,
    attend_tolerance,
    tensor,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "open": {},
    "window": {"is_causal": True, "window": 4},
    "band": {"window": 4},
}


def check_attention(
    sample: Sample,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int, int, int] = (LENGTH, LENGTH, HEADS, HEAD_DIM),
    mask: Tensor | None = None,
    provider: str = "operator",
    offset: float = 0.0,
) -> None:
    """Values and gradients against the reference, by the provider that is chosen or by one alone."""
    with nullcontext() if provider == "operator" else only(provider):
        _check_attention(sample, options, dtype, shape, mask, offset)


def _check_attention(
    sample: Sample,
    options: dict[str, Any],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    mask: Tensor | None,
    offset: float,
) -> None:
    queries, keys, key_heads, values = shape
    shapes = [
        (BATCH, HEADS, queries, HEAD_DIM),
        (BATCH, key_heads, keys, HEAD_DIM),
        (BATCH, key_heads, keys, values),
    ]
    parts = leaves(*(tensor(*sizes, seed=seed, dtype=dtype) for seed, sizes in enumerate(shapes)))
    wide = leaves(*(part.double() for part in parts))
    slots = sample.slots(queries=queries)
    learned, exact = (dict(zip(slots, leaves(*slots.values()), strict=True)) for _ in range(2))
    query, key, value = parts
    found = attend(query, key, value, sample.encoding, learned, mask=mask, **options)
    wanted = reference_attend(wide[0], wide[1], wide[2], sample.encoding, exact, mask=mask, **options)
    assert found.dtype == dtype
    bias = reference_bias(sample.encoding, slots, queries, wide[1].detach())
    tolerance = attend_tolerance(dtype, query, key, value, float(bias.abs().max()), offset)
    assert largest_difference(found, wanted) <= tolerance
    if dtype == torch.float64 and not offset:
        assert largest_difference(found, wanted) <= 1e-12
    if dtype == torch.float64:
        pairs = zip(
            gradients([found], [*parts, *learned.values()]),
            gradients([wanted], [*wide, *exact.values()]),
            strict=True,
        )
        for got, expected in pairs:
            torch.testing.assert_close(
                got, expected, rtol=1e-11, atol=max(1e-11, 100 * tolerance * bool(offset))
            )
    if dtype == torch.float32:
        cotangent = tensor(*found.shape, seed=9, dtype=dtype)
        bound = attend_gradient_tolerance(query, key, value, cotangent)
        for got, expected in zip(
            torch.autograd.grad(found, parts, cotangent),
            torch.autograd.grad(wanted, wide, cotangent.double()),
            strict=True,
        ):
            assert largest_difference(got, expected) <= bound


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sample", [*BIASES, *COMPOSITIONS], ids=lambda sample: sample.name)
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_attention(sample: Sample, options: dict[str, Any], dtype: torch.dtype) -> None:
    check_attention(sample, options, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
def test_chunked_attention(sample: Sample, options: dict[str, Any]) -> None:
    check_attention(sample, options, provider="chunked")


@pytest.mark.parametrize("options", [OPTIONS["causal"], OPTIONS["window"]], ids=["causal", "window"])
@pytest.mark.parametrize("sample", PATHS, ids=lambda sample: sample.name)
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("provider", ["operator", "chunked"])
def test_attention_along_paths(
    provider: str, sample: Sample, options: dict[str, Any], dtype: torch.dtype
) -> None:
    check_attention(sample, options, dtype, provider=provider)


SHAPES = {
    "grouped": (LENGTH, LENGTH, 2, HEAD_DIM),
    "one_key_head": (LENGTH, LENGTH, 1, HEAD_DIM),
    "few_queries": (3, LENGTH, HEADS, HEAD_DIM),
    "one_query": (1, LENGTH, 2, HEAD_DIM),
    "wide_values": (LENGTH, LENGTH, HEADS, HEAD_DIM + 3),
    "narrow_values": (LENGTH, LENGTH, HEADS, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "open"])
@pytest.mark.parametrize("provider", ["operator", "chunked"])
def test_attention_of_other_shapes(
    provider: str, sample: Sample, shape: tuple[int, int, int, int], causal: bool
) -> None:
    check_attention(sample, {"is_causal": causal}, shape=shape, provider=provider)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sample", PATHS, ids=lambda sample: sample.name)
@pytest.mark.parametrize("provider", ["operator", "chunked"])
def test_path_attention_of_other_shapes(
    provider: str, sample: Sample, shape: tuple[int, int, int, int]
) -> None:
    check_attention(sample, {"is_causal": True}, shape=shape, provider=provider)


@pytest.mark.parametrize("sample", [*ROTATIONS, *GENERATORS], ids=lambda sample: sample.name)
@pytest.mark.parametrize("queries", [3, LENGTH], ids=["few_queries", "all_queries"])
def test_attention_turns_the_last_queries(sample: Sample, queries: int) -> None:
    """Every rotation beside a bias in one call, values and the gradients of its slots."""
    both = replace(sample, encoding=Compose((sample.encoding, alibi(HEADS))))
    check_attention(both, {"is_causal": True}, shape=(queries, LENGTH, HEADS, HEAD_DIM))


@pytest.mark.parametrize("provider", ["operator", "chunked"])
def test_more_queries_than_keys(provider: str) -> None:
    """The first queries see no key when causal: zero."""
    sample = BIASES[1]
    check_attention(sample, {"is_causal": True}, shape=(12, 7, HEADS, HEAD_DIM), provider=provider)
    check_attention(sample, {}, shape=(12, 7, HEADS, HEAD_DIM), provider=provider)


def padded_causal(lowest: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A causal mask over left padding as models write it: rows of the padding have no key at all."""
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(BATCH, 1, LENGTH, LENGTH).clone()
    hidden[1, :, :, :3] = True
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, lowest)


MASKS = {
    "finite": padded_causal(torch.finfo(torch.float32).min),
    "infinite": padded_causal(-math.inf),
    "bool": padded_causal(-math.inf) == 0,
    "ten_thousand": padded_causal(-10000.0),
    "keys": torch.arange(LENGTH).expand(BATCH, 1, 1, LENGTH) > 2,
    "relative": tensor(1, HEADS, LENGTH, LENGTH, seed=30),
    "no_axes": torch.zeros(()),
    "rows": tensor(LENGTH, 1, seed=31),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("provider", ["operator", "chunked"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "open"])
def test_attention_with_a_mask(provider: str, sample: Sample, name: str, causal: bool) -> None:
    offset = 10000.0 if name == "ten_thousand" else 0.0
    check_attention(sample, {"is_causal": causal}, mask=MASKS[name], provider=provider, offset=offset)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sample", PATHS, ids=lambda sample: sample.name)
@pytest.mark.parametrize("provider", ["operator", "chunked"])
def test_path_attention_with_a_mask(provider: str, sample: Sample, name: str) -> None:
    offset = 10000.0 if name == "ten_thousand" else 0.0
    check_attention(sample, {"is_causal": True}, mask=MASKS[name], provider=provider, offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", [BIASES[0], PATHS[0]], ids=lambda sample: sample.name)
def test_a_row_of_the_lowest_number_is_the_mean(sample: Sample, dtype: torch.dtype) -> None:
    """finfo.min absorbs every logit: softmax is uniform, and models rely on a finite result."""
    query, key, value = (tensor(BATCH, HEADS, LENGTH, HEAD_DIM, seed=seed, dtype=dtype) for seed in range(3))
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=dtype)
    mask[:, :, :2] = torch.finfo(dtype).min
    slots = {name: slot.to(dtype) for name, slot in sample.slots().items()}
    found = attend(query, key, value, sample.encoding, slots, mask=mask)
    mean = value.double().mean(2, keepdim=True).expand(-1, -1, 2, -1)
    assert largest_difference(found[:, :, :2], mean) <= attend_tolerance(dtype, query, key, value)


def test_a_mask_that_needs_a_gradient() -> None:
    sample = BIASES[1]
    shapes: list[tuple[int, ...]] = [(BATCH, 1, LENGTH, LENGTH), (HEADS, 1, LENGTH), (LENGTH,), (LENGTH, 1)]
    for shape in shapes:
        query, key, value = leaves(*(tensor(BATCH, HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in range(3)))
        (mask,) = leaves(tensor(*shape, seed=5))
        results = [
            function(query, key, value, sample.encoding, {}, mask=mask, is_causal=True)
            for function in (attend, reference_attend)
        ]
        for found, wanted in zip(
            *(gradients([result], [query, key, value, mask]) for result in results), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_empty_and_single() -> None:
    for batch, queries, keys in ((0, 3, 3), (2, 0, 0), (1, 1, 1), (2, 0, 5)):
        query, key, value = leaves(*(tensor(batch, 2, length, 4) for length in (queries, keys, keys)))
        for encoding in (alibi(2), nope()):
            for causal in (True, False):
                found = attend(query, key, value, encoding, is_causal=causal)
                assert found.shape == (batch, 2, queries, 4)
                assert all(part.isfinite().all() for part in gradients([found], [query, key, value]))


def test_operands_in_any_memory_order() -> None:
    """Heads as a view of [B, T, H, D], and every other coordinate of a larger tensor."""
    query, key, value = (
        tensor(BATCH, LENGTH, HEADS, 2 * HEAD_DIM, seed=seed)[..., ::2].transpose(1, 2) for seed in range(3)
    )
    found = attend(query, key, value, alibi(HEADS), is_causal=True)
    assert (
        largest_difference(found, reference_attend(query, key, value, alibi(HEADS), is_causal=True)) < 1e-12
    )
    (turned,) = rotate([query], rope(HEAD_DIM))
    assert largest_difference(turned, reference_rotate([query], rope(HEAD_DIM))[0]) < 1e-12


def test_sequence_before_heads() -> None:
    """[B, T, H, D] differs in the shape of the slots only."""
    heads, positions = (
        tensor(BATCH, HEADS, LENGTH, HEAD_DIM),
        torch.arange(BATCH * LENGTH).view(BATCH, LENGTH),
    )
    encoding = next(sample for sample in ROTATIONS if sample.name == "positions").encoding
    (wanted,) = rotate([heads], encoding, {"positions": positions[:, None, :]})
    (found,) = rotate([heads.transpose(1, 2)], encoding, {"positions": positions[:, :, None]})
    assert torch.equal(found.transpose(1, 2), wanted)


def test_autocast_attends_in_its_dtype() -> None:
    query, key, value = leaves(
        *(tensor(1, HEADS, LENGTH, HEAD_DIM, seed=seed, dtype=torch.float32) for seed in range(3))
    )
    for name in ("flash_cpu", "chunked"):
        with only(name), torch.autocast("cpu", torch.bfloat16):
            found = attend(query, key, value, alibi(HEADS), is_causal=True)
        assert found.dtype == torch.bfloat16
        assert all(part.dtype == torch.float32 for part in gradients([found], [query, key, value]))
