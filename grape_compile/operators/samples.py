"""One row of sample operands for every encoding, and how exact an operator has to be on them.

The rows are what a new operator, kernel or export target is tested on; a new value of the algebra gets its
row here.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    AlibiSlopes,
    Bias,
    Compose,
    Constant,
    Euclidean,
    Gate,
    Geometric,
    Half,
    Identity,
    Learned,
    Link,
    LogSigmoid,
    NegativeExp,
    Nope,
    PathBias,
    Positions,
    Rotation,
    Slopes,
    Steps,
    Table,
    Uniform,
    alibi,
    fox,
    gated_alibi,
    grape_ap,
    rope,
)
from grape_compile.operators.rotation_samples import (
    GENERATORS,
    ROTATIONS,
    generator_tolerance,
    rotate_tolerance,
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
    normal,
    query_axes,
    tensor,
    unit_roundoff,
    whole,
)

__all__ = [
    "BATCH",
    "BIASES",
    "COMPOSITIONS",
    "GENERATORS",
    "HEADS",
    "HEAD_DIM",
    "LENGTH",
    "PATHS",
    "ROTATIONS",
    "Fill",
    "Random",
    "Sample",
    "attend_gradient_tolerance",
    "attend_tolerance",
    "generator_tolerance",
    "query_axes",
    "rotate_tolerance",
    "tensor",
    "unit_roundoff",
]


def _left_padded(random: Random) -> Tensor:
    padding = torch.randint(3, (BATCH, 1), generator=random)
    return (torch.arange(LENGTH) - padding).clamp(min=0)


_ROPE: Final = Geometric(100.0)

BIASES: Final = (
    Sample("nope", Nope()),
    Sample("alibi", alibi(HEADS)),
    Sample("constant", Bias(Constant((3.0, 0.0, -0.25, 40.0)), Steps())),
    Sample(
        "table_slopes",
        Bias(Table("slopes"), Steps()),
        (("slopes", between(0.0, 1.0, HEADS)),),
    ),
    Sample(
        "learned_slopes", Bias(Learned("slopes"), Steps()), (("slopes", between(0.0, 1.0, BATCH, HEADS)),)
    ),
    Sample("counted", Bias(AlibiSlopes(HEADS), Positions("positions")), (("positions", _left_padded),)),
    Sample(
        "learned_clock",
        Bias(Learned("slopes"), Positions("positions")),
        (("slopes", between(0.0, 1.0, HEADS)), ("positions", between(0.0, 9.0, BATCH, LENGTH))),
    ),
    Sample(
        "forgetting",
        Bias(Learned("slopes"), Accumulated("rates", True)),
        (("slopes", between(0.0, 1.0, HEADS)), ("rates", between(0.0, 1.0, BATCH, LENGTH))),
    ),
    Sample("absolute", Bias(AlibiSlopes(HEADS), Steps(), distance=Absolute())),
    Sample(
        "absolute_clock",
        Bias(Learned("slopes"), Positions("positions"), distance=Absolute()),
        (("slopes", between(0.0, 1.0, HEADS)), ("positions", between(0.0, 9.0, LENGTH))),
    ),
    Sample(
        "euclidean",
        Bias(AlibiSlopes(HEADS), Positions("positions"), distance=Euclidean()),
        (("positions", normal(2, BATCH, LENGTH)),),
    ),
    Sample("fox", fox(), (("log_forget", between(-1.0, 0.0, BATCH, HEADS, LENGTH)),)),
    Sample(
        "fox_exclusive",
        Bias(Uniform(-1.0), Accumulated("log_forget", False)),
        (("log_forget", between(-1.0, 0.0, BATCH, LENGTH)),),
    ),
    Sample(
        "phase_modulated",
        Bias(Learned("theta"), Accumulated("rates", False)),
        (("theta", between(0.0, 1.0, HEADS)), ("rates", between(0.0, 1.0, BATCH, HEADS, LENGTH))),
    ),
    Sample(
        "gated_query",
        gated_alibi(HEADS, key=None),
        (("gate_query", between(0.0, 2.0, BATCH, HEADS, LENGTH)),),
    ),
    Sample(
        "gated_key", gated_alibi(HEADS, query=None), (("gate_key", between(0.0, 2.0, BATCH, HEADS, LENGTH)),)
    ),
    Sample(
        "gated_both",
        Bias(Learned("slopes"), Steps(), gate=Gate("gate_query", "gate_key")),
        (
            ("slopes", between(0.0, 1.0, HEADS)),
            ("gate_query", between(0.0, 2.0, BATCH, HEADS, LENGTH)),
            ("gate_key", between(-1.0, 2.0, BATCH, HEADS, LENGTH)),
        ),
    ),
    Sample(
        "gated_clock",
        Bias(AlibiSlopes(HEADS), Accumulated("rates", True), gate=Gate(key="gate_key")),
        (
            ("rates", between(0.0, 1.0, BATCH, LENGTH)),
            ("gate_key", between(0.0, 2.0, HEADS, LENGTH)),
        ),
    ),
    Sample(
        "gated_absolute",
        Bias(AlibiSlopes(HEADS), Steps(), gate=Gate("gate_query"), distance=Absolute()),
        (("gate_query", between(0.0, 2.0, BATCH, 1, LENGTH)),),
    ),
)


def _path(link: Link, slopes: Slopes, normalised: str, turn: Rotation | None = None) -> PathBias:
    return PathBias(link, slopes, 4, normalised, turn)


_EDGES: Final = (
    ("path_query", normal(BATCH, HEADS, LENGTH, 4)),
    ("path_key", normal(BATCH, HEADS, LENGTH, 4)),
)

#: Biases that only a causal call has.
PATHS: Final = (
    Sample("grape_ap", grape_ap(HEADS, 4), _EDGES),
    Sample("grape_ap_both", grape_ap(HEADS, 4, "both"), _EDGES),
    Sample("path_plain", _path(LogSigmoid(), Constant((0.5, -0.25, 3.0, 0.0)), "none"), _EDGES),
    Sample(
        "path_learned",
        _path(NegativeExp(), Learned("slopes"), "none"),
        (("slopes", between(0.0, 1.0, HEADS)), *_EDGES),
    ),
    Sample(
        "path_identity",
        _path(Identity(), Uniform(0.5), "none", Rotation(Half(4), Learned("theta"), Positions("n"))),
        (("theta", between(0.0, 1.0, 2)), ("n", whole(50, BATCH, 1, LENGTH)), *_EDGES),
    ),
    Sample(
        "path_shared",
        _path(LogSigmoid(), AlibiSlopes(HEADS), "both"),
        (("path_query", normal(HEADS, LENGTH, 4)), ("path_key", normal(BATCH, 1, LENGTH, 4))),
    ),
    Sample("rope_grape_ap", Compose((rope(HEAD_DIM), grape_ap(HEADS, 4))), _EDGES),
    Sample(
        "grape_ap_fox",
        Compose((grape_ap(HEADS, 4), fox())),
        (*_EDGES, ("log_forget", between(-1.0, 0.0, BATCH, HEADS, LENGTH))),
    ),
)

COMPOSITIONS: Final = (
    Sample("rope_alibi", Compose((rope(HEAD_DIM), alibi(HEADS)))),
    Sample(
        "two_rotations_bias",
        Compose(
            (
                rope(HEAD_DIM, rotary_dim=4),
                Compose((Rotation(Half(HEAD_DIM), Learned("theta"), Positions("n")),)),
                Bias(Learned("slopes"), Steps()),
            )
        ),
        (
            ("theta", between(0.0, 1.0, HEAD_DIM // 2)),
            ("n", whole(50, BATCH, 1, LENGTH)),
            ("slopes", between(0.0, 1.0, HEADS)),
        ),
    ),
    Sample(
        "dictionary",
        Compose(
            (
                alibi(HEADS),
                fox(),
                Bias(Learned("slopes"), Positions("n"), gate=Gate("gate_query", "gate_key")),
            )
        ),
        (
            ("log_forget", between(-1.0, 0.0, BATCH, HEADS, LENGTH)),
            ("slopes", between(0.0, 1.0, HEADS)),
            ("n", whole(9, BATCH, LENGTH)),
            ("gate_query", between(0.0, 2.0, BATCH, HEADS, LENGTH)),
            ("gate_key", between(0.0, 2.0, BATCH, HEADS, LENGTH)),
        ),
    ),
    Sample(
        "two_axes",
        Compose((Bias(Learned("alpha_x"), Positions("x")), Bias(Learned("alpha_y"), Positions("y")))),
        (
            ("alpha_x", between(-1.0, 1.0, HEADS)),
            ("x", between(0.0, 5.0, LENGTH)),
            ("alpha_y", between(-1.0, 1.0, HEADS)),
            ("y", between(0.0, 5.0, BATCH, LENGTH)),
        ),
    ),
    Sample(
        "signed_and_not",
        Compose((fox(), Bias(AlibiSlopes(HEADS), Positions("r"), distance=Euclidean()))),
        (("log_forget", between(-1.0, 0.0, BATCH, LENGTH)), ("r", normal(2, BATCH, LENGTH))),
    ),
    Sample(
        "contextual_fox",
        Compose((Rotation(Half(HEAD_DIM), _ROPE, Accumulated("rates", False)), fox())),
        (
            ("rates", between(0.0, 1.0, BATCH, 1, LENGTH)),
            ("log_forget", between(-1.0, 0.0, BATCH, HEADS, LENGTH)),
        ),
    ),
)


def _largest(numbers: Tensor) -> float:
    return float(numbers.detach().double().abs().max()) if numbers.numel() else 0.0


def attend_tolerance(
    dtype: torch.dtype,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    largest_bias: float = 0.0,
    offset: float = 0.0,
) -> float:
    """Return the largest error of an attention output; operands [B, H, T, D], scale 1/sqrt(D).

    A logit is a sum of D products of size at most m = max|q||k|, off by (D + 2) u m scaled, plus u times the
    bias that matters: a key whose bias is below the row's largest by 2 m + 100 has no weight left. Then a
    weight is off by the factor 1 + 2 e, with e the error of a logit, and by T + 8 roundings of exponential
    and sum; the output is a mean of values with those weights, by T roundings. Kernels round weights to
    `dtype` before the product, partial outputs once more when parts are merged, and the result: 4 roundings
    to `dtype`. Where a mask adds `offset` to all keys of a row, two sums of that size are rounded as well.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size, length, u = query.shape[-1], key.shape[-2], unit_roundoff(wide)
    norms = [_largest(torch.linalg.vector_norm(part.double(), dim=-1)) for part in (query, key)]
    product = norms[0] * norms[1] / math.sqrt(size)
    logit = (size + 2) * u * product + u * (min(largest_bias, 2 * product + 100) + 2 * offset)
    return _largest(value) * (2 * logit + (2 * length + 8) * u + 4 * unit_roundoff(dtype))


def attend_gradient_tolerance(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> float:
    """Return the largest error of the gradients of query, key and value in float32 or float64 operands.

    With G = D_v max|g| max|v| the derivative of a weight is at most G and that of a logit, w (dw - mean dw),
    at most 2 w G; both are off by the relative error r of a weight (see `attend_tolerance`) and D_v + T
    roundings. A gradient sums at most T of them, times scale max|k| or max|q|, or weights times max|g|. The
    bias is taken as small next to the logits.
    """
    size, length = query.shape[-1], max(key.shape[-2], query.shape[-2])
    largest = [_largest(part) for part in (query, key, value, cotangent)]
    relative = attend_tolerance(query.dtype, query, key, torch.ones_like(value))
    u = unit_roundoff(query.dtype)
    weight = value.shape[-1] * largest[3] * largest[2] * (4 * relative + 2 * (value.shape[-1] + length) * u)
    return length * max(weight * max(largest[0], largest[1]) / math.sqrt(size), largest[3] * relative)
