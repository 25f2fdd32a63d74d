"""Decoding against the definition in float64: few queries, keys in parts, caches that are not full."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import path_cases
import pytest
import torch
from attention_cases import CASES, HEAD, HEADS, SLOPES, Case, mask_of, slots_of
from kernel_cases import DEVICE
from operator_errors import leaves
from operator_laws import only
from torch import Tensor

pytest.importorskip("triton")

from grape_compile.encoding import Compose, Encoding, PathBias, alibi, grape_ap, nope
from grape_compile.kernels import decoding
from grape_compile.kernels.decoding import Decoding, Parts, merge_launch
from grape_compile.kernels.decoding_configurations import Configuration, configuration, splits_of
from grape_compile.operators import attend, providers, reference_attend
from grape_compile.operators.attention import attend_call
from grape_compile.operators.call import AttendCall
from grape_compile.operators.prepare import parts
from grape_compile.operators.providers import Provider
from grape_compile.operators.samples import tensor, unit_roundoff

KEYS = 83
#: A soft cap, sinks and segments are left to the kernels for many queries.
TAKEN = [name for name, case in CASES.items() if not (case.options.get("cap") or case.sinks or case.segments)]


@pytest.fixture
def decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Provider("triton decoding", "grape_compile.kernels.decoding", priority=30)
    monkeypatch.setattr(providers, "PROVIDERS", (row,))


def heads_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (
        (case.batch, HEADS, case.queries, case.head),
        (case.batch, case.key_heads, case.keys, case.head),
        (case.batch, case.key_heads, case.keys, case.values),
    )
    query, key, value = (
        tensor(*shape, seed=seed, dtype=case.dtype).to(DEVICE) for seed, shape in enumerate(shapes)
    )
    return query, key, value


@pytest.mark.usefixtures("decoding_only")
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", TAKEN)
def test_decoding(name: str, queries: int) -> None:
    case = replace(CASES[name], queries=queries, keys=KEYS)
    (query, key, value), slots, mask = heads_of(case), slots_of(case), mask_of(case)
    with torch.no_grad():
        found = attend(query, key, value, case.encoding, slots, mask=mask, **case.options)
        wide = {each: slot.double() for each, slot in slots.items()}
        exact = (query.double(), key.double(), value.double())
        wanted = reference_attend(*exact, case.encoding, wide, mask=mask, **case.options)
    error = float((found.double() - wanted).norm() / wanted.norm())
    # A sum of at most T + D products, as many roundings, and weights and results rounded to the dtype.
    assert error <= 8 * (KEYS + HEAD) * unit_roundoff(torch.float32) + 8 * unit_roundoff(case.dtype)


PATHS = {**path_cases.CASES, **path_cases.SLOW}
LEAN = [("ap", 1), ("bounded", 3), ("groups", 3), ("identity_window", 1)]
REST = [(name, queries) for name in PATHS for queries in (1, 3) if (name, queries) not in LEAN]


@pytest.mark.usefixtures("decoding_only")
@pytest.mark.parametrize(
    ("name", "queries"), [*LEAN, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)]
)
def test_decoding_along_a_path(name: str, queries: int) -> None:
    """Each part sums its own edges, and what it carries falls on those before it."""
    case = replace(PATHS[name], queries=queries, keys=KEYS)
    heads, slots, mask = path_cases.heads_of(case), path_cases.slots_of(case), path_cases.mask_of(case)
    wide = {each: slot.double() for each, slot in slots.items()}
    query, key, value = (part.double() for part in heads)
    with torch.no_grad():
        found = attend(heads[0], heads[1], heads[2], case.encoding, slots, mask=mask, **case.options)
        wanted = reference_attend(query, key, value, case.encoding, wide, mask=mask, **case.options)
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= 8 * (KEYS + case.head) * unit_roundoff(torch.float32) + 8 * unit_roundoff(case.dtype)


@pytest.mark.usefixtures("decoding_only")
@pytest.mark.parametrize("splits", [1, 5, 6, 64])
def test_any_number_of_parts(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several tiles, the last one ragged, and parts without a key."""
    monkeypatch.setattr(decoding, "configuration", lambda call: Configuration(16, splits, 4, 1))
    case = replace(CASES["gated"], queries=2, keys=KEYS)
    parts_agree(case.encoding, heads_of(case), slots_of(case))


