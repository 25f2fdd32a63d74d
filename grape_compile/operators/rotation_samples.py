"""Sample operands of everything that turns, and how exact an operator has to be on them."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Axes,
    ByParts,
    Geometric,
    Half,
    Interleaved,
    Learned,
    Linear,
    Llama3,
    NonCommuting,
    Ntk,
    Pairs,
    Partial,
    PerPlane,
    Positions,
    Proportional,
    Rank2,
    Rotation,
    Scaled,
    Steps,
    Table,
    Tables,
    Yarn,
    axial_rope,
    grape_m,
    mrope,
    rope,
    yarn_norm_factor,
)
from grape_compile.operators.sample import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    Fill,
    Random,
    Sample,
    between,
    orthonormal,
    unit_roundoff,
    whole,
)


def _cosines(random: Random) -> Tensor:
    return between(0.0, 6.0, BATCH, 1, LENGTH, HEAD_DIM // 2)(random).cos()


def _sines(random: Random) -> Tensor:
    return between(0.0, 6.0, BATCH, 1, LENGTH, HEAD_DIM // 2)(random).sin()


_ROPE: Final = Geometric(100.0)
_IRREGULAR: Final = Pairs(((0, 3), (5, 1), (2, 7)), HEAD_DIM)
_PER_TOKEN: Final = ("positions", whole(50, BATCH, 1, LENGTH))
_YARN: Final = Scaled(Yarn(4.0, 64), _ROPE)

ROTATIONS: Final = (
    Sample("half", rope(HEAD_DIM)),
    Sample("interleaved", rope(HEAD_DIM, interleaved=True)),
    Sample("partial", rope(HEAD_DIM, rotary_dim=4)),
    Sample("partial_at_end", Rotation(Partial(Interleaved(4), 4, HEAD_DIM), _ROPE, Steps())),
    Sample("irregular", Rotation(_IRREGULAR, _ROPE, Steps())),
    Sample("opposite", Rotation(Half(HEAD_DIM), _ROPE, Steps(), orientation=-1)),
    Sample("regrouped", Rotation(Interleaved(HEAD_DIM), _ROPE, Steps(), out=Half(HEAD_DIM))),
    Sample(
        "moved",
        Rotation(Partial(Half(4), 0, HEAD_DIM), _ROPE, Steps(), out=Partial(Interleaved(4), 3, HEAD_DIM)),
    ),
    Sample("positions", Rotation(Half(HEAD_DIM), _ROPE, Positions("positions")), (_PER_TOKEN,)),
    Sample(
        "real_positions",
        Rotation(Half(HEAD_DIM), _ROPE, Positions("positions")),
        (("positions", between(-9.0, 9.0, BATCH, 1, LENGTH)),),
    ),
    Sample(
        "linear", Rotation(Half(HEAD_DIM), Scaled(Linear(4.0), _ROPE), Positions("positions")), (_PER_TOKEN,)
    ),
    Sample("ntk", Rotation(Half(HEAD_DIM), Scaled(Ntk(4.0), _ROPE), Positions("positions")), (_PER_TOKEN,)),
    Sample(
        "yarn",
        Rotation(Half(HEAD_DIM), _YARN, Positions("positions"), scale=yarn_norm_factor(4.0)),
        (_PER_TOKEN,),
    ),
    Sample(
        "llama3",
        Rotation(Half(HEAD_DIM), Scaled(Llama3(8.0, 1.0, 4.0, 64), _ROPE), Positions("positions")),
        (_PER_TOKEN,),
    ),
    *(
        Sample(name, Rotation(Half(HEAD_DIM), Scaled(rule, _ROPE), Positions("positions")), (_PER_TOKEN,))
        for name, rule in (
            ("by_parts", ByParts(4.0, 0.5, 2.0)),
            ("per_plane", PerPlane((1.0, 1.5, 2.5, 8.0))),
            ("proportional", Proportional(2)),
        )
    ),
    Sample(
        "learned",
        Rotation(Interleaved(HEAD_DIM), Learned("theta"), Steps()),
        (("theta", between(0.0, 1.0, HEAD_DIM // 2)),),
    ),
    Sample(
        "per_head",
        Rotation(Half(HEAD_DIM), Learned("theta"), Positions("positions")),
        (("theta", between(0.0, 1.0, HEADS, 1, HEAD_DIM // 2)), _PER_TOKEN),
    ),
    Sample(
        "table",
        Rotation(Half(HEAD_DIM), Table("inv_freq"), Steps()),
        (("inv_freq", between(0.0, 1.0, HEAD_DIM // 2)),),
    ),
    Sample(
        "tables",
        Rotation(Half(HEAD_DIM), None, Tables(), orientation=-1, scale=1.25),
        (("cos", _cosines), ("sin", _sines)),
    ),
    Sample(
        "accumulated",
        Rotation(Half(HEAD_DIM), _ROPE, Accumulated("rates", True)),
        (("rates", between(0.0, 1.0, BATCH, 1, LENGTH)),),
    ),
    Sample(
        "accumulated_before",
        Rotation(Half(HEAD_DIM), _ROPE, Accumulated("rates", False)),
        (("rates", between(0.0, 1.0, BATCH, HEADS, LENGTH)),),
    ),
    Sample(
        "axes",
        Rotation(Axes(Half(HEAD_DIM), (0, 1, 2, 1)), _ROPE, Positions("positions")),
        (("positions", between(-9.0, 9.0, 3, BATCH, 1, LENGTH)),),
    ),
    Sample(
        "axes_accumulated",
        Rotation(Axes(_IRREGULAR, (1, 0, 1)), Learned("theta"), Accumulated("rates", True)),
        (("theta", between(0.0, 1.0, 3)), ("rates", between(0.0, 1.0, 2, BATCH, 1, LENGTH))),
    ),
    Sample(
        "basis",
        Rotation(Half(HEAD_DIM), Learned("theta"), Positions("positions"), basis="basis", scale=0.5),
        (
            ("theta", between(0.0, 1.0, HEAD_DIM // 2)),
            _PER_TOKEN,
            ("basis", orthonormal(HEAD_DIM, HEAD_DIM)),
        ),
    ),
    Sample(
        "basis_per_head",
        grape_m(HEAD_DIM, basis="basis", rates="rates"),
        (
            ("theta", between(0.0, 1.0, HEADS, 1, HEAD_DIM // 2)),
            ("rates", between(0.0, 1.0, BATCH, HEADS, LENGTH)),
            ("basis", orthonormal(HEADS, HEAD_DIM, HEAD_DIM)),
        ),
    ),
    Sample("axial", axial_rope(HEAD_DIM), (("positions", whole(50, 2, BATCH, 1, LENGTH)),)),
    Sample("mrope", mrope(HEAD_DIM, (2, 1, 1)), (("positions", whole(50, 3, BATCH, 1, LENGTH)),)),
)


def _ramp(slope: float) -> Fill:
    return lambda _: slope * torch.arange(HEAD_DIM, dtype=torch.float64)


def _planes(*angles: float, rest: int = 0) -> Fill:
    """A generator that turns neighbours by these angles, with `rest` coordinates that stand still."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    blocks = [*(angle * turn for angle in angles), torch.zeros(rest, rest, dtype=torch.float64)]
    return lambda _: torch.block_diag(*blocks)


