"""Timing a kernel on a GPU without the time it takes to launch it: many launches in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Final

import torch

from grape_compile.kernels.launch import Launch

#: Launches of one graph, and graphs that are timed; the median is the time.
LAUNCHES: Final = 20
REPETITIONS: Final = 11


def microseconds(launch: Launch) -> float:
    """Return the median time of one launch."""
    return median(replays(launch.run, LAUNCHES, REPETITIONS))


def replays(run: Callable[[], object], runs: int, repetitions: int) -> list[float]:
    """Return the microseconds of one `run` on the GPU, once for each replay of a graph of `runs` of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Compiled and warm before anything is captured.
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(runs):
            run()
    times: list[float] = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000.0 * start.elapsed_time(stop) / runs)
    return times
