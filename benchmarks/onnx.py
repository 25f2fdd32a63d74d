"""ONNX files of one model by several exporters: what is in them, how exact and how fast they are on a CPU.

    python -m benchmarks.onnx prompts llama gptj
    python -m benchmarks.onnx steps bloom mpt

Files take turns on one thread; a time is the processor time of a call, which other work on the machine disturbs least.
Memory is what a process that only runs the file needs more at its peak than after loading it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.cases import keep, kept
from benchmarks.coverage.architectures import draw_parameters
from benchmarks.measuring import machine
from benchmarks.onnx_files import FAMILIES, OURS, PLAIN, VOCABULARY, files
from grape_compile.export.kv_cache import CACHE_IN, CACHE_OUT, SHARED, with_cache
from grape_compile.export.onnx import export

FUSED = ("RotaryEmbedding", "Attention", "MultiHeadAttention", "GroupQueryAttention")
#: Tokens in the cache of a step, and those that a buffer for it holds.
CACHED, CAPACITY = 2048, 2304


def open_file(path: Path) -> Any:
    """A session on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def call(session: Any, ids: Tensor) -> Callable[[], Any]:
    """A call of a file on these tokens, all of them seen."""
    feeds = {
        each.name: (ids if "ids" in each.name else torch.ones_like(ids)).numpy()
        for each in session.get_inputs()
    }
    return lambda: session.run(None, feeds)[0]


