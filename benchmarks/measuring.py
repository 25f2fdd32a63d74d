"""Timing that survives a busy machine: ways to do one thing take turns, medians and spread are kept."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Timing:
    """Seconds of one way to do a thing: median, quartiles, and every sample."""

    median: float
    lower: float
    upper: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        values = tuple(samples)
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values)
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), lower, upper, values)

    def __str__(self) -> str:
        return f"{self.median:.4g} s ({self.lower:.4g} .. {self.upper:.4g}, {len(self.samples)} runs)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Seconds of every way by `clock`, run one after the other `rounds` times after `warm_up` uncounted rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        for name, way in ways.items():
            start = clock()
            way()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return {name: Timing.of(samples) for name, samples in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers were taken on: processor, threads, versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
