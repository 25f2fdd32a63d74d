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
    PATH_LAWS,
    ROTATE,
    Attend,
    Rotate,
    falls_with_the_distance,
    generator,
    ignores_the_future,
    same,
    streams_keys,
)
from rotation_laws import ROTATE_LAWS

from grape_compile.encoding import (
    AlibiSlopes,
    Clock,
    Distance,
    Encoding,
    Gate,
    Link,
    Planes,
    Rule,
    Slopes,
    Spectrum,
    Term,
)
from grape_compile.operators.samples import BIASES, COMPOSITIONS, GENERATORS, PATHS, ROTATIONS, Sample


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


@pytest.mark.parametrize(
    "base", [Encoding, Clock, Planes, Spectrum, Rule, Slopes, Distance, Gate, Link], ids=names
)
def test_every_part_of_the_algebra_has_a_sample(base: type[Term]) -> None:
    """A new value of the algebra needs its row of samples."""
    samples = (*ROTATIONS, *GENERATORS, *BIASES, *PATHS, *COMPOSITIONS)
    seen = set().union(*(terms(sample.encoding) for sample in samples))
    assert kinds(base) <= seen