@pytest.mark.usefixtures("decoding_only")
@pytest.mark.parametrize("splits", [5, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 6, 64))])
def test_any_number_of_parts_of_a_path(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "configuration", lambda call: Configuration(16, splits, 4, 1))
    case = replace(path_cases.CASES["ap"], queries=2, keys=KEYS)
    query, key, value = path_cases.heads_of(case)
    parts_agree(case.encoding, (query, key, value), path_cases.slots_of(case))


def parts_agree(encoding: Encoding, heads: tuple[Tensor, Tensor, Tensor], slots: dict[str, Tensor]) -> None:
    with torch.no_grad():
        found = attend(*heads, encoding, slots, is_causal=True)
        wanted = reference_attend(*heads, encoding, slots, is_causal=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("decoding_only")
def test_gradients_of_few_queries() -> None:
    case = replace(CASES["slopes_window"], queries=2, keys=21)
    along = replace(path_cases.CASES["ap"], queries=2, keys=21)
    query, key, value = path_cases.heads_of(along)
    gradients_agree(case.encoding, heads_of(case), slots_of(case), case.options)
    gradients_agree(along.encoding, (query, key, value), path_cases.slots_of(along), along.options)


def gradients_agree(
    encoding: Encoding,
    heads: tuple[Tensor, Tensor, Tensor],
    given: dict[str, Tensor],
    options: dict[str, Any],
) -> None:
    results = []
    for way in (attend, reference_attend):
        query, key, value = leaves(*heads)
        slots = dict(zip(encoding.slots, leaves(*given.values()), strict=True))
        output = way(query, key, value, encoding, slots, **options)
        results.append(torch.autograd.grad(output.square().sum(), [query, key, value, *slots.values()]))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("decoding_only")
@pytest.mark.parametrize("kind", ["bytes", "numbers"])
def test_places_of_a_cache_that_are_free_are_not_read(kind: str) -> None:
    """A cache of fixed capacity, what was never written poisoned: a weight of zero would not hide it."""
    capacity, filled = 256, 35
    query, key, value = (
        tensor(2, HEADS, count, HEAD, dtype=torch.float32).to(DEVICE) for count in (1, capacity, capacity)
    )
    there = (torch.arange(capacity, device=DEVICE) < filled)[None, None, None]
    wanted = reference_attend(query, key[:, :, :filled], value[:, :, :filled], alibi(HEADS))
    # Of the last tile that is read all places are there.
    key[:, :, 128:], value[:, :, 128:] = math.nan, math.nan
    mask = (
        there
        if kind == "bytes"
        else torch.zeros(1, 1, 1, capacity, device=DEVICE).masked_fill(~there, -math.inf)
    )
    with torch.no_grad():
        found = attend(query, key, value, alibi(HEADS), mask=mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_launched_does_not_depend_on_what_is_in_a_cache() -> None:
    """Grids and constants of a step come from sizes: one CUDA graph is right for every step."""

    def described(mask: Tensor) -> list[object]:
        query, key = (tensor(1, HEADS, count, HEAD, dtype=torch.float32).to(DEVICE) for count in (1, 64))
        call = attend_call(query, key, key, [], str(alibi(HEADS)), mask, False, None, None)
        made = Decoding(call)
        launches = made.split_launch(), made.merge_launch(call.query, call.query[..., 0])
        return [
            (
                each.grid,
                {name: value for name, value in each.arguments.items() if not isinstance(value, Tensor)},
            )
            for each in launches
        ]

    masks = [(torch.arange(64, device=DEVICE) < filled)[None, None, None] for filled in (1, 64)]
    assert described(masks[0]) == described(masks[1])


def test_parts_whose_keys_lie_behind_others_are_carried() -> None:
    """As a path adds up: what a part carries falls on all parts before it."""
    rows, splits, size = (1, HEADS, 2), 5, 8
    sums, best, total, carries = (
        tensor(*rows, *shape, seed=seed, dtype=torch.float32).to(DEVICE)
        for seed, shape in enumerate([(splits, size), (splits,), (splits,), (splits,)])
    )
    total = total.abs() + 0.5
    parts = Parts(sums, torch.stack((best, total), -2).contiguous(), carries)
    output, logsumexp = torch.empty(*rows, size, device=DEVICE), torch.empty(*rows, device=DEVICE)
    merge_launch(parts, output, logsumexp).run()
    behind = carries.double().flip(-1).cumsum(-1).flip(-1) - carries
    weights = torch.exp2(best.double() + behind)
    whole = (weights * total).sum(-1)
    torch.testing.assert_close(
        output.double(), (weights[..., None] * sums).sum(-2) / whole[..., None], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(logsumexp.double(), whole.log(), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[Encoding, int, int, dict[str, Any], str]] = {
    "many queries": (nope(), 17, 1, {}, "17 queries, more than 16"),
    "many rows": (nope(), 16, 8, {}, "16 queries of 8 heads for each key, more than 64 rows"),
    "wide path": (grape_ap(8, 32), 1, 8, {"is_causal": True}, "a path of 256 coordinates for each key"),
    "path and bias": (Compose((alibi(8), grape_ap(8, 4))), 1, 1, {"is_causal": True}, "and no other"),
    "scale": (SLOPES, 1, 1, {"scale": -1.0}, "not positive"),
}


def call_of(encoding: Encoding, queries: int, groups: int, options: dict[str, Any]) -> AttendCall:
    query, key = torch.empty(1, 8, queries, HEAD), torch.empty(1, 8 // groups, 32, HEAD)
    dim = max((part.dim for part in parts(encoding) if isinstance(part, PathBias)), default=1)
    shapes = {"path_query": (1, 8, queries, dim), "path_key": (1, 8, 32, dim)}
    slots = [torch.ones(shapes.get(name, (8,))) for name in encoding.slots]
    return attend_call(
        query,
        key,
        key,
        slots,
        str(encoding),
        None,
        options.get("is_causal", False),
        options.get("scale"),
        None,
    )


@pytest.mark.parametrize("name", ["cap", "sinks", "segments"])
def test_what_decoding_does_not_know_is_left_to_others(name: str) -> None:
    call = call_of(alibi(8), 1, 1, {"is_causal": True})
    asked: dict[str, Any] = {
        "cap": 2.0,
        "sinks": torch.zeros(1, 8),
        "segments": torch.zeros(1, 32, dtype=torch.int64),
    }
    assert decoding.supports(call) is True
    assert f"{name}, which decoding" in str(decoding.supports(replace(call, **{name: asked[name]})))


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_for_another_provider(name: str) -> None:
    encoding, queries, groups, options, sentence = REFUSED[name]
    assert sentence in str(decoding.supports(call_of(encoding, queries, groups, options)))


def test_the_parts_fill_a_gpu_and_have_a_tile_each() -> None:
    call = call_of(alibi(8), 1, 1, {"is_causal": True})
    with torch.device("meta"):
        key = torch.empty(1, 8, 32768, HEAD)
    long = replace(call, key=key, value=key)
    assert configuration(long, 90).splits == 64
    assert splits_of(long, 64, 8) == 1
    assert splits_of(replace(long, window=100), 64, 10_000) == 2
    assert splits_of(call, 16, 10_000) == 2
    assert Configuration.of({"key_block": 48, "splits": 1, "warps": 4, "stages": 1}) is None
    assert Configuration.of({"key_block": 64, "splits": 0, "warps": 4, "stages": 1}) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_graph_decodes_at_every_length(dtype: torch.dtype) -> None:
    """A step captured once, replayed as the cache fills."""
    capacity, batch = 4096, 2
    query = tensor(batch, 32, 1, 128, seed=0, dtype=dtype).to(DEVICE)
    key, value = (tensor(batch, 8, capacity, 128, seed=seed, dtype=dtype).to(DEVICE) for seed in (1, 2))
    mask = torch.zeros(1, 1, 1, capacity, dtype=torch.bool, device=DEVICE)
    mask[..., :1] = True

    def step() -> Tensor:
        return attend(query, key, value, alibi(32), mask=mask)

    with torch.no_grad(), only("triton decoding"):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for filled in (1, 63, 64, 65, 1000, 4096):
            mask[..., :filled] = True
            graph.replay()
            wanted = reference_attend(
                query.double(), key[:, :, :filled].double(), value[:, :, :filled].double(), alibi(32)
            )
            error = float((found.double() - wanted).norm() / wanted.norm())
            # The bias of the first keys is counted from the end of the cache: slopes below one, times its capacity.
            assert error <= capacity * unit_roundoff(torch.float32) + 8 * unit_roundoff(dtype)
