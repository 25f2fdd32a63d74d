"""Tiles that attention kernels leave out: never one that counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import ABSOLUTE, GATED, HEAD, HEADS, SLOPES, kernels_only
from kernel_cases import DEVICE
from operator_errors import leaves
from torch import Tensor

pytest.importorskip("triton")

from grape_compile.encoding import Bias, Compose, Encoding, Learned, Positions, fox, nope, rope
from grape_compile.kernels.attention_reach import Reach
from grape_compile.kernels.attention_terms import Terms
from grape_compile.operators import attend, reference_attend
from grape_compile.operators.attention import attend_call
from grape_compile.operators.samples import tensor, unit_roundoff

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


def reach_of(name: str, seed: int = 0, size: float = 1.0) -> tuple[tuple[Tensor, Tensor, Tensor], Reach]:
    encoding, slots = FORGETTING[name]
    query, key, value = (
        size * tensor(1, HEADS, LENGTH, HEAD, seed=seed + each, dtype=torch.float32) for each in range(3)
    )
    operands = [slots[slot] for slot in encoding.slots]
    call = attend_call(query, key, value, operands, str(encoding), None, True, None, None)
    return (query, key, value), Reach(call, Terms(call), 16, 16)


@pytest.mark.parametrize("size", [1.0, 0.0], ids=["normal", "zero"])
@pytest.mark.parametrize("name", FORGETTING)
def test_keys_left_out_weigh_less_than_a_rounding(name: str, size: float) -> None:
    """Some are left out of the first head, none where nothing is forgotten; by the weights of the definition.

    Heads of zeros leave the bound no room: a logit is its bias.
    """
    encoding, slots = FORGETTING[name]
    for seed in range(0, 30, 3):
        (query, key, _), reach = reach_of(name, seed, size)
        value = torch.eye(LENGTH, dtype=torch.float64).expand(1, HEADS, LENGTH, LENGTH)
        wide = {slot: numbers.double() for slot, numbers in slots.items()}
        weights = reference_attend(query.double(), key.double(), value, encoding, wide, is_causal=True)
        first, last = (
            found.repeat_interleave(16, -1)[..., :LENGTH]
            for found in (reach.keys()[..., 0], reach.queries()[..., 1])
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
    assert fine.keys().shape == coarse.keys().shape == (1, HEADS, 25, 2)
    assert fine.queries().shape == coarse.queries().shape == (1, HEADS, 13, 2)
    for outer, inner in ((coarse.keys(), fine.keys()), (coarse.queries(), fine.queries())):
        assert bool((outer[..., 0] <= inner[..., 0]).all() and (outer[..., 1] >= inner[..., 1]).all())
    assert bool(coarse.keys()[..., 0].any())


def test_queries_that_turn_in_the_kernel_reach_as_far() -> None:
    """A rotation with a factor makes them longer."""
    query, key, value = (tensor(1, HEADS, 100, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    encoding = Compose((replace(rope(16), scale=3.0), SLOPES))
    operands = [torch.tensor([6.0, 3.0])]
    kept, turned = (
        attend_call(query, key, value, operands, str(encoding), is_causal=True, keeps_queries=keeps)
        for keeps in (True, False)
    )
    assert kept.turn is not None
    assert torch.equal(kept.query, query)
    outer, inner = (Reach(call, Terms(call), 16, 16).matters for call in (kept, turned))
    assert bool((outer >= inner).all())
    assert not bool(outer.all())


HIDING: dict[str, dict[str, Any]] = {
    "segments": {"is_causal": True, "segments": torch.arange(LENGTH) // 30},
    "segments_open": {"segments": torch.arange(LENGTH) // 30},
    "segments_in_turns": {"segments": torch.arange(LENGTH) % 3 * (torch.arange(LENGTH) > 40)},
    "padding": {"mask": (torch.arange(LENGTH) > 37)[None, None, None]},
}


@pytest.mark.parametrize("name", HIDING)
def test_tiles_of_other_segments_and_of_padding_are_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None that a query sees, some that none sees where they lie at an end; the result is the same bit by bit."""
    query, key, value = (tensor(1, 1, LENGTH, HEAD, seed=seed, dtype=torch.float32) for seed in range(3))
    options = HIDING[name]
    call = attend_call(query, key, value, [], str(nope()), **options)
    tiles = torch.arange(LENGTH) // 16
    first, behind = Reach(call, Terms(call), 16, 16).keys()[..., None].unbind(-2)
    left_out = (tiles < first) | (tiles >= behind)
    left_out = left_out.repeat_interleave(16, 2)[:, :, :LENGTH]
    eye = torch.eye(LENGTH, dtype=torch.float64).expand(1, 1, LENGTH, LENGTH)
    weights = reference_attend(query.double(), key.double(), eye, nope(), **options)
    assert bool(left_out.any())
    assert not bool((weights * left_out).any())
    results = []
    for shortest in (0, 10**9):
        monkeypatch.setattr("grape_compile.kernels.attention_reach.SHORTEST", shortest)
        parts = leaves(*(head.to(DEVICE) for head in (query, key, value)))
        given: dict[str, Any] = {
            each: option.to(DEVICE) if isinstance(option, Tensor) else option
            for each, option in options.items()
        }
        with kernels_only():
            output = attend(parts[0], parts[1], parts[2], nope(), **given)
            results.append([output, *torch.autograd.grad(output.square().sum(), parts)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
