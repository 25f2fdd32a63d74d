"""Case `upgrading`: a training step of an upgraded model beside one of the model it was, and the memory of a path.

The steps take turns in one run, both models compiled alike, on one thread; their seconds are processor time, which
neighbours on the machine do not lengthen. Peak memory is that of a fresh process each, one layer forward and backward
at 4096 tokens: `grape::attend` and the dense formulation, matrices of all queries and keys.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import take_turns
from grape_compile import grape_compile, upgrade

BATCH, LENGTH, ROUNDS = 2, 512, 9
WIDTH, LAYERS, HEADS = 256, 4, 8
#: The longest a step may take against the original's, and the most memory of a path against the dense form.
STEP, MEMORY = 1.2, 0.25
LONG = 4096


def upgrading() -> Iterator[dict[str, Any]]:
    """One result for each pair of a model and what it becomes, then that of memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, make, to in (
            ("llama", _llama, "grape-m"),
            ("bloom", _bloom, "fox"),
            ("bloom", _bloom, "grape-a-q"),
            ("bloom", _bloom, "grape-a-k"),
            ("bloom", _bloom, "grape-a-qk"),
            ("llama", _llama, "fox"),
        ):
            yield _step(name, make, to)
            torch.compiler.reset()
    finally:
        torch.set_num_threads(threads)
    yield _memory()


def _llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=HEADS, vocab_size=1024))
    return model


def _bloom() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": 1024}
    model: nn.Module = BloomForCausalLM(BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0))
    return model


def _step(name: str, make: Any, to: str) -> dict[str, Any]:
    ids = torch.randint(1024, (BATCH, LENGTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {
            "torch.compile": torch.compile(make()),
            "grape_compile": grape_compile(make()),
            to: upgrade(make(), to),
        }
    ways = {way: (lambda model=model: _train(model, ids)) for way, model in models.items()}
    timings = take_turns(ways, rounds=ROUNDS, clock=time.process_time)
    # Of the original the faster way counts.
    original = min(timings["torch.compile"].median, timings["grape_compile"].median)
    ratio = timings[to].median / original
    return {
        "name": f"{name} to {to}, {BATCH} x {LENGTH} tokens",
        "seconds": {way: timing.to_json() for way, timing in timings.items()},
        "ratio": ratio,
        "promised": STEP,
        "holds": ratio <= STEP,
        "told": f"{'; '.join(f'{way} {timing}' for way, timing in timings.items())}; {ratio:.2f} of the original",
    }


def _train(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward of one step; the optimiser does the same for both."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _memory() -> dict[str, Any]:
    peaks = {}
    for way in ("idle", "operator", "dense"):
        done = subprocess.run(
            [sys.executable, "-c", f"from benchmarks.upgrading import peak; print(peak({way!r}))"],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[way] = float(done.stdout.split()[-1])
    ours, dense = peaks["operator"] - peaks["idle"], peaks["dense"] - peaks["idle"]
    return {
        "name": f"grape-ap, peak memory at {LONG} tokens",
        "megabytes": peaks,
        "ratio": ours / dense,
        "promised": MEMORY,
        "holds": ours <= MEMORY * dense,
        "told": f"grape::attend {ours:.0f} MB; dense {dense:.0f} MB; {ours / dense:.3f} of it",
    }


def peak(way: str) -> float:
    """Megabytes this process holds at most, one head forward and backward; "idle" computes at one token."""
    from grape_compile.encoding import grape_ap
    from grape_compile.operators import attend, reference_attend

    length, heads, encoding = 1 if way == "idle" else LONG, 2, grape_ap(2)
    shapes = [(1, heads, length, 32)] * 3 + [(1, heads, length, 8)] * 2
    query, key, value, *edges = (torch.randn(shape).requires_grad_() for shape in shapes)
    slots = {"path_query": edges[0], "path_key": edges[1]}
    function = reference_attend if way == "dense" else attend
    function(query, key, value, encoding, slots, is_causal=True).sum().backward()
    # Of this program alone: what `getrusage` tells is at least what the process that started it held.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
