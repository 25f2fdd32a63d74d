"""Every law, for every sample encoding and every function that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from operator_laws import (
    ATTEND,
    ATTEND_LAWS,
    FALLING,
    OPTION_LAWS,
    PATH_LAWS,
    ROTATE,
    Attend,
    Rotate,
    falls_with_the_distance,
    future,
    generator,
    ignores_the_future,
    operands,
    same,
    streams_keys,
)
from rotation_laws import ROTATE_LAWS

from grape_compile.encoding import (
    AlibiSlopes,
    Clock,
    Compose,
    Distance,
    Encoding,
    Gate,
    Geometric,
    Link,
    LogSigmoid,
    PathBias,
    Planes,
    Rule,
    Slopes,
    Spectrum,
    Term,
    alibi,
    fox,
    gated_alibi,
    rope,
)
from grape_compile.operators.samples import (
    BATCH,
    BIASES,
    COMPOSITIONS,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    PATHS,
    ROTATIONS,
    Sample,
    tensor,
)


def names(value: object) -> str:
    return value.name if isinstance(value, Sample) else str(getattr(value, "__name__", value))


@pytest.mark.parametrize("law", ROTATE_LAWS, ids=names)
@pytest.mark.parametrize("sample", [*ROTATIONS, *GENERATORS], ids=names)
@pytest.mark.parametrize("provider", ROTATE)
def test_rotation_law(provider: str, sample: Sample, law: Callable[[Rotate, Sample], None]) -> None:
    law(ROTATE[provider], sample)


@pytest.mark.parametrize("law", ATTEND_LAWS, ids=names)
@pytest.mark.parametrize("sample", BIASES, ids=names)
@pytest.mark.parametrize("provider", ATTEND)
def test_bias_law(provider: str, sample: Sample, law: Callable[[Attend, Sample], None]) -> None:
    law(ATTEND[provider], sample)


@pytest.mark.parametrize("law", PATH_LAWS, ids=names)
@pytest.mark.parametrize("sample", PATHS, ids=names)
@pytest.mark.parametrize("provider", ATTEND)
def test_path_law(provider: str, sample: Sample, law: Callable[[Attend, Sample], None]) -> None:
    law(ATTEND[provider], sample)


@pytest.mark.parametrize("law", OPTION_LAWS, ids=names)
@pytest.mark.parametrize("sample", [*BIASES, *PATHS, *COMPOSITIONS], ids=names)
@pytest.mark.parametrize("provider", ATTEND)
def test_option_law(provider: str, sample: Sample, law: Callable[[Attend, Sample], None]) -> None:
    law(ATTEND[provider], sample)


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize("provider", ATTEND)
def test_bias_falls_with_the_distance(provider: str, name: str) -> None:
    (sample,) = (each for each in (*BIASES, *PATHS) if each.name == name)
    falls_with_the_distance(ATTEND[provider], sample)


@pytest.mark.parametrize("sample", COMPOSITIONS, ids=names)
@pytest.mark.parametrize("provider", ATTEND)
def test_composition_hides_the_future_and_streams(provider: str, sample: Sample) -> None:
    ignores_the_future(ATTEND[provider], sample)
    streams_keys(ATTEND[provider], sample)


def test_lift_is_unipotent() -> None:
    """A^2 = 0, and I + u E has the singular values sqrt(1 + u^2/2 +- u sqrt(1 + u^2/4)) (App. J)."""
    slope = torch.tensor(AlibiSlopes(4).values(), dtype=torch.float64)
    lifted = generator(slope)
    same(lifted @ lifted, torch.zeros_like(lifted))
    same(torch.linalg.matrix_exp(lifted), torch.eye(lifted.shape[-1], dtype=torch.float64) + lifted)
    found = torch.linalg.svdvals(torch.linalg.matrix_exp(lifted))
    spread = slope * (1 + slope**2 / 4).sqrt()
    same(found[:, 0], (1 + slope**2 / 2 + spread).sqrt())
    same(found[:, -1], (1 + slope**2 / 2 - spread).sqrt())


@pytest.mark.parametrize("provider", ATTEND)
def test_composition_is_one_generator(provider: str) -> None:
    """RoPE with ALiBi is exp((j - t) X) of one X in gl(d + 2), blockdiag(L, -beta E21) (App. E)."""
    query, key, value = operands()
    turn, bias = rope(HEAD_DIM), alibi(HEADS)
    joint = generator(torch.tensor(AlibiSlopes(HEADS).values(), dtype=torch.float64))
    for (first, second), theta in zip(turn.planes.pairs(), Geometric(10000.0).frequencies(4), strict=True):
        joint[..., second, first], joint[..., first, second] = theta, -theta
    steps = torch.arange(LENGTH)[None, :] - torch.arange(LENGTH)[:, None]
    acted = torch.linalg.matrix_exp(steps[..., None, None] * joint[:, None, None]).inverse().mT
    one, zero, scale = torch.ones_like(query[..., :1]), torch.zeros_like(query[..., :1]), HEAD_DIM**-0.5
    lifted = [torch.cat([query, one / scale, zero], -1), torch.cat([key, zero, one], -1)]
    logits = scale * torch.einsum("bhtd,htjde,bhje->bhtj", lifted[0], acted, lifted[1])
    found = ATTEND[provider](query, key, value, Compose((turn, bias)), {}, is_causal=True)
    same(found, logits.masked_fill(future(), -torch.inf).softmax(-1) @ value, 1e-11)


@pytest.mark.parametrize("provider", ATTEND)
def test_constant_gates_are_alibi(provider: str) -> None:
    """FoX whose gates are all alike, and gated slopes with gates of one, are ALiBi (App. C, 4.6)."""
    slopes = torch.tensor(AlibiSlopes(HEADS).values(), dtype=torch.float64)
    forget = (-slopes[:, None]).expand(BATCH, HEADS, LENGTH)
    ones = torch.ones(BATCH, HEADS, LENGTH, dtype=torch.float64)
    wanted = ATTEND["reference"](*operands(), alibi(HEADS), {}, is_causal=True)
    function = ATTEND[provider]
    same(function(*operands(), fox(), {"log_forget": forget}, is_causal=True), wanted)
    half = {"gate_query": 0.5 * ones, "gate_key": 0.5 * ones}
    same(function(*operands(), gated_alibi(HEADS), half, is_causal=True), wanted)


@pytest.mark.parametrize("provider", ATTEND)
def test_edges_without_an_end_are_forget_gates(provider: str) -> None:
    """GRAPE-AP whose edges do not depend on the query is FoX with log f_l = alpha g(<p, r_l> / dim) (5.2)."""
    path = PathBias(LogSigmoid(), AlibiSlopes(HEADS), 4)
    start, ends = tensor(1, HEADS, 1, 4, seed=1), tensor(BATCH, HEADS, LENGTH, 4, seed=2)
    slopes = torch.tensor(AlibiSlopes(HEADS).values(), dtype=torch.float64)[:, None]
    forget = slopes * torch.nn.functional.logsigmoid((start * ends).sum(-1) / 4)
    edges = {"path_query": start.expand(BATCH, HEADS, LENGTH, 4), "path_key": ends}
    wanted = ATTEND["reference"](*operands(), fox(), {"log_forget": forget}, is_causal=True)
    same(ATTEND[provider](*operands(), path, edges, is_causal=True), wanted)


def kinds(base: type[Term]) -> set[str]:
    """Names of the concrete classes below a class (names: a dataclass with slots is made twice)."""
    below = base.__subclasses__()
    return set().union(*map(kinds, below)) if below else {base.__name__}


def terms(value: object) -> set[str]:
    """Names of the classes that a value is made of."""
    if isinstance(value, tuple):
        return set().union(*map(terms, value))
    if not isinstance(value, Term):
        return set()
    return {type(value).__name__}.union(*(terms(getattr(value, field.name)) for field in fields(value)))


SETTLED_BY_A_LENGTH = {"DynamicNtk", "Longrope"}
"""They reach no operator: `at(length)` gives one of the other rules, and without a length they are refused."""


@pytest.mark.parametrize(
    "base", [Encoding, Clock, Planes, Spectrum, Rule, Slopes, Distance, Gate, Link], ids=names
)
def test_every_part_of_the_algebra_has_a_sample(base: type[Term]) -> None:
    """A new value of the algebra needs its row of samples."""
    samples = (*ROTATIONS, *GENERATORS, *BIASES, *PATHS, *COMPOSITIONS)
    seen = set().union(*(terms(sample.encoding) for sample in samples))
    assert kinds(base) - SETTLED_BY_A_LENGTH <= seen
