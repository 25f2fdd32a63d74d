"""Case `models`: what a user of a whole model sees, beside eager mode and `torch.compile`.

Three activities of each family: `prefill` (a forward pass over a prompt), `decode` (tokens one after the other, from a
cache that holds a prompt) and `train` (forward, backward and a step of AdamW). On a GPU the models have about 10^9
parameters in bfloat16, on a CPU they are small, in float32 and on one thread, and seconds are processor time, which
neighbours on the machine do not lengthen.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.measuring import Timing, take_turns
from benchmarks.models import build, token_ids
from grape_compile import grape_compile, report

FAMILIES: Final = ("llama", "qwen3", "gptj", "bloom", "fox", "grape_ap")
ACTIVITIES: Final = ("prefill", "decode", "train")
EAGER, ALONE, OURS = "eager", "torch.compile", "grape_compile"
#: The least speed-up of a prefill on a CPU against `torch.compile` that is promised.
PROMISED: Final = {"llama": 1.0, "qwen3": 1.0, "gptj": 1.0, "bloom": 1.8, "grape_ap": 3.0}
#: Two ways that do the same differ by as much when they take turns.
NOISE: Final = 0.03


@dataclass(frozen=True)
class Scale:
    """The size of the models, and how much of each activity is timed."""

    hidden: int
    heads: int
    layers: int
    vocabulary: int
    prompt: int
    batch: int
    #: Tokens decoded in one run.
    steps: int
    rounds: int
    dtype: torch.dtype
    device: str


SMALL: Final = Scale(256, 8, 4, 1000, 2048, 1, 16, 5, torch.float32, "cpu")
LARGE: Final = Scale(2048, 16, 16, 32000, 4096, 2, 64, 7, torch.bfloat16, "cuda")


def models(done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """One result per family and activity that is not done: medians and peak memory of the three ways, their ratio."""
    scale = LARGE if torch.cuda.is_available() else SMALL
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if scale.device == "cpu" else threads)
    try:
        for family in FAMILIES:
            for activity in ACTIVITIES:
                if _named(family, activity) in done:
                    continue
                yield measured(family, activity, scale)
                torch.compiler.reset()
                gc.collect()
    finally:
        torch.set_num_threads(threads)


def measured(family: str, activity: str, scale: Scale) -> dict[str, Any]:
    """Time one activity of a family in three ways that take turns."""
    models = {EAGER: _made(family, scale)}
    models[ALONE], models[OURS] = copy.deepcopy(models[EAGER]), copy.deepcopy(models[EAGER])
    models[ALONE].compile()
    grape_compile(models[OURS])
    ways = {name: _way(activity, model, scale) for name, model in models.items()}
    results = {name: way() for name, way in ways.items()}
    clock = time.process_time if scale.device == "cpu" else time.perf_counter
    timings = take_turns(ways, rounds=scale.rounds, warm_up=1, clock=clock)
    memory = {name: _peak(way, scale) for name, way in ways.items()}
    ratio = timings[ALONE].median / timings[OURS].median
    promised = PROMISED.get(family) if (activity, scale.device) == ("prefill", "cpu") else None
    return {
        "name": _named(family, activity),
        "family": family,
        "activity": activity,
        "scale": {**asdict(scale), "dtype": str(scale.dtype).removeprefix("torch.")},
        "parameters": sum(parameter.numel() for parameter in models[EAGER].parameters()),
        "threads": torch.get_num_threads(),
        "sites": len(report(models[OURS]).sites),
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "tokens per second": {
            name: _tokens(activity, scale) / timing.median for name, timing in timings.items()
        },
        "peak MiB": memory,
        "largest difference to eager": {
            name: float((result - results[EAGER]).abs().max()) for name, result in results.items()
        },
        "ratio": ratio,
        "promised": promised,
        "holds": None if promised is None else ratio >= promised - NOISE,
        "told": _told(timings, memory, ratio),
    }


def _named(family: str, activity: str) -> str:
    return f"{family}, {activity}"


def _made(family: str, scale: Scale) -> nn.Module:
    sizes = {"hidden": scale.hidden, "heads": scale.heads, "layers": scale.layers}
    with torch.device(scale.device):
        return build(family, **sizes, vocabulary=scale.vocabulary).to(scale.dtype)


def _way(activity: str, model: nn.Module, scale: Scale) -> Callable[[], Tensor]:
    """One run of an activity, which ends when the device has done it. It returns logits, or a loss."""
    ids = token_ids(scale.prompt, scale.batch).to(scale.device)
    run = {"prefill": _prefill, "decode": _decode, "train": _train}[activity](model, ids, scale)

    def finished() -> Tensor:
        result = run()
        if scale.device == "cuda":
            torch.cuda.synchronize()
        return result

    return finished


def _prefill(model: nn.Module, ids: Tensor, scale: Scale) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return run


def _decode(model: nn.Module, ids: Tensor, scale: Scale) -> Callable[[], Tensor]:
    with torch.no_grad():
        start = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> Tensor:
        cache, logits = start, ids
        for step in range(scale.steps):
            output = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits
        if hasattr(cache, "crop"):
            cache.crop(-scale.steps)
        return logits

    return run


def _train(model: nn.Module, ids: Tensor, scale: Scale) -> Callable[[], Tensor]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _tokens(activity: str, scale: Scale) -> int:
    return scale.batch * (scale.steps if activity == "decode" else scale.prompt)


def _peak(way: Callable[[], object], scale: Scale) -> float | None:
    """MiB that a run needs at most beyond what is there before it; None where the system does not say."""
    gc.collect()
    if scale.device == "cuda":
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    way()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _told(timings: dict[str, Timing], memory: dict[str, float | None], ratio: float) -> str:
    parts = [
        f"{name} {timing}" + ("" if memory[name] is None else f", {memory[name]:.0f} MiB")
        for name, timing in timings.items()
    ]
    return f"{'; '.join(parts)}; {ratio:.2f} x"