_A: Final = ("a", between(-0.5, 0.5, HEAD_DIM))
_B: Final = ("b", between(-0.5, 0.5, HEAD_DIM))
_TIMES: Final = ("positions", between(-9.0, 9.0, BATCH, 1, LENGTH))
_RATES: Final = ("rates", between(0.0, 1.0, BATCH, HEADS, LENGTH))

GENERATORS: Final = (
    Sample("rank2", Rank2(HEAD_DIM, Geometric(1.0), Steps()), (_A, _B)),
    Sample(
        "rank2_per_head",
        Rank2(HEAD_DIM, Learned("w"), Positions("positions")),
        (("w", between(0.0, 1.0, HEADS, 1, 1)), _TIMES, ("a", between(-0.5, 0.5, HEADS, 1, HEAD_DIM)), _B),
    ),
    Sample(
        "rank2_contextual",
        Rank2(HEAD_DIM, Table("w"), Accumulated("rates", False), orientation=-1),
        (("w", between(0.0, 1.0, 1)), _RATES, _A, ("b", between(-0.5, 0.5, HEADS, 1, HEAD_DIM))),
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
        (("basis", orthonormal(HEAD_DIM, 4)), ("generator", between(-1.0, 1.0, 4, 4))),
    ),
    Sample(
        "non_commuting_per_head",
        NonCommuting(HEAD_DIM, Positions("positions"), orientation=-1),
        (
            _TIMES,
            ("basis", orthonormal(HEADS, HEAD_DIM, 5)),
            ("generator", between(-1.0, 1.0, HEADS, 5, 5)),
        ),
    ),
    Sample(
        "non_commuting_whole",
        NonCommuting(HEAD_DIM, Accumulated("rates", True)),
        (
            _RATES,
            ("basis", orthonormal(HEAD_DIM, HEAD_DIM)),
            ("generator", between(-1.0, 1.0, HEAD_DIM, HEAD_DIM)),
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


def rotate_tolerance(dtype: torch.dtype, largest: float, angle: float, scale: float = 1.0) -> float:
    """Return the largest error of a rotation of numbers up to `largest` by angles up to `angle` radians.

    With u of the compute dtype: position (given), frequency and product are rounded once each, so the angle
    is off by 2 u angle; cosine and sine by that and 2 u of their own, and u for the scale; each of two
    products by u and their sum by u. Both coordinates are at most `largest`, so a coordinate of the result is
    off by 2 scale largest (2 angle + 6) u. The result, at most 2 scale largest, is rounded to `dtype` once. A
    basis adds the error of a product of `HEAD_DIM` terms of size largest: HEAD_DIM u largest, below 2 largest
    (angle + 6) u here.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return 2 * scale * largest * ((4 * angle + 12) * unit_roundoff(wide) + unit_roundoff(dtype))


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
