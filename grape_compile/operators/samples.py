"""One row of sample operands for every encoding, and how exact an operator has to be on them.

The rows are what a new operator, kernel or export target is tested on; a new value of the algebra gets its
row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    AlibiSlopes,
    Axes,
    Bias,
    Compose,
    Constant,
    Encoding,
    Euclidean,
    Gate,
    Geometric,
    Half,
    Identity,
    Interleaved,
    Learned,
    Linear,
    Link,
    Llama3,
    LogSigmoid,
    NegativeExp,
    Nope,
    Ntk,
    Pairs,
    Partial,
    PathBias,
    Positions,
    Rotation,
    Scaled,
    Slopes,
    Steps,
    Table,
    Tables,
    Uniform,
    Yarn,
    alibi,
    fox,
    gated_alibi,
    grape_ap,
    rope,
    yarn_norm_factor,
)

BATCH: Final = 2
HEADS: Final = 4
LENGTH: Final = 9
HEAD_DIM: Final = 8

Random = torch.Generator
Fill = Callable[[Random], Tensor]


@dataclass(frozen=True)
class Sample:
    """An encoding and how to fill its slots, for tensors [BATCH, HEADS, LENGTH, HEAD_DIM].

    Slots are made in float64 (positions of whole numbers in int64); `slots` casts the floating ones.
    """

    name: str
    encoding: Encoding
    fills: tuple[tuple[str, Fill], ...] = ()

    def slots(
        self, dtype: torch.dtype = torch.float64, seed: int = 0, queries: int = LENGTH
    ) -> dict[str, Tensor]:
        """Return tensors for all slots, floating ones in `dtype`, for the last `queries` of LENGTH tokens."""
        random = torch.Generator().manual_seed(seed)
        made = {name: fill(random) for name, fill in self.fills}
        for name, axis in query_axes(self.encoding).items():
            made[name] = made[name].narrow(axis, LENGTH - queries, queries)
        return {name: slot.to(dtype) if slot.is_floating_point() else slot for name, slot in made.items()}


def query_axes(encoding: Encoding) -> dict[str, int]:
    """Return the slots that have one entry for each query, not for each key, and their axis of tokens."""
    match encoding:
        case Compose(parts):
            return {name: axis for part in parts for name, axis in query_axes(part).items()}
        case PathBias():
            return {encoding.query: -2}
        case Bias(gate=Gate(query=str(name))):
            return {name: -1}
        case _:
            return {}


def tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return normal numbers of unit variance, drawn in float64 and rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _normal(*shape: int) -> Fill:
    return lambda random: torch.randn(shape, generator=random, dtype=torch.float64)


def _between(low: float, high: float, *shape: int) -> Fill:
    return lambda random: low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)


def _whole(high: int, *shape: int) -> Fill:
    return lambda random: torch.randint(high, shape, generator=random)


def _left_padded(random: Random) -> Tensor:
    padding = torch.randint(3, (BATCH, 1), generator=random)
    return (torch.arange(LENGTH) - padding).clamp(min=0)


def _cosines(random: Random) -> Tensor:
    return _between(0.0, 6.0, BATCH, 1, LENGTH, HEAD_DIM // 2)(random).cos()


def _sines(random: Random) -> Tensor:
    return _between(0.0, 6.0, BATCH, 1, LENGTH, HEAD_DIM // 2)(random).sin()


def _orthogonal(random: Random) -> Tensor:
    basis: Tensor = torch.linalg.qr(_normal(HEAD_DIM, HEAD_DIM)(random)).Q
    return basis


_ROPE: Final = Geometric(100.0)
_IRREGULAR: Final = Pairs(((0, 3), (5, 1), (2, 7)), HEAD_DIM)
_PER_TOKEN: Final = ("positions", _whole(50, BATCH, 1, LENGTH))
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
        (("positions", _between(-9.0, 9.0, BATCH, 1, LENGTH)),),
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
    Sample(
        "learned",
        Rotation(Interleaved(HEAD_DIM), Learned("theta"), Steps()),
        (("theta", _between(0.0, 1.0, HEAD_DIM // 2)),),
    ),
    Sample(
        "per_head",
        Rotation(Half(HEAD_DIM), Learned("theta"), Positions("positions")),
        (("theta", _between(0.0, 1.0, HEADS, 1, HEAD_DIM // 2)), _PER_TOKEN),
    ),
    Sample(
        "table",
        Rotation(Half(HEAD_DIM), Table("inv_freq"), Steps()),
        (("inv_freq", _between(0.0, 1.0, HEAD_DIM // 2)),),
    ),
    Sample(
        "tables",
        Rotation(Half(HEAD_DIM), None, Tables(), orientation=-1, scale=1.25),
        (("cos", _cosines), ("sin", _sines)),
    ),
    Sample(
        "accumulated",
        Rotation(Half(HEAD_DIM), _ROPE, Accumulated("rates", True)),
        (("rates", _between(0.0, 1.0, BATCH, 1, LENGTH)),),
    ),
    Sample(
        "accumulated_before",
        Rotation(Half(HEAD_DIM), _ROPE, Accumulated("rates", False)),
        (("rates", _between(0.0, 1.0, BATCH, HEADS, LENGTH)),),
    ),
    Sample(
        "axes",
        Rotation(Axes(Half(HEAD_DIM), (0, 1, 2, 1)), _ROPE, Positions("positions")),
        (("positions", _between(-9.0, 9.0, 3, BATCH, 1, LENGTH)),),
    ),
    Sample(
        "axes_accumulated",
        Rotation(Axes(_IRREGULAR, (1, 0, 1)), Learned("theta"), Accumulated("rates", True)),
        (("theta", _between(0.0, 1.0, 3)), ("rates", _between(0.0, 1.0, 2, BATCH, 1, LENGTH))),
    ),
    Sample(
        "basis",
        Rotation(Half(HEAD_DIM), Learned("theta"), Positions("positions"), basis="basis", scale=0.5),
        (("theta", _between(0.0, 1.0, HEAD_DIM // 2)), _PER_TOKEN, ("basis", _orthogonal)),
    ),
)

BIASES: Final = (
    Sample("nope", Nope()),
    Sample("alibi", alibi(HEADS)),
    Sample("constant", Bias(Constant((3.0, 0.0, -0.25, 40.0)), Steps())),
    Sample(
        "table_slopes",
        Bias(Table("slopes"), Steps()),
        (("slopes", _between(0.0, 1.0, HEADS)),),
    ),
    Sample(
        "learned_slopes", Bias(Learned("slopes"), Steps()), (("slopes", _between(0.0, 1.0, BATCH, HEADS)),)
    ),
    Sample("counted", Bias(AlibiSlopes(HEADS), Positions("positions")), (("positions", _left_padded),)),
    Sample(
        "learned_clock",
        Bias(Learned("slopes"), Positions("positions")),
        (("slopes", _between(0.0, 1.0, HEADS)), ("positions", _between(0.0, 9.0, BATCH, LENGTH))),
    ),
    Sample(
        "forgetting",
        Bias(Learned("slopes"), Accumulated("rates", True)),
        (("slopes", _between(0.0, 1.0, HEADS)), ("rates", _between(0.0, 1.0, BATCH, LENGTH))),
    ),
    Sample("absolute", Bias(AlibiSlopes(HEADS), Steps(), distance=Absolute())),
    Sample(
        "absolute_clock",
        Bias(Learned("slopes"), Positions("positions"), distance=Absolute()),
        (("slopes", _between(0.0, 1.0, HEADS)), ("positions", _between(0.0, 9.0, LENGTH))),
    ),
    Sample(
        "euclidean",
        Bias(AlibiSlopes(HEADS), Positions("positions"), distance=Euclidean()),
        (("positions", _normal(2, BATCH, LENGTH)),),
    ),
    Sample("fox", fox(), (("log_forget", _between(-1.0, 0.0, BATCH, HEADS, LENGTH)),)),
    Sample(
        "fox_exclusive",
        Bias(Uniform(-1.0), Accumulated("log_forget", False)),
        (("log_forget", _between(-1.0, 0.0, BATCH, LENGTH)),),
    ),
    Sample(
        "phase_modulated",
        Bias(Learned("theta"), Accumulated("rates", False)),
        (("theta", _between(0.0, 1.0, HEADS)), ("rates", _between(0.0, 1.0, BATCH, HEADS, LENGTH))),
    ),
    Sample(
        "gated_query",
        gated_alibi(HEADS, key=None),
        (("gate_query", _between(0.0, 2.0, BATCH, HEADS, LENGTH)),),
    ),
    Sample(
        "gated_key", gated_alibi(HEADS, query=None), (("gate_key", _between(0.0, 2.0, BATCH, HEADS, LENGTH)),)
    ),
    Sample(
        "gated_both",
        Bias(Learned("slopes"), Steps(), gate=Gate("gate_query", "gate_key")),
        (
            ("slopes", _between(0.0, 1.0, HEADS)),
            ("gate_query", _between(0.0, 2.0, BATCH, HEADS, LENGTH)),
            ("gate_key", _between(-1.0, 2.0, BATCH, HEADS, LENGTH)),
        ),
    ),
    Sample(
        "gated_clock",
        Bias(AlibiSlopes(HEADS), Accumulated("rates", True), gate=Gate(key="gate_key")),
        (
            ("rates", _between(0.0, 1.0, BATCH, LENGTH)),
            ("gate_key", _between(0.0, 2.0, HEADS, LENGTH)),
        ),
    ),
    Sample(
        "gated_absolute",
        Bias(AlibiSlopes(HEADS), Steps(), gate=Gate("gate_query"), distance=Absolute()),
        (("gate_query", _between(0.0, 2.0, BATCH, 1, LENGTH)),),
    ),
)


def _path(link: Link, slopes: Slopes, normalised: str, turn: Rotation | None = None) -> PathBias:
    return PathBias(link, slopes, 4, normalised, turn)


_EDGES: Final = (
    ("path_query", _normal(BATCH, HEADS, LENGTH, 4)),
    ("path_key", _normal(BATCH, HEADS, LENGTH, 4)),
)

#: Biases that only a causal call has.
PATHS: Final = (
    Sample("grape_ap", grape_ap(HEADS, 4), _EDGES),
    Sample("grape_ap_both", grape_ap(HEADS, 4, "both"), _EDGES),
    Sample("path_plain", _path(LogSigmoid(), Constant((0.5, -0.25, 3.0, 0.0)), "none"), _EDGES),
    Sample(
        "path_learned",
        _path(NegativeExp(), Learned("slopes"), "none"),
        (("slopes", _between(0.0, 1.0, HEADS)), *_EDGES),
    ),
    Sample(
        "path_identity",
        _path(Identity(), Uniform(0.5), "none", Rotation(Half(4), Learned("theta"), Positions("n"))),
        (("theta", _between(0.0, 1.0, 2)), ("n", _whole(50, BATCH, 1, LENGTH)), *_EDGES),
    ),
    Sample(
        "path_shared",
        _path(LogSigmoid(), AlibiSlopes(HEADS), "both"),
        (("path_query", _normal(HEADS, LENGTH, 4)), ("path_key", _normal(BATCH, 1, LENGTH, 4))),
    ),
    Sample("rope_grape_ap", Compose((rope(HEAD_DIM), grape_ap(HEADS, 4))), _EDGES),
    Sample(
        "grape_ap_fox",
        Compose((grape_ap(HEADS, 4), fox())),
        (*_EDGES, ("log_forget", _between(-1.0, 0.0, BATCH, HEADS, LENGTH))),
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
            ("theta", _between(0.0, 1.0, HEAD_DIM // 2)),
            ("n", _whole(50, BATCH, 1, LENGTH)),
            ("slopes", _between(0.0, 1.0, HEADS)),
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
            ("log_forget", _between(-1.0, 0.0, BATCH, HEADS, LENGTH)),
            ("slopes", _between(0.0, 1.0, HEADS)),
            ("n", _whole(9, BATCH, LENGTH)),
            ("gate_query", _between(0.0, 2.0, BATCH, HEADS, LENGTH)),
            ("gate_key", _between(0.0, 2.0, BATCH, HEADS, LENGTH)),
        ),
    ),
    Sample(
        "two_axes",
        Compose((Bias(Learned("alpha_x"), Positions("x")), Bias(Learned("alpha_y"), Positions("y")))),
        (
            ("alpha_x", _between(-1.0, 1.0, HEADS)),
            ("x", _between(0.0, 5.0, LENGTH)),
            ("alpha_y", _between(-1.0, 1.0, HEADS)),
            ("y", _between(0.0, 5.0, BATCH, LENGTH)),
        ),
    ),
    Sample(
        "signed_and_not",
        Compose((fox(), Bias(AlibiSlopes(HEADS), Positions("r"), distance=Euclidean()))),
        (("log_forget", _between(-1.0, 0.0, BATCH, LENGTH)), ("r", _normal(2, BATCH, LENGTH))),
    ),
    Sample(
        "contextual_fox",
        Compose((Rotation(Half(HEAD_DIM), _ROPE, Accumulated("rates", False)), fox())),
        (
            ("rates", _between(0.0, 1.0, BATCH, 1, LENGTH)),
            ("log_forget", _between(-1.0, 0.0, BATCH, HEADS, LENGTH)),
        ),
    ),
)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return float(torch.finfo(dtype).eps) / 2


def _largest(numbers: Tensor) -> float:
    return float(numbers.detach().double().abs().max()) if numbers.numel() else 0.0


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
