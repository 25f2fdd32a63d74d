"""Case `speed`: a forward pass of the compiled model against `torch.compile` alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measuring import take_turns
from benchmarks.models import build, forward, token_ids
from grape_compile import grape_compile, report

ALONE, OURS, EAGER = "torch.compile", "grape_compile", "eager"


@dataclass(frozen=True)
class Row:
    """A family at a length, how often to time it, and the least speed-up that is promised."""

    family: str
    length: int
    rounds: int
    promised: float | None


ROWS = (
    Row("llama", 512, 40, 1 / 1.03),
    Row("bloom", 1024, 20, 1.8),
    Row("bloom", 2048, 12, None),
    Row("bloom", 4096, 7, None),
    Row("mpt", 1024, 20, 1.8),
    Row("mpt", 2048, 12, None),
    Row("mpt", 4096, 7, None),
)


def speed() -> Iterator[dict[str, Any]]:
    """One result per row: medians of both ways, their ratio, the largest difference of their logits."""
    for row in ROWS:
        yield _measured(row)
        torch.compiler.reset()


def _measured(row: Row) -> dict[str, Any]:
    ids = token_ids(row.length)
    alone, ours, eager = build(row.family), build(row.family), build(row.family)
    alone.compile()
    grape_compile(ours)
    wanted = forward(eager, ids)
    deviation = {
        name: (forward(model, ids) - wanted).abs().max().item()
        for name, model in ((ALONE, alone), (OURS, ours))
    }
    timings = take_turns(
        {ALONE: lambda: forward(alone, ids), OURS: lambda: forward(ours, ids)}, rounds=row.rounds
    )
    ratio = timings[ALONE].median / timings[OURS].median
    return {
        "name": f"{row.family}, {row.length} tokens",
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "sites": len(report(ours).sites),
        "largest difference to eager": deviation,
        "ratio": ratio,
        "promised": row.promised,
        "holds": None if row.promised is None else ratio >= row.promised,
        "told": f"{ALONE} {timings[ALONE]}; {OURS} {timings[OURS]}; {ratio:.2f} x",
    }
