"""Timing on a GPU: many runs in one CUDA graph, so that launching costs nothing; the copy rate as the yardstick."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch

from grape_compile.tuning.timing import replays

#: Runs in one graph at most, and replays that are timed.
RUNS: Final = 10
REPETITIONS: Final = 15
#: A graph of a run of this many microseconds hides its launch by itself.
LONG: Final = 2000.0


@dataclass(frozen=True)
class Timed:
    """Median microseconds of one run, the middle half of them, and bytes allocated at most beyond what was there."""

    microseconds: float
    spread: tuple[float, float]
    peak_bytes: int

    def rate(self, size: int) -> float:
        """Gigabytes per second for `size` bytes read and written."""
        return size / self.microseconds / 1e3

    def row(self) -> dict[str, Any]:
        """Return what is kept."""
        low, high = self.spread
        return {
            "us": round(self.microseconds, 2),
            "us_low": round(low, 2),
            "us_high": round(high, 2),
            "peak_bytes": self.peak_bytes,
        }


def timed(run: Callable[[], object]) -> Timed:
    """Return the time of a function that starts work on the GPU."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stream.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    once = 1000.0 * start.elapsed_time(stop)
    times = sorted(replays(run, max(1, min(RUNS, round(LONG / once))), REPETITIONS))
    quarter = len(times) // 4
    return Timed(median(times), (times[quarter], times[-1 - quarter]), peak)


def copy_rate(size: int) -> float:
    """Return the gigabytes per second of torch's copy that reads and writes `size` bytes in all."""
    source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source)).rate(2 * source.numel())


def gpu() -> dict[str, str]:
    """Return what the numbers were measured on."""
    import triton

    return {
        "name": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": str(triton.__version__),
        "python": platform.python_version(),
    }