#: Runs a file once on so many tokens and prints by how many KiB its peak is above what loading it left.
_PEAK = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = {each.name: np.ones((1, int(sys.argv[2])), np.int64) for each in session.get_inputs()}
told = lambda name: int(open("/proc/self/status").read().split(name)[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # what loading needed for a while does not count
held = told("VmRSS:")
session.run(None, given)
print(told("VmHWM:") - held)
"""


def peak(path: Path, length: int) -> int:
    """Bytes that a run of a file on so many tokens needs beside the file."""
    told = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path), str(length)], capture_output=True, check=True
    )
    return 1024 * int(told.stdout)


def processor_times(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each, taking turns; two rounds before them do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn > 1:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _error(found: Any, right: Tensor) -> float:
    return float(np.linalg.norm(found - right.numpy()) / np.linalg.norm(right.numpy()))


def measured(family: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for every file of a family."""
    make, length = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    draw_parameters(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], Any]] = {}
        prompt = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
        for name, path in files(family, model, Path(folder)):
            row = rows[name] = {
                "name": f"{family}, {name}",
                "family": family,
                "exporter": name,
                "holds": None,
            }
            if isinstance(path, str):
                row["failure"] = path
                continue
            try:
                session = open_file(path)
                counted = Counter(node.op_type for node in ir.load(path).graph.all_nodes())
                row |= {
                    "nodes": sum(counted.values()),
                    "fused": {kind: counted[kind] for kind in FUSED if counted[kind]},
                }
                row["bytes"] = sum(each.stat().st_size for each in Path(folder).glob(f"{path.stem}.onnx*"))
                row["error"] = _errors(session, model)
                row["peak"] = peak(path, length)
                calls[name] = call(session, prompt)
            except Exception as failure:
                row["failure"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
        times = processor_times(calls, rounds)
        for name, row in rows.items():
            if name in times:
                row |= {"seconds": times[name], "faster": times[PLAIN] / times[name]}
            yield row | {"told": _told(row)}


def decoded(family: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for every file of a family with a cache: a step of one token behind 2048."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    draw_parameters(model, 0)
    captured = with_cache(model)
    with tempfile.TemporaryDirectory() as folder:
        paths = {PLAIN: Path(folder) / "plain.onnx"}
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            torch.onnx.export(
                captured.program, f=str(paths[PLAIN]), dynamo=True, input_names=list(captured.input_names)
            )
        for name, target in OURS.items():
            for way, told in ((True, ""), (SHARED, f", {SHARED}")):
                path = paths[f"{name}{told}"] = Path(folder) / f"{target}{told}.onnx"
                export(model, path=path, target=target, kv_cache=way, verify=False)
        sessions = {name: open_file(path) for name, path in paths.items()}
        cache = _cache(sessions[PLAIN])
        steps = {
            name: (_step_in_place if name.endswith(SHARED) else _step)(session, cache)
            for name, session in sessions.items()
        }
        right = steps[PLAIN]()
        times = processor_times(steps, 3 * rounds)
        for name, step in steps.items():
            error = float(np.linalg.norm(step() - right) / np.linalg.norm(right))
            faster = times[PLAIN] / times[name]
            yield {
                "name": f"{family}, a step behind {CACHED} tokens, {name}",
                "family": family,
                "exporter": name,
                "seconds": times[name],
                "faster": faster,
                "difference": error,
                "holds": None,
                "told": f"{faster:.3f} x the plain file; differs by {error:.1e}",
            }


def _cache(session: Any) -> dict[str, Any]:
    """Keys and values of the tokens before a step: one copy for all files, since their memory is most of its time."""
    random = np.random.default_rng(0)
    past = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    return {
        each.name: random.standard_normal((1, each.shape[1], CACHED, each.shape[3])).astype(np.float32)
        for each in past
    }


def _step(session: Any, cache: dict[str, Any]) -> Callable[[], Any]:
    feeds = {**_token(session), **cache}
    return lambda: session.run(None, feeds)[0]


def _token(session: Any) -> dict[str, Any]:
    """What a step is given beside its cache."""
    given = {
        "input_ids": np.full((1, 1), 7, np.int64),
        "attention_mask": np.ones((1, CACHED + 1), np.int64),
        "position_ids": np.full((1, 1), CACHED, np.int64),
    }
    asked = {each.name for each in session.get_inputs()}
    return {name: numbers for name, numbers in given.items() if name in asked}


def _step_in_place(session: Any, cache: dict[str, Any]) -> Callable[[], Any]:
    """A step whose caches are buffers, bound as input and output."""
    binding = session.io_binding()
    for name, numbers in _token(session).items():
        binding.bind_cpu_input(name, numbers)
    binding.bind_output("logits")
    buffers = []
    for name, numbers in cache.items():
        rows, heads, count, width = numbers.shape
        buffer = np.zeros((rows, heads, CAPACITY, width), numbers.dtype)
        buffer[:, :, :count] = numbers
        buffers.append(held := onnxruntime.OrtValue.ortvalue_from_numpy(buffer))
        binding.bind_ortvalue_input(name, held)
        binding.bind_ortvalue_output(name.replace(CACHE_IN, CACHE_OUT), held)

    def step(buffers: Any = buffers) -> Any:
        session.run_with_iobinding(binding)  # it does not keep the buffers
        return binding.get_outputs()[0].numpy()

    return step


def _errors(session: Any, model: nn.Module) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for batch in (1, 3):
        ids = torch.randint(3, VOCABULARY, (batch, 24), generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            right = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        try:
            found[str(batch)] = _error(call(session, ids)(), right)
        except Exception as failure:
            found[str(batch)] = type(failure).__name__
    return found


def _told(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return str(row.get("failure", "not timed"))
    fused = ", ".join(f"{count} {kind}" for kind, count in row["fused"].items()) or "nothing fused"
    needed = f"{row['peak'] / 2**20:.0f} MiB at the peak"
    return f"{row['faster']:.3f} x the plain file ({fused}); {needed}; errors {row['error']}"


WAYS: dict[str, Callable[[str, int], Iterator[dict[str, Any]]]] = {"prompts": measured, "steps": decoded}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the families named on the command line, all without a name; rows of others on this machine stay."""
    parser = argparse.ArgumentParser(description="compare ONNX files of several exporters")
    parser.add_argument(
        "way", choices=WAYS, help="whole prompts without a cache, or steps of one token behind one"
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/onnx_WAY.json")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    families = given.families or list(FAMILIES)
    rows = (row for family in families for row in WAYS[given.way](family, given.rounds))
    machine_now = {**machine(), "onnxruntime": onnxruntime.__version__, "clock": "processor time, one thread"}
    about = {"machine": machine_now}
    out = given.out or Path("benchmarks/results") / f"onnx_{given.way}.json"
    others = [row for row in kept(out, about) if row["family"] not in families]
    keep("onnx", rows, out, about, others)


if __name__ == "__main__":
    main()
