"""Case `cost`: what detection and rewriting add to a cold `torch.compile`, by the number of layers.

Every sample is a process of its own with an empty cache of compiled code, warmed up on another model so that
imports and the search for a C++ compiler are not counted on either side.
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
from typing import Any

import torch

from benchmarks.measuring import Timing
from benchmarks.models import build, forward, token_ids
from grape_compile import grape_compile
from grape_compile.compiler import rewrite_seconds

LAYERS = (8, 16, 32, 64)
SAMPLES = 3
SHARE = 0.15
LENGTH, HIDDEN = 64, 128
ALONE, OURS = "torch.compile", "grape_compile"


def cost() -> Iterator[dict[str, Any]]:
    """One result per number of layers: cold seconds of both ways, seconds of detection and rewriting."""
    for layers in LAYERS:
        samples: dict[str, list[dict[str, float]]] = {ALONE: [], OURS: []}
        for _ in range(SAMPLES):
            for way, found in samples.items():
                found.append(_sample(way, layers))
        yield _result(layers, samples)


def _result(layers: int, samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    cold = Timing.of(sample["cold"] for sample in samples[ALONE])
    ours = Timing.of(sample["cold"] for sample in samples[OURS])
    rewriting = Timing.of(sample["rewriting"] for sample in samples[OURS])
    share = rewriting.median / cold.median
    return {
        "name": f"llama, {layers} layers",
        "seconds": {ALONE: cold.to_json(), OURS: ours.to_json(), "detect and rewrite": rewriting.to_json()},
        "milliseconds per layer": 1000 * rewriting.median / layers,
        "ratio": share,
        "promised": SHARE if layers == 32 else None,
        "holds": share <= SHARE if layers == 32 else None,
        "told": f"{ALONE} cold {cold}; detect and rewrite {rewriting}: {100 * share:.1f} %, "
        f"{1000 * rewriting.median / layers:.1f} ms a layer",
    }


def _sample(way: str, layers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        command = [sys.executable, "-m", "benchmarks.cost", way, str(layers)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def _cold(way: str, layers: int, hidden: int) -> dict[str, float]:
    """Seconds of the first forward pass, and of those the seconds before the graph reaches Inductor."""
    model = build("llama", hidden=hidden, layers=layers)
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
    parser.add_argument("layers", type=int)
    arguments = parser.parse_args()
    _cold(arguments.way, 1, 2 * HIDDEN)
    print(json.dumps(_cold(arguments.way, arguments.layers, HIDDEN)))


if __name__ == "__main__":
    main()
