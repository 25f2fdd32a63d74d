"""Case `cost`: what detection and rewriting add to a cold `torch.compile`, by the number of layers.

Every sample is a process of its own with an empty cache of compiled code, warmed up on another model so that
imports and the search for a C++ compiler are not counted on either side. One row has no encoding to find.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measuring import Timing
from benchmarks.models import build, forward, token_ids
from grape_compile import grape_compile
from grape_compile.compiler import rewrite_seconds

SAMPLES = 3
LENGTH, HIDDEN = 64, 128
ALONE, OURS = "torch.compile", "grape_compile"
GROWTH = 1.15


@dataclass(frozen=True)
class Row:
    """A model, and the largest part of its cold compilation that detection and rewriting are promised to add."""

    family: str
    layers: int
    promised: float | None = None

    @property
    def name(self) -> str:
        return f"{self.family}, {self.layers} layers"


FEW, MANY = Row("llama", 16), Row("llama", 64)
ROWS = (Row("llama", 8), FEW, Row("llama", 32, 0.15), MANY, Row("gpt2", 12, 0.05))


def cost() -> Iterator[dict[str, Any]]:
    """One result per model: cold seconds of both ways, seconds of detection and rewriting; and how those grow."""
    per_layer: dict[Row, float] = {}
    for row in ROWS:
        samples: dict[str, list[dict[str, float]]] = {ALONE: [], OURS: []}
        for _ in range(SAMPLES):
            for way, found in samples.items():
                found.append(_sample(way, row))
        result = _result(row, samples)
        per_layer[row] = result["milliseconds per layer"]
        yield result
    yield _growth(per_layer[MANY] / per_layer[FEW])


def _result(row: Row, samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    cold = Timing.of(sample["cold"] for sample in samples[ALONE])
    ours = Timing.of(sample["cold"] for sample in samples[OURS])
    rewriting = Timing.of(sample["rewriting"] for sample in samples[OURS])
    share, per_layer = rewriting.median / cold.median, 1000 * rewriting.median / row.layers
    return {
        "name": row.name,
        "seconds": {ALONE: cold.to_json(), OURS: ours.to_json(), "detect and rewrite": rewriting.to_json()},
        "milliseconds per layer": per_layer,
        "ratio": share,
        "promised": row.promised,
        "holds": None if row.promised is None else share <= row.promised,
        "told": f"{ALONE} cold {cold}; detect and rewrite {rewriting}: {100 * share:.1f} %, {per_layer:.1f} ms a layer",
    }


def _growth(ratio: float) -> dict[str, Any]:
    return {
        "name": f"a layer of {MANY.layers} against a layer of {FEW.layers}",
        "ratio": ratio,
        "promised": GROWTH,
        "holds": ratio <= GROWTH,
        "told": f"detect and rewrite takes {ratio:.2f} x the time per layer",
    }


def _sample(way: str, row: Row) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        command = [sys.executable, "-m", "benchmarks.cost", way, row.family, str(row.layers)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def _cold(way: str, family: str, layers: int, hidden: int) -> dict[str, float]:
    """Seconds of the first forward pass, and of those the seconds before the graph reaches Inductor."""
    model = build(family, hidden=hidden, layers=layers)
    if way == OURS:
        grape_compile(model)
    else:
        model.compile()
    start = time.perf_counter()
    forward(model, token_ids(LENGTH))
    cold = time.perf_counter() - start
    torch.compiler.reset()
    return {"cold": cold, "rewriting": rewrite_seconds(model) if way == OURS else 0.0}


def main() -> None:
    """Take one sample in a process of its own."""
    parser = argparse.ArgumentParser(description="one sample of the case `cost`, printed as JSON")
    parser.add_argument("way", choices=(ALONE, OURS))
    parser.add_argument("family")
    parser.add_argument("layers", type=int)
    given = parser.parse_args()
    _cold(given.way, given.family, 1, 2 * HIDDEN)
    print(json.dumps(_cold(given.way, given.family, given.layers, HIDDEN)))


if __name__ == "__main__":
    main()
