"""Programs of TVM tuned for the CPU at hand, against what torch.compile makes: attention with ALiBi, and rotation.

    python -m benchmarks.tvm --out benchmarks/results/

All of it runs on one thread, in one process; ways take turns, and a time is the processor time of a call, which other
work on the machine disturbs least. Every result is compared with the definition in float64. `plain TVM` is the
textbook formula in tensor expressions, compiled without a schedule.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import keep
from benchmarks.measuring import Timing, machine, take_turns
from grape_compile.encoding import Half, Positions, Rotation, Table, Tables, alibi
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.bench import Array
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.records import Log
from grape_compile.tuning.programs import search
from grape_compile.tuning.workloads import Workload, attention_workload, rotation_workload

HEADS, LENGTH, HEAD_DIM, BATCH = 8, 512, 64, 8
TRIALS, ROUNDS, BUDGET = 64, 31, 600.0
TUNED, UNTUNED, PLAIN = "tuned", "by hand, untuned", "plain TVM"
SDPA, FLEX, INDUCTOR = "SDPA with bias, torch.compile", "FlexAttention, torch.compile", "torch.compile"
Ways = Mapping[str, Callable[[], Tensor]]


def main() -> None:
    """Measure and keep; exit 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description="programs of TVM against torch.compile, on one thread")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--records", type=Path, help="a directory of records to go on with; none: a new one")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TVM_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = measured(arguments.records or Path(folder), arguments.trials)
        about = {"machine": machine(), "tvm": engine.versions(), "trials": arguments.trials}
        raise SystemExit(0 if keep("tvm", rows, arguments.out / "tvm.json", about) else 1)


def measured(records: Path, trials: int) -> Iterator[dict[str, Any]]:
    """Tune all workloads, then time them: one row for each promise."""
    target = engine.to_target("llvm")
    works = workloads(target)
    start = time.monotonic()
    with Log(records) as log:
        report = search(list(works.values()), target, log, trials=trials)
    spent = time.monotonic() - start
    winners = {each.task: each.winner for each in report.tasks}
    yield {
        "name": "tuning",
        "seconds": spent,
        "holds": spent <= BUDGET,
        "told": f"{len(works)} tasks of at most {trials} trials in {spent:.0f} s (at most {BUDGET:.0f})",
        "tasks": [str(each) for each in report.tasks],
    }
    for name, work in works.items():
        winner = winners[work.task]
        if winner is None:
            yield {"name": name, "holds": False, "told": "; ".join(str(each) for each in report.tasks)}
            continue
        inputs = work.draw(0)
        ways = {
            TUNED: program(work, winner.candidate, target, inputs),
            UNTUNED: program(work, work.candidates[0], target, inputs),
            **(attention_ways(inputs, target) if name == "attention" else rotation_ways(name, inputs)),
        }
        yield from told(name, work, ways, inputs)


def workloads(target: engine.Target) -> dict[str, Workload]:
    """Return what is tuned: ALiBi of 512 tokens, and a batch of queries turned by tables and by positions."""
    head = Operand((1, HEADS, LENGTH, HEAD_DIM))
    query, planes = Operand((BATCH, HEADS, LENGTH, HEAD_DIM)), HEAD_DIM // 2
    tables = {name: Operand((LENGTH, planes)) for name in ("cos", "sin")}
    angles = {"positions": Operand((LENGTH,), "int64"), "inv_freq": Operand((planes,))}
    by_tables = Rotation(Half(HEAD_DIM), None, Tables())
    by_positions = Rotation(Half(HEAD_DIM), Table("inv_freq"), Positions("positions"))
    return {
        "attention": attention_workload(Attention(alibi(HEADS), head, head, head, is_causal=True), target),
        "rotation by tables": rotation_workload(by_tables, query, tables, target),
        "rotation by positions": rotation_workload(by_positions, query, angles, target),
    }


