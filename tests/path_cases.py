"""What the tests of path kernels share: calls of every kind, and how they are compared with the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from operator_errors import leaves
from torch import Tensor

from grape_compile.encoding import (
    Compose,
    Encoding,
    Geometric,
    Half,
    Identity,
    Interleaved,
    Learned,
    Link,
    LogSigmoid,
    NegativeExp,
    PathBias,
    Rotation,
    Steps,
    grape_ap,
    rope,
)
from grape_compile.kernels.path import FEW_QUERIES
from grape_compile.operators import attend, providers, reference_attend
from grape_compile.operators.providers import Provider
from grape_compile.operators.samples import tensor, unit_roundoff

HEADS, HEAD = 2, 8


def path(link: Link, dim: int, normalised: str = "none", *, turned: bool = False) -> PathBias:
    """A path bias with learned slopes."""
    turn = Rotation(Interleaved(dim), Geometric(1.0), Steps()) if turned else None
    return PathBias(link, Learned("slopes"), dim, normalised, turn)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Leave the kernels alone to compute `grape::attend`, wherever they run."""
    before = providers.PROVIDERS
    row = Provider("triton path", "grape_compile.kernels.path", priority=15, turns_queries=True)
    providers.PROVIDERS = (row,)
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
    heads: int = HEADS
    key_heads: int = 1
    values: int = HEAD
    head: int = HEAD
    dtype: torch.dtype = torch.float32
    mask: str = ""
    batch: int = 1
    #: Slopes of the heads: normal numbers without any.
    slopes: tuple[float, ...] = ()
    #: Sizes of queries and keys, and of both sides of the path, against normal numbers.
    size: float = 1.0
    edge: float = 1.0


AP = path(LogSigmoid(), 4, "keys", turned=True)
BOTH = path(LogSigmoid(), 8, "both", turned=True)
NEIGHBOURS = Rotation(Interleaved(16), Geometric(100.0), Steps(), orientation=-1)
WINDOW = {"is_causal": True, "window": 12}
HALF = torch.float16
#: One or two of each kind; the others are slow.
CASES = {
    "ap": Case(grape_ap(HEADS, 8)),
    "bounded": Case(BOTH, dtype=HALF),
    "identity_window": Case(path(Identity(), 2), WINDOW, key_heads=2, queries=17, keys=17),
    "mask_of_numbers": Case(AP, {}, mask="numbers", queries=17, keys=17),
    "leaves": Case(AP, slopes=(8.0, 0.01), queries=41, keys=49),
    "turned_queries": Case(Compose((rope(16), AP)), queries=17, head=16),
}
SLOW = {
    "negative_exp": Case(path(NegativeExp(), 3), edge=0.5),
    "float16": Case(AP, dtype=HALF),
    "float16_raw": Case(path(LogSigmoid(), 5), dtype=HALF, edge=3.0),
    "float16_identity": Case(path(Identity(), 8), dtype=HALF, edge=0.2),
    "float16_exp": Case(path(NegativeExp(), 8, "both"), dtype=HALF),
    "float16_leaves": Case(BOTH, dtype=HALF, slopes=(8.0, 0.01), queries=57, keys=57),
    "sizes_of_edges": Case(path(LogSigmoid(), 8), dtype=HALF, edge=100.0),
    "groups": Case(AP, heads=4, key_heads=2, batch=2, queries=17, keys=17),
    "own_keys": Case(BOTH, key_heads=2, queries=33),
    "one_query": Case(AP, queries=1),
    "few_keys": Case(AP, queries=2, keys=3),
    "whole_tiles": Case(AP, queries=32, keys=48),
    "values": Case(AP, values=20, head=12),
    "scale": Case(AP, {"is_causal": True, "scale": 0.125}),
    "window": Case(AP, WINDOW),
    "window_of_two": Case(BOTH, {"is_causal": True, "window": 2}),
    "mask_of_keys": Case(BOTH, mask="keys", batch=2),
    "mask_alone": Case(AP, {}, mask="random"),
    "mask_and_window": Case(path(Identity(), 4), WINDOW, mask="keys", batch=2),
    "lowest_numbers": Case(AP, mask="lowest", batch=2),
    "numbers_exp": Case(path(NegativeExp(), 4), mask="numbers", edge=0.5),
    "dim_2": Case(path(LogSigmoid(), 2, "both", turned=True), dtype=HALF),
    "dim_16": Case(path(LogSigmoid(), 16, "keys", turned=True), dtype=HALF),
    "dim_32": Case(path(LogSigmoid(), 32, "both", turned=True), dtype=HALF),
    "rotated": Case(Compose((rope(HEAD), AP))),
    "turned_neighbours": Case(Compose((NEIGHBOURS, AP)), dtype=HALF, head=16, heads=4, key_heads=2),
    "turned_leaves": Case(Compose((rope(16), AP)), slopes=(8.0, 0.01), queries=41, keys=49, head=16),
    "turned_halves": Case(replace(AP, turn=Rotation(Half(4), Geometric(10.0), Steps()))),
    "rising": Case(AP, slopes=(-0.3, 0.3)),
    "leaves_window": Case(AP, {"is_causal": True, "window": 30}, slopes=(8.0, 0.01), queries=57, keys=81),
    "leaves_mask": Case(AP, mask="keys", batch=2, slopes=(8.0, 8.0), queries=25, keys=81),
    "leaves_exp": Case(path(NegativeExp(), 4), slopes=(4.0, 1.0), queries=57, keys=57, edge=0.5),
    "leaves_not_rising": Case(AP, slopes=(-3.0, 5.0), queries=41, keys=57),
    "leaves_groups": Case(BOTH, heads=4, slopes=(8.0, 0.1, 1.0, 2.0), queries=41, keys=57),
}  # fmt: skip


