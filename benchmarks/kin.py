"""Case `kin`: one layer of attention under each additive encoding, forward and backward.

ALiBi, FoX and gated slopes against plain causal attention without a bias; GRAPE-AP against its dense formulation, whole
matrices of edges and their sums, compiled by `torch.compile`. On one thread, where elapsed time is CPU time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Timing, take_turns
from grape_compile.encoding import Bias, Encoding, Learned, PathBias, Steps, alibi, fox, gated_alibi, grape_ap
from grape_compile.operators import attend, reference_attend

HEADS, HEAD_DIM, LENGTH, ROUNDS = 8, 64, 2048, 9
PLAIN, DENSE, OURS = "plain causal attention", "dense, torch.compile", "grape::attend"
#: The longest a bias may take against no bias, and GRAPE-AP against its dense form.
BIASED, ALONG_A_PATH = 1.5, 0.5


@dataclass(frozen=True)
class Row:
    """An encoding, its slots, and what it is promised against."""

    name: str
    encoding: Encoding
    slots: dict[str, tuple[int, ...]] = field(default_factory=dict)
    against: str = PLAIN


_TOKENS = (1, HEADS, LENGTH)
ROWS = (
    Row("alibi", alibi(HEADS)),
    Row("alibi, learned slopes", Bias(Learned("slopes"), Steps()), {"slopes": (HEADS,)}),
    Row("fox", fox(), {"log_forget": _TOKENS}),
    Row("gated, query", gated_alibi(HEADS, key=None), {"gate_query": _TOKENS}),
    Row("gated, key", gated_alibi(HEADS, query=None), {"gate_key": _TOKENS}),
    Row("gated, both", gated_alibi(HEADS), {"gate_query": _TOKENS, "gate_key": _TOKENS}),
    Row("grape-ap", grape_ap(HEADS), {"path_query": (*_TOKENS, 8), "path_key": (*_TOKENS, 8)}, DENSE),
)


def kin() -> Iterator[dict[str, Any]]:
    """One result per encoding: medians of both ways, their ratio, the largest difference of their outputs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row in ROWS:
            yield _measured(row)
            torch.compiler.reset()
    finally:
        torch.set_num_threads(threads)


def _measured(row: Row) -> dict[str, Any]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(*_TOKENS, HEAD_DIM).requires_grad_() for _ in range(3))
    cotangent = torch.randn(*_TOKENS, HEAD_DIM)
    slots = {name: _filled(name, shape).requires_grad_() for name, shape in row.slots.items()}

    def ours() -> Tensor:
        return attend(query, key, value, row.encoding, slots, is_causal=True)

    def plain() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    formula = torch.compile(reference_attend)

    def dense() -> Tensor:
        result: Tensor = formula(query, key, value, row.encoding, slots, is_causal=True)
        return result

    other = plain if row.against == PLAIN else dense
    ways: dict[str, Callable[[], object]] = {
        row.against: lambda: _step(
            other, [query, key, value, *(slots.values() if other is dense else ())], cotangent
        ),
        OURS: lambda: _step(ours, [query, key, value, *slots.values()], cotangent),
    }
    timings = take_turns(ways, rounds=ROUNDS)
    wide = [part.detach().double() for part in (query, key, value)]
    exact_slots = {name: slot.detach().double() for name, slot in slots.items()}
    exact = reference_attend(wide[0], wide[1], wide[2], row.encoding, exact_slots, is_causal=True)
    return _result(row, timings, float((ours().detach() - exact).abs().max()))


def _step(function: Callable[[], Tensor], inputs: list[Tensor], cotangent: Tensor) -> None:
    torch.autograd.grad(function(), inputs, cotangent)


def _filled(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "log_forget":
        return torch.nn.functional.logsigmoid(torch.randn(shape) + 4)
    return torch.randn(shape) if name.startswith("path") else torch.nn.functional.softplus(torch.randn(shape))


def _result(row: Row, timings: dict[str, Timing], error: float) -> dict[str, Any]:
    ratio = timings[OURS].median / timings[row.against].median
    promised = ALONG_A_PATH if isinstance(row.encoding, PathBias) else BIASED
    return {
        "name": f"{row.name}, {LENGTH} tokens",
        "encoding": str(row.encoding),
        "threads": torch.get_num_threads(),
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "largest error": error,
        "ratio": ratio,
        "promised": promised,
        "holds": ratio <= promised,
        "told": f"{row.against} {timings[row.against]}; {OURS} {timings[OURS]}; {ratio:.2f} of it, error {error:.1e}",
    }
