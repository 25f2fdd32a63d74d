"""Programs drawn from a grammar, right ones and near misses: nothing wrong is rewritten, what is right is found.

`make test` draws the same 300 programs each time. `make test-all` draws 10,000 new ones; each part prints its seed, and
`GENERATED_SEED=<seed>` draws the programs of that part again. The figures of all parts stand at the end of the run.
"""

import os
import random
from collections.abc import Callable
from dataclasses import asdict

import pytest
from generated.runs import run
from generated.tally import Tally

Record = Callable[[str, object], None]
SHARDS, LONG_SHARDS = 6, 10
RECALL = 0.99
FEW = 0.97
"""The same for a part of some eighty sites, of which two may be missed."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_300_programs(shard: int, record_property: Record) -> None:
    draw(shard, 300 // SHARDS, FEW, record_property)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(LONG_SHARDS))
def test_10000_programs(shard: int, record_property: Record) -> None:
    seed = int(os.environ.get("GENERATED_SEED", random.SystemRandom().randrange(2**32)))
    print(f"GENERATED_SEED={seed}")
    draw(seed, 10_000 // LONG_SHARDS, RECALL, record_property)


def draw(seed: int, programs: int, recall: float, record_property: Record) -> None:
    tally = Tally()
    try:
        run(seed, programs, tally, misses_allowed=True)
    finally:
        record_property("generated", asdict(tally))
    if tally.found < recall * tally.truths:
        run(seed, programs, Tally())  # shrinks the first program with a miss, and fails