def told(name: str, work: Workload, ways: Ways, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Check every way, let them take turns, and hold their ratios to what is promised."""
    errors = {way: work.error(run(), inputs)[0] for way, run in ways.items()}
    times = take_turns(ways, rounds=ROUNDS, clock=time.process_time)
    torch_best = min((way for way in ways if "torch.compile" in way), key=lambda way: times[way].median)
    promises = [(f"against {torch_best}", TUNED, torch_best, 1.5 if name == "attention" else 1.0)]
    promises.append(("by hand against tuned", UNTUNED, TUNED, 1.5))
    if PLAIN in ways:
        promises.append(("against plain TVM", TUNED, PLAIN, 1 / 5))
    for what, ours, other, most in promises:
        ratio = times[ours].median / times[other].median
        yield {
            "name": f"{name}, {what}",
            "encoding": work.task.encoding,
            "sizes": work.task.sizes,
            "ratio": ratio,
            "promised": most,
            "holds": ratio <= most and errors[TUNED] <= work.error(ways[TUNED](), inputs)[1],
            "seconds": {way: timing.to_json() for way, timing in times.items()},
            "errors": errors,
            "told": f"{ratio:.2f} (at most {most:.2f}): {_milliseconds(times)}",
        }


def program(
    work: Workload, point: Mapping[str, int], target: engine.Target, inputs: Mapping[str, Tensor]
) -> Callable[[], Tensor]:
    """Return a call of one program; its result lies in the memory that the next call writes to."""
    return _call(
        engine.compile_module(work.space.build(point), target), work.space.name, work.arguments(inputs)
    )


def _call(library: Any, name: str, arguments: list[Array]) -> Callable[[], Tensor]:
    values = [torch.from_numpy(each) for each in arguments]
    given, function = [engine.tvm.runtime.from_dlpack(each) for each in values], library[name]

    def call() -> Tensor:
        function(*given)
        return values[-1]

    return call


def attention_ways(inputs: Mapping[str, Tensor], target: engine.Target) -> Ways:
    """Return attention with ALiBi by torch.compile, both ways, and by TVM without a schedule."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    slopes = torch.tensor([2.0 ** -(head + 1) for head in range(HEADS)])
    steps = torch.arange(LENGTH)
    distance = (steps[None, :] - steps[:, None]).float()
    bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)[None]

    def score(logit: Tensor, batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        return logit + slopes[head] * (seen - at)

    def causal(batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        return at >= seen

    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu")
    sdpa, flex = torch.compile(scaled_dot_product_attention), torch.compile(flex_attention)
    return {
        SDPA: lambda: sdpa(query, key, value, attn_mask=bias),
        FLEX: lambda: flex(query, key, value, score_mod=score, block_mask=mask),
        PLAIN: _textbook(query, key, value, slopes, target),
    }


def _textbook(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, target: engine.Target
) -> Callable[[], Tensor]:
    """Return softmax(q k^T / sqrt(D) + slope (j - t)) v with all logits in memory, as TVM compiles it unscheduled."""
    te, tirx = engine.tvm.te, engine.tirx
    shape, logits = (HEADS, LENGTH, HEAD_DIM), (HEADS, LENGTH, LENGTH)
    q, k, v = (te.placeholder(shape, name=name) for name in ("query", "key", "value"))
    beta = te.placeholder((HEADS,), name="slopes")
    d, j, s = (te.reduce_axis((0, size)) for size in (HEAD_DIM, LENGTH, LENGTH))
    raw = te.compute(logits, lambda h, t, i: te.sum(q[h, t, d] * k[h, i, d], axis=d), name="raw")
    low = tirx.const(-1e30, "float32")
    biased = te.compute(
        logits,
        lambda h, t, i: tirx.if_then_else(
            i <= t, raw[h, t, i] * (1.0 / math.sqrt(HEAD_DIM)) + beta[h] * (i - t).astype("float32"), low
        ),
        name="biased",
    )
    top = te.compute(logits[:2], lambda h, t: te.max(biased[h, t, j], axis=j), name="top")
    weight = te.compute(logits, lambda h, t, i: te.exp(biased[h, t, i] - top[h, t]), name="weight")
    i = te.reduce_axis((0, LENGTH))
    total = te.compute(logits[:2], lambda h, t: te.sum(weight[h, t, i], axis=i), name="total")
    mixed = te.compute(shape, lambda h, t, c: te.sum(weight[h, t, s] * v[h, s, c], axis=s), name="mixed")
    output = te.compute(shape, lambda h, t, c: mixed[h, t, c] / total[h, t], name="output")
    function = te.create_prim_func([q, k, v, beta, output]).with_attr("global_symbol", "plain")
    library = engine.compile_module(engine.module_of({"plain": function}), target)
    flat = [each[0].contiguous().numpy() for each in (query, key, value)]
    call = _call(library, "plain", [*flat, slopes.numpy(), torch.zeros(shape).numpy()])
    return lambda: call()[None]


def rotation_ways(name: str, inputs: Mapping[str, Tensor]) -> Ways:
    """Return the rotation of halves by torch.compile, as models write it and with each half computed apart."""
    x = inputs["x"]
    by_tables = name == "rotation by tables"
    slots = [inputs[slot] for slot in (("cos", "sin") if by_tables else ("positions", "inv_freq"))]

    def tables(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if by_tables:
            return first, second
        angles = first[:, None] * second
        return angles.cos(), angles.sin()

    def turned(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        cos, sin = tables(first, second)
        low, high = x.chunk(2, -1)
        return x * torch.cat((cos, cos), -1) + torch.cat((-high, low), -1) * torch.cat((sin, sin), -1)

    def halves(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        cos, sin = tables(first, second)
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    as_written, apart = torch.compile(turned), torch.compile(halves)
    return {INDUCTOR: lambda: as_written(x, *slots), f"{INDUCTOR}, halves apart": lambda: apart(x, *slots)}


def _milliseconds(times: Mapping[str, Timing]) -> str:
    return ", ".join(f"{way} {1e3 * timing.median:.3g} ms" for way, timing in times.items())


if __name__ == "__main__":
    main()
