"""Whole models as libraries of TVM, beside eager mode and torch.compile, and the table of them in docs/tvm.md.

    python -m benchmarks.tvm_models --out benchmarks/results/

One thread, one process; the three ways take turns, and a time is the processor time of a call, which other work on the
machine disturbs least. All ways take a cache and return one: a prompt of T tokens finds it empty, a step finds PAST
tokens in it. The library is called as `Artifact.run` is, with arrays, and its logits are compared with those of eager.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import keep, write
from benchmarks.measuring import machine, take_turns
from benchmarks.models import build as model_of
from benchmarks.models import token_ids
from grape_compile.export.tvm import Artifact, build
from grape_compile.kernels.tensorir import engine

FAMILIES = {"llama": "Llama", "gptj": "GPT-J", "bloom": "BLOOM"}
SIZES = {"hidden": 256, "heads": 4, "layers": 4, "vocabulary": 96}
PROMPTS, PAST, ROUNDS = (1, 128, 512), 512, 11
LIBRARY, EAGER, COMPILED = "library", "eager", "torch.compile"
#: Logits of float32 models of this size differ by rounding alone.
APART = 1e-4
PAGE = Path("docs/tvm.md")
BEGIN, END = "<!-- written by benchmarks.tvm_models -->\n", "<!-- end -->\n"


def main() -> None:
    """Measure, keep, write the table; exit 1 where a library computes something else."""
    parser = argparse.ArgumentParser(description="whole models by TVM against torch, on one thread")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TVM_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    path = arguments.out / "tvm_models.json"
    with torch.no_grad():
        rows = (row for family in arguments.families for row in measured(family, arguments.rounds))
        about = {"machine": machine(), "tvm": engine.versions(), "sizes": SIZES, "rounds": arguments.rounds}
        holds = keep("tvm_models", rows, path, about)
    write(PAGE, filled(PAGE.read_text(encoding="utf-8"), json.loads(path.read_text(encoding="utf-8"))))
    raise SystemExit(0 if holds else 1)


def measured(family: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Build a model in three ways, and time prompts and a step of each."""
    model = model_of(family, **SIZES)
    start = time.monotonic()
    library = build(model, kv_cache=True, target="llvm", verify=False)
    built = time.monotonic() - start
    fast = copy.deepcopy(model)
    fast.compile(dynamic=False)
    for tokens, past in (*((tokens, 0) for tokens in PROMPTS), (1, PAST)):
        ids = token_ids(past + tokens) % SIZES["vocabulary"]
        ways = {
            LIBRARY: _by_library(library, model, ids, past),
            EAGER: _by_torch(model, ids, past),
            COMPILED: _by_torch(fast, ids, past),
        }
        logits = {way: run() for way, run in ways.items()}
        apart = {way: float((each - logits[EAGER]).abs().max()) for way, each in logits.items()}
        times = take_turns(ways, rounds=rounds, clock=time.process_time)
        told = ", ".join(f"{way} {1e3 * timing.median:.3g} ms" for way, timing in times.items())
        yield {
            "name": f"{family}, {tokens} behind {past}",
            "family": family,
            "tokens": tokens,
            "past": past,
            "seconds": {way: timing.to_json() for way, timing in times.items()},
            "largest difference to eager": apart,
            "seconds of build": built,
            "holds": apart[LIBRARY] <= APART,
            "told": told,
        }


def _by_library(library: Artifact, model: nn.Module, ids: Tensor, past: int) -> Callable[[], Tensor]:
    held: dict[str, Any] = {}
    for value in library.about.inputs:
        if value.name.startswith("past_key_values."):
            _, heads, _, width = value.shape
            held[value.name] = np.zeros((1, int(heads or 1), 0, int(width or 1)), value.dtype)
    if past:
        results = library.run(*_arrays(ids[:, :past], 0), **held)
        held = {name: results[name.replace("past_key_values", "present")] for name in held}
    given = _arrays(ids[:, past:], past)
    return lambda: torch.from_numpy(library.run(*given, **held)["logits"])


def _arrays(ids: Tensor, past: int) -> tuple[Any, ...]:
    """Return tokens, mask and positions as a library with a cache takes them."""
    tokens = ids.shape[1]
    return ids.numpy(), np.ones((1, past + tokens), np.int64), np.arange(past, past + tokens)[None]


def _by_torch(model: nn.Module, ids: Tensor, past: int) -> Callable[[], Tensor]:
    # Without compiling: the step alone is timed.
    cache = model.forward(input_ids=ids[:, :past], use_cache=True).past_key_values if past else None

    def run() -> Tensor:
        output = model(input_ids=ids[:, past:], past_key_values=cache, use_cache=True)
        if cache is not None:
            cache.crop(past - ids.shape[1])  # takes so many off its end
        logits: Tensor = output.logits
        return logits

    return run


def filled(page: str, results: Mapping[str, Any]) -> str:
    """Return a page whose part between the two marks is the table of these results."""
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return before + BEGIN + table(results["rows"]) + END + behind


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the medians in milliseconds, a row for each model and activity."""
    ways = (LIBRARY, EAGER, COMPILED)
    lines = [f"| model | tokens | {' | '.join(ways)} |", "|---" * (2 + len(ways)) + "|"]
    for row in rows:
        what = f"{row['tokens']} behind {row['past']}" if row["past"] else str(row["tokens"])
        cells = [f"{1e3 * row['seconds'][way]['median']:.3g}" for way in ways]
        lines.append(f"| {FAMILIES[row['family']]} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
