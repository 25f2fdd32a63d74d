"""Sample operands for generators by the matrix exponential, and how exact an operator has to be on them."""

from __future__ import annotations

import math
from typing import Final

import torch

from grape_compile.encoding import (
    Accumulated,
    Geometric,
    Learned,
    NonCommuting,
    Positions,
    Rank2,
    Steps,
    Table,
)
from grape_compile.operators.samples import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    Fill,
    Sample,
    orthonormal,
    unit_roundoff,
)


def _uniform(low: float, high: float, *shape: int) -> Fill:
    return lambda random: low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)


def _ramp(slope: float) -> Fill:
    return lambda _: slope * torch.arange(HEAD_DIM, dtype=torch.float64)


def _planes(*angles: float, rest: int = 0) -> Fill:
    """A generator that turns neighbours by these angles, with `rest` coordinates that stand still."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    blocks = [*(angle * turn for angle in angles), torch.zeros(rest, rest, dtype=torch.float64)]
    return lambda _: torch.block_diag(*blocks)


_A: Final = ("a", _uniform(-0.5, 0.5, HEAD_DIM))
_B: Final = ("b", _uniform(-0.5, 0.5, HEAD_DIM))
_TIMES: Final = ("positions", _uniform(-9.0, 9.0, BATCH, 1, LENGTH))
_RATES: Final = ("rates", _uniform(0.0, 1.0, BATCH, HEADS, LENGTH))

GENERATORS: Final = (
    Sample("rank2", Rank2(HEAD_DIM, Geometric(1.0), Steps()), (_A, _B)),
    Sample(
        "rank2_per_head",
        Rank2(HEAD_DIM, Learned("w"), Positions("positions")),
        (("w", _uniform(0.0, 1.0, HEADS, 1, 1)), _TIMES, ("a", _uniform(-0.5, 0.5, HEADS, 1, HEAD_DIM)), _B),
    ),
    Sample(
        "rank2_contextual",
        Rank2(HEAD_DIM, Table("w"), Accumulated("rates", False), orientation=-1),
        (("w", _uniform(0.0, 1.0, 1)), _RATES, _A, ("b", _uniform(-0.5, 0.5, HEADS, 1, HEAD_DIM))),
    ),
    Sample(
        "rank2_parallel",
        Rank2(HEAD_DIM, Geometric(1.0), Positions("positions")),
        (
            _TIMES,
            ("a", _ramp(0.125)),
            ("b", _ramp(0.25)),
        ),
    ),
    Sample(
        "non_commuting",
        NonCommuting(HEAD_DIM, Steps()),
        (("basis", orthonormal(HEAD_DIM, 4)), ("generator", _uniform(-1.0, 1.0, 4, 4))),
    ),
    Sample(
        "non_commuting_per_head",
        NonCommuting(HEAD_DIM, Positions("positions"), orientation=-1),
        (
            _TIMES,
            ("basis", orthonormal(HEADS, HEAD_DIM, 5)),
            ("generator", _uniform(-1.0, 1.0, HEADS, 5, 5)),
        ),
    ),
    Sample(
        "non_commuting_whole",
        NonCommuting(HEAD_DIM, Accumulated("rates", True)),
        (
            _RATES,
            ("basis", orthonormal(HEAD_DIM, HEAD_DIM)),
            ("generator", _uniform(-1.0, 1.0, HEAD_DIM, HEAD_DIM)),
        ),
    ),
    Sample(
        "non_commuting_repeated",
        NonCommuting(HEAD_DIM, Accumulated("rates", False)),
        (_RATES, ("basis", orthonormal(HEAD_DIM, 7)), ("generator", _planes(0.7, 0.7, -0.7, rest=1))),
    ),
    Sample(
        "non_commuting_zero",
        NonCommuting(HEAD_DIM, Positions("positions")),
        (_TIMES, ("basis", orthonormal(HEAD_DIM, 3)), ("generator", _planes(rest=3))),
    ),
)


def generator_tolerance(dtype: torch.dtype, largest: float, gain: float = 2.0) -> float:
    """Return the largest error of x + F M F^T x for numbers up to `largest`; |F| |M| |F| is at most `gain`.

    With u of the compute dtype: F and M are float64 rounded once (3 u); products with F sum HEAD_DIM terms, M two
    and F^T at most HEAD_DIM, so (2 HEAD_DIM + 2) u; each of numbers at most gain |x|, |x| <= sqrt(HEAD_DIM)
    largest, and sqrt(HEAD_DIM) more for sums of absolute values. The result, at most |x|, is rounded to `dtype`
    once. An orthonormal F has |F| = 1, and G - I at most 2.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = math.sqrt(HEAD_DIM) * largest
    wide_error = math.sqrt(HEAD_DIM) * gain * (2 * HEAD_DIM + 5) * unit_roundoff(wide)
    return size * (wide_error + 2 * unit_roundoff(dtype))
