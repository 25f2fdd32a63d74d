"""What the tests of attention kernels share: calls of every kind, and how they are compared with the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_cases import DEVICE
from operator_errors import leaves
from torch import Tensor

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    Bias,
    Compose,
    Encoding,
    Gate,
    Interleaved,
    Learned,
    Positions,
    Rotation,
    Steps,
    Uniform,
    alibi,
    fox,
    gated_alibi,
    nope,
    rope,
)
from grape_compile.operators import attend, providers, reference_attend
from grape_compile.operators.providers import Provider
from grape_compile.operators.samples import tensor, unit_roundoff

HEADS, HEAD = 2, 8
SLOPES = Bias(Learned("slopes"), Steps())
PHASE = Bias(Learned("slopes"), Accumulated("rates", False))
GATED = Bias(Learned("slopes"), Steps(), gate=Gate("gate_query", "gate_key"))
ABSOLUTE = Bias(Learned("slopes"), Positions("times"), distance=Absolute())
CLOCKED = Bias(Learned("slopes"), Positions("times"), gate=Gate("gate_query", "gate_key"))
EVERYTHING = Compose(
    (
        rope(HEAD),
        alibi(HEADS),
        fox(),
        Bias(Learned("slopes"), Positions("times"), gate=Gate(key="gate_key"), distance=Absolute()),
    )
)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Leave the kernels alone to compute `grape::attend`, wherever they run."""
    before = providers.PROVIDERS
    providers.PROVIDERS = (
        Provider("triton", "grape_compile.kernels.attention", priority=20, turns_queries=True),
    )
    try:
        yield
    finally:
        providers.PROVIDERS = before


@dataclass(frozen=True)
class Case:
    """Tiles of 16 by 16: by default two of queries over three of keys, the last of each ragged."""

    encoding: Encoding
    options: dict[str, Any] = field(default_factory=lambda: {"is_causal": True})
    queries: int = 25
    keys: int = 33
    key_heads: int = 1
    values: int = HEAD
    head: int = HEAD
    dtype: torch.dtype = torch.float32
    mask: str = ""
    batch: int = 1
    sinks: bool = False
    segments: bool = False


OPEN: dict[str, Any] = {}
WINDOW = {"is_causal": True, "window": 12}
CASES = {
    "none": Case(nope()),
    "none_open": Case(nope(), OPEN, values=20, dtype=torch.float16),
    "none_band": Case(nope(), {"window": 12, "scale": 0.5}),
    "no_keys_for_some": Case(alibi(HEADS), queries=33, keys=17),
    "alibi": Case(alibi(HEADS), key_heads=2, batch=2, queries=17, keys=17),
    "alibi_open": Case(alibi(HEADS), OPEN, dtype=torch.float16),
    "slopes_window": Case(SLOPES, WINDOW),
    "slopes_band": Case(SLOPES, {"window": 12}),
    "fox": Case(fox(), head=20),
    "phase": Case(PHASE, OPEN),
    "gated": Case(GATED),
    "gated_window": Case(gated_alibi(HEADS, query=None), WINDOW),
    "gated_clock": Case(CLOCKED),
    "absolute": Case(ABSOLUTE, OPEN),
    "everything": Case(EVERYTHING, key_heads=2),
    "summed": Case(
        Compose((Bias(Uniform(0.25), Positions("times")), Bias(Uniform(0.5), Accumulated("rates", True)))),
        {"is_causal": True},
    ),
    "capped": Case(SLOPES, {"is_causal": True, "cap": 0.75}),
    "capped_open": Case(nope(), {"cap": 0.75}, dtype=torch.float16),
    "sinks": Case(PHASE, sinks=True, key_heads=2),
    "sinks_for_no_key": Case(GATED, sinks=True, queries=33, keys=17),
    "segments": Case(fox(), segments=True, batch=2),
    "segments_open": Case(nope(), OPEN, segments=True, sinks=True),
    "together": Case(
        CLOCKED, {"is_causal": True, "cap": 0.75}, mask="keys", batch=2, sinks=True, segments=True
    ),
    "turned": Case(Compose((rope(16), alibi(HEADS))), head=16, dtype=torch.float16),
    "turned_by_neighbours": Case(
        Compose((Rotation(Interleaved(16), Learned("theta"), Positions("times")), SLOPES)),
        queries=17,
        keys=17,
        head=16,
    ),
    "mask_of_keys": Case(SLOPES, mask="keys", batch=2, queries=17, keys=17),
    "mask_of_numbers": Case(fox(), OPEN, mask="numbers", queries=17, keys=17),
    "lowest_numbers": Case(gated_alibi(HEADS, key=None), mask="lowest", queries=17, keys=17),
}


