"""Kernels of path biases against the definition in float64: values and every gradient, interpreted or on a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from operator_errors import leaves
from path_cases import AP, BOTH, CASES, HEAD, HEADS, SLOW, Case, compare, heads_of, kernels_only, slots_of
from torch import Tensor

pytest.importorskip("triton")

from grape_compile.encoding import Compose, Encoding, Link, LogSigmoid, NegativeExp, fox, nope
from grape_compile.kernels import path
from grape_compile.kernels.path_configurations import KERNELS, Kernel, Tiles
from grape_compile.operators import attend, reference_attend
from grape_compile.operators.samples import tensor

#: Keys left out of a row weigh less than this of it, all together.
LEFT_OUT = 2.0**-26


@pytest.fixture(autouse=True)
def every_walk_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short it is, and after every tile."""
    monkeypatch.setattr(path, "SHORTEST", 0)
    monkeypatch.setattr(path, "CHUNK", 1)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_path(name: str) -> None:
    compare({**CASES, **SLOW}[name])


#: Tiles that differ from kernel to kernel, and rows that are shared in every way.
TILES = (
    ((32, 16, 1, 1), (16, 16, 1, 2), (32, 16, 4, 1), (16, 32, 4, 2), (32, 32, 4, 1)),
    ((16, 32, 4, 2), (32, 32, 4, 1), (16, 16, 1, 1), (32, 16, 4, 1), (16, 32, 1, 1)),
)