def slots_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Slopes above zero unless the case has its own, and both sides of the path, in float32."""
    (bias,) = (each for each in _parts(case.encoding) if isinstance(each, PathBias))
    shapes = {
        "path_query": (case.batch, case.heads, case.queries, bias.dim),
        "path_key": (1, case.heads, case.keys, bias.dim),
    }
    found = {
        name: case.edge * tensor(*shapes[name], seed=seed + 20 + at)
        for at, name in enumerate(case.encoding.slots)
        if name in shapes
    }
    if "slopes" in case.encoding.slots:
        found["slopes"] = (
            torch.tensor(case.slopes) if case.slopes else tensor(case.heads, seed=seed + 30).abs()
        )
    return {name: found[name].float().to(DEVICE) for name in case.encoding.slots}


def _parts(encoding: Encoding) -> tuple[Encoding, ...]:
    return encoding.parts if isinstance(encoding, Compose) else (encoding,)


def mask_of(case: Case) -> Tensor | None:
    if not case.mask:
        return None
    hidden = torch.zeros(case.batch, 1, 1, case.keys, dtype=torch.bool)
    hidden[-1, ..., :5] = True
    if case.mask == "keys":
        return (~hidden).to(DEVICE)
    numbers = tensor(1, case.heads, case.queries, case.keys, seed=30, dtype=torch.float32)
    if case.mask == "random":
        return (numbers > -0.5).to(DEVICE)
    if case.mask == "numbers":
        return numbers.to(DEVICE)
    # As models write padding: rows of the padding are the lowest number from end to end, and softmax is their mean.
    lowest = torch.zeros(case.batch, 1, case.queries, case.keys)
    later = torch.ones(case.queries, case.keys, dtype=torch.bool).triu(case.keys - case.queries + 1)
    lowest.masked_fill_(hidden | later, -math.inf)
    return lowest.clamp_(min=torch.finfo(torch.float32).min).to(DEVICE)


def heads_of(case: Case, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values."""
    shapes = [
        (case.batch, case.heads, case.queries, case.head),
        (case.batch, case.key_heads, case.keys, case.head),
        (case.batch, case.key_heads, case.keys, case.values),
    ]
    sizes = (case.size, case.size, 1.0)
    return [
        (size * tensor(*shape, seed=seed + at)).to(case.dtype).to(DEVICE)
        for at, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]


def compare(case: Case) -> None:
    """Values, and gradients for a random cotangent of queries, keys, values and every slot whose gradient is taken."""
    if case.mask and DEVICE == "cuda" and case.dtype == torch.float32 and case.queries > FEW_QUERIES:
        pytest.skip("left to another provider on a GPU")
    heads, slots, mask = heads_of(case), slots_of(case), mask_of(case)
    results: list[list[Tensor]] = []
    cotangent = tensor(case.batch, case.heads, case.queries, case.values, seed=9, dtype=case.dtype).to(DEVICE)
    functions: tuple[tuple[Callable[..., Tensor], bool], ...] = ((attend, False), (reference_attend, True))
    bias = next(each for each in _parts(case.encoding) if isinstance(each, PathBias))
    learned = [] if isinstance(bias.link, NegativeExp) else list(slots)
    for function, wide in functions:
        parts = leaves(*(part.double() if wide else part for part in heads))
        filled = {name: slot.double() if wide else slot for name, slot in slots.items()}
        filled |= dict(zip(learned, leaves(*(filled[name] for name in learned)), strict=True))
        with kernels_only():
            output = function(*parts, case.encoding, filled, mask=mask, **case.options)
            assert output.dtype == parts[0].dtype
            found = torch.autograd.grad(
                output, [*parts, *(filled[name] for name in learned)], cotangent.to(output.dtype)
            )
        results.append([output, *found])
    # As for other biases (`attention_cases.py`); what is summed along a path is off by the roundings of its edges and
    # by that of the whole sum, T of each, and heads of few bits cut their edges to 22 bits.
    bound = 8 * (case.keys + case.head) * unit_roundoff(torch.float32) + 8 * unit_roundoff(case.dtype)
    for name, ours, wanted in zip(["output", "query", "key", "value", *learned], *results, strict=True):
        assert ours.shape == wanted.shape
        error = float(((ours.double() - wanted).norm() / (wanted.norm() + 1e-30)).detach())
        assert error <= bound, (name, case, error, bound)