def slots_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Slots of every kind, in float32: slopes and gates above zero, log f below."""
    shapes = {
        "slopes": (HEADS,),
        "gate_query": (case.batch, HEADS, case.queries),
        "gate_key": (1, HEADS, case.keys),
        "rates": (case.batch, case.keys),
        "times": (case.keys,),
        "theta": (8,),
        "log_forget": (case.batch, HEADS, case.keys),
    }
    found = {name: tensor(*shapes[name], seed=seed + 20).abs() for name in case.encoding.slots}
    found |= {name: -slot for name, slot in found.items() if name == "log_forget"}
    if "rates" in found:
        # Their sum does not grow with the sequence: else every query would see one key.
        found["rates"] *= 33 / max(case.keys, 33)
    return {name: slot.float().to(DEVICE) for name, slot in found.items()}


def beside(case: Case) -> dict[str, Tensor]:
    """Sinks and segments of a case; the last two of its three segments in turns."""
    found = {}
    if case.sinks:
        found["sinks"] = tensor(HEADS, seed=31).float().to(DEVICE)
    if case.segments:
        places = torch.arange(case.keys).expand(case.batch, -1)
        found["segments"] = torch.where(places < 12, 7, places % 2).to(DEVICE)
    return found


def mask_of(case: Case) -> Tensor | None:
    if not case.mask:
        return None
    hidden = torch.zeros(case.batch, 1, 1, case.keys, dtype=torch.bool)
    hidden[-1, ..., :5] = True
    if case.mask == "keys":
        return (~hidden).to(DEVICE)
    if case.mask == "numbers":
        return tensor(1, HEADS, case.queries, case.keys, seed=30, dtype=torch.float32).to(DEVICE)
    # As models write padding: rows of the padding are the lowest number from end to end, and softmax is their mean.
    lowest = torch.zeros(case.batch, 1, case.queries, case.keys)
    lowest.masked_fill_(hidden | torch.ones(case.queries, case.keys, dtype=torch.bool).triu(1), -math.inf)
    return lowest.clamp_(min=torch.finfo(torch.float32).min).to(DEVICE)


def compare(case: Case) -> None:
    """Values, and gradients for a random cotangent of queries, keys, values and every floating slot."""
    shapes = [
        (case.batch, HEADS, case.queries, case.head),
        (case.batch, case.key_heads, case.keys, case.head),
        (case.batch, case.key_heads, case.keys, case.values),
    ]
    heads = [tensor(*shape, seed=seed, dtype=case.dtype).to(DEVICE) for seed, shape in enumerate(shapes)]
    slots, mask, extra = slots_of(case), mask_of(case), beside(case)
    segments = extra.pop("segments", None)
    learned = slots | extra
    results: list[list[Tensor]] = []
    cotangent = tensor(case.batch, HEADS, case.queries, case.values, seed=9, dtype=case.dtype).to(DEVICE)
    functions: tuple[tuple[Callable[..., Tensor], bool], ...] = ((attend, False), (reference_attend, True))
    for function, wide in functions:
        parts = leaves(*(part.double() if wide else part for part in heads))
        filled = dict(
            zip(learned, leaves(*(slot.double() if wide else slot for slot in learned.values())), strict=True)
        )
        named = {name: filled[name] for name in slots}
        options = case.options | {name: filled[name] for name in extra}
        with kernels_only():
            output = function(*parts, case.encoding, named, mask=mask, segments=segments, **options)
            assert output.dtype == parts[0].dtype
            found = torch.autograd.grad(output, [*parts, *filled.values()], cotangent.to(output.dtype))
        results.append([output, *found])
    # A number is a sum of at most T + D products, off by as many roundings; weights, their gradients and results are
    # rounded to the dtype once each, and a gradient is a difference of two such numbers. That of a slot is one of sums
    # over all queries, in which roundings of the output of each remain.
    for number, (ours, wanted) in enumerate(zip(*results, strict=True)):
        assert ours.shape == wanted.shape
        roundings = 8 if number <= len(heads) else max(8.0, case.queries**0.5)
        bound = 8 * (case.keys + case.head) * unit_roundoff(torch.float32)
        bound += roundings * unit_roundoff(case.dtype)
        error = float(((ours.double() - wanted).norm() / (wanted.norm() + 1e-30)).detach())
        assert error <= bound, (case, error, bound)
