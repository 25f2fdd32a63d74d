"""Layers that keep their past themselves: every step goes through every operator, or it is told why not."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_layers import example, sharpen
from measuring import GrapeCalls
from own_caches import OWN_CACHES, OwnCache, RingAlibi

from grape_compile import grape_compile, report

STEPS = (5, 1, 1, 2)
QUICK = {"JoinedSums", "SlicedAlibi"}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if row.name in QUICK else pytest.mark.slow, id=row.name)
        for row in OWN_CACHES
    ],
)
def test_a_layer_with_a_cache_of_its_own(row: OwnCache) -> None:
    calls, past = GrapeCalls(), 0
    plain = sharpen(row.make())
    ours = grape_compile(copy.deepcopy(plain), backend=calls)
    for count in STEPS:
        x = example(count, seed=past)
        calls.reset()
        with torch.no_grad():
            torch.testing.assert_close(ours(x, past), plain(x, past), rtol=1e-5, atol=1e-5)
        assert (calls.rotated, calls.attended) == (row.rotations, row.biases), str(report(ours))
        past += count
    assert report(ours).refusals == (), str(report(ours))


def test_places_that_a_ring_keeps_are_told() -> None:
    """Which token is in which slot is read after it was written in place: nothing is looked through it."""
    plain = sharpen(RingAlibi())
    ours = grape_compile(copy.deepcopy(plain), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(ours(example(5), 0), plain(example(5), 0))
    (refusal,) = report(ours).refusals
    assert refusal.rule == "memory", str(refusal)
    assert "written into in place" in refusal.reason