@pytest.mark.parametrize(
    "tiles", [TILES[0], pytest.param(TILES[1], marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_tiles_of_other_sizes(
    tiles: tuple[tuple[int, int, int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one key head after the other, as a long sequence goes back."""

    def chosen(kernel: Kernel, call: object) -> Tiles:
        queries, keys, lanes, split = tiles[KERNELS.index(kernel)]
        return Tiles(queries, keys, 4, 1, lanes, split)

    monkeypatch.setattr(path, "configuration", chosen)
    monkeypatch.setattr(path, "MAX_MEMORY", 1)
    compare(Case(AP, queries=41, keys=57, heads=4, key_heads=2, slopes=(8.0, 0.1, 2.0, -0.1)))


def weights_of(case: Case, seed: int, way: Any) -> Tensor:
    """The weights of a call, as its output for values that are unit vectors."""
    query, key, _ = heads_of(case, seed)
    value = torch.eye(case.keys, dtype=query.dtype, device=DEVICE).expand(case.batch, 1, case.keys, case.keys)
    slots = slots_of(case, seed)
    if way is reference_attend:
        query, key, value = query.double(), key.double(), value.double()
        slots = {name: slot.double() for name, slot in slots.items()}
    output: Tensor = way(query, key, value, case.encoding, slots, is_causal=True)
    return output.double()


@given(
    seed=st.integers(0, 10**6),
    slopes=st.lists(st.floats(-2.0, 40.0, width=32), min_size=HEADS, max_size=HEADS),
    size=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    edge=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    link=st.sampled_from([LogSigmoid(), NegativeExp()]),
)
@settings(max_examples=5, deadline=None)
def test_keys_left_out_weigh_less_than_a_rounding(
    seed: int, slopes: list[float], size: float, edge: float, link: Link
) -> None:
    """Whatever slopes and keys are: what the kernel left out is found by its weights, which are zero there.

    A weight that underflows is below 2^-126 of the row, and counts as left out as well.
    """
    encoding = replace(AP, link=link)
    case = Case(encoding, queries=41, keys=41, slopes=tuple(slopes), size=size, edge=edge)
    exact = weights_of(case, seed, reference_attend)
    with kernels_only():
        ours = weights_of(case, seed, attend)
    assert float((exact * (ours == 0.0)).sum(-1).max()) < LEFT_OUT
    # What was not left out is right to the rounding of a logit, which is as large as its two parts.
    largest = 8 * size * size * HEAD**0.5 + 41 * max(map(abs, slopes)) * (1 + math.exp(edge * edge * 4))
    torch.testing.assert_close(ours, exact, rtol=0.0, atol=min(1.0, 1e-6 * (1 + largest)))


def test_walks_end_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far keys are left out where slopes are steep, by exactly zero, and nowhere else; a wrong bound is found."""
    case = Case(AP, queries=65, keys=65, slopes=(8.0, 0.01))
    with kernels_only():
        ours = weights_of(case, 0, attend)
    exact = weights_of(case, 0, reference_attend)
    assert bool((ours[0, 0, -1, :16] == 0.0).all())
    assert bool((ours[0, 1, -1] > 0.0).all())
    assert float((exact * (ours == 0.0)).sum(-1).max()) < LEFT_OUT
    monkeypatch.setattr(path, "ROUNDED_AWAY", -200.0)
    with kernels_only():
        wrong = weights_of(case, 0, attend)
    assert float((exact * (wrong == 0.0)).sum(-1).max()) > LEFT_OUT


def test_an_output_whose_walks_end_is_that_of_whole_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a rounding of the largest number, gradients as well."""
    case = Case(BOTH, queries=57, keys=57, slopes=(8.0, 2.0))
    results = []
    for shortest in (0, 10**9):
        monkeypatch.setattr(path, "SHORTEST", shortest)
        heads, slots = leaves(*heads_of(case)), slots_of(case)
        with kernels_only():
            output = attend(heads[0], heads[1], heads[2], case.encoding, slots, is_causal=True)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), heads)])
    for early, whole in zip(*results, strict=True):
        torch.testing.assert_close(early, whole, rtol=0.0, atol=2.0**-22 * float(whole.abs().max()))


REFUSED: dict[str, tuple[Encoding, dict[str, Any], str]] = {
    "no_path": (nope(), {}, "one path bias"),
    "two_biases": (Compose((AP, fox())), {}, "one path bias"),
    "float64": (AP, {"dtype": torch.float64}, "float64"),
    "wide": (replace(AP, dim=40, turn=None), {}, "40 coordinates, more than 32"),
    "scale": (AP, {"options": {"is_causal": True, "scale": -1.0}}, "below 5e-20"),
    "cap": (AP, {"options": {"is_causal": True, "cap": 5.0}}, "soft cap"),
    "sinks": (AP, {"options": {"is_causal": True, "sinks": torch.zeros(HEADS)}}, "sink"),
    "segments": (
        AP,
        {"options": {"is_causal": True, "segments": torch.zeros(5, dtype=torch.int32)}},
        "segments",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_for_another_provider(name: str) -> None:
    encoding, changed, sentence = REFUSED[name]
    case = Case(AP, queries=5, keys=5, **changed)
    dim = 40 if name == "wide" else 4
    shapes = {"slopes": (HEADS,), "log_forget": (5,)}
    slots = {slot: tensor(*shapes.get(slot, (1, HEADS, 5, dim))).to(DEVICE) for slot in encoding.slots}
    query, key, value = heads_of(case)
    options: dict[str, Any] = {
        name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in case.options.items()
    }
    with kernels_only(), pytest.raises(Exception, match=sentence):
        attend(query, key, value, encoding, slots, **options)


def test_the_same_call_has_the_same_result() -> None:
    case = replace(CASES["bounded"], queries=17, keys=17)
    runs = []
    for _ in range(2):
        parts = leaves(*heads_of(case), *slots_of(case).values())
        with kernels_only():
            slots = dict(zip(case.encoding.slots, parts[3:], strict=True))
            output = attend(parts[0], parts[1], parts[2], case.encoding, slots, is_causal=True)
            runs.append([output, *torch.autograd.grad(output.float().square().sum(), parts)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["path_forward", "path_forward_bounded", "path_forward_turned"])
def test_a_step_forward_is_short(name: str) -> None:
    """Of 128 queries over 64 keys on an H100, behind the diagonal, for every product and for bounded ones."""
    table = json.loads(Path(__file__).with_name("gates.json").read_text())["gates"]
    found = table[name]["90"]
    assert found["matrix"] == "HGMMA"
    assert min(loop["instructions"] for loop in found["loops"] if loop.get("matrix")) <= 900
