"""Case `speed`: a forward pass of the compiled model against `torch.compile` alone.

Where a bias is replaced, a third model says what there was to gain: the same one with plain causal attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measuring import Timing, take_turns
from benchmarks.models import build, forward, token_ids, without_bias
from grape_compile import grape_compile, report

ALONE, OURS, CEILING = "torch.compile", "grape_compile", "torch.compile without a bias"


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
    models = {ALONE: build(row.family), OURS: build(row.family)}
    models[ALONE].compile()
    grape_compile(models[OURS])
    wanted = forward(build(row.family), ids)
    deviation = {name: (forward(model, ids) - wanted).abs().max().item() for name, model in models.items()}
    if row.family != "llama":
        models[CEILING] = without_bias(build(row.family))
        models[CEILING].compile()
    timings = take_turns(
        {name: functools.partial(forward, model, ids) for name, model in models.items()}, rounds=row.rounds
    )
    ratio = timings[ALONE].median / timings[OURS].median
    told = f"{ALONE} {timings[ALONE]}; {OURS} {timings[OURS]}; {ratio:.2f} x"
    gain = _gain(timings) if CEILING in timings else None
    if gain is not None:
        told += f" of {gain['ratio']:.2f} x at most: {100 * gain['reached']:.0f} % of the time the bias takes"
    return {
        "name": f"{row.family}, {row.length} tokens",
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "sites": len(report(models[OURS]).sites),
        "largest difference to eager": deviation,
        "ratio": ratio,
        "without a bias": gain,
        "promised": row.promised,
        "holds": None if row.promised is None else ratio >= row.promised,
        "told": told,
    }


def _gain(timings: Mapping[str, Timing]) -> dict[str, float]:
    """The ratio that no bias at all gives, and the part reached of what there was to gain."""
    alone, ours, ceiling = (timings[name].median for name in (ALONE, OURS, CEILING))
    return {"ratio": alone / ceiling, "reached": (alone - ours) / (alone - ceiling)}
