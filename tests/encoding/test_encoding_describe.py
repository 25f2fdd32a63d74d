"""From numbers back to formulas: what is clean comes back clean, what is no formula stays unnamed."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_compile.encoding import (
    AlibiSlopes,
    Constant,
    Geometric,
    Linear,
    Llama3,
    Proportional,
    Rule,
    Scaled,
    Spectrum,
    Yarn,
    describe_frequencies,
    describe_slopes,
)


def as_float32(values: Sequence[float]) -> list[float]:
    return [struct.unpack("f", struct.pack("f", value))[0] for value in values]


@pytest.mark.parametrize("count", [2, 8, 32, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1000000.0, 10100.0, 1e7, 1.0, 0.5])
@pytest.mark.parametrize("factor", [1.0, 4.0, 8.0, 2.5, 0.5])
def test_clean_numbers_come_back_from_float32(count: int, base: float, factor: float) -> None:
    spectrum = Scaled(Linear(factor), Geometric(base)).canonical()
    assert describe_frequencies(as_float32(spectrum.frequencies(count)), count, 3e-7) == spectrum


def test_the_first_few_of_many_planes() -> None:
    assert describe_frequencies(Geometric(10000.0).frequencies(64)[:16], 64, 1e-9) == Geometric(10000.0)


@pytest.mark.parametrize(
    ("value", "spectrum"), [(1.0, Geometric(1.0)), (0.25, Scaled(Linear(4.0), Geometric(1.0)))]
)
def test_one_frequency_has_base_one(value: float, spectrum: Spectrum) -> None:
    assert describe_frequencies([value], 1, 1e-9) == spectrum


@settings(max_examples=60, deadline=None)
@given(st.floats(1.001, 1e8), st.floats(0.1, 100.0), st.integers(2, 40))
def test_what_is_named_reproduces_the_values(base: float, factor: float, count: int) -> None:
    values = Scaled(Linear(factor), Geometric(base)).frequencies(count)
    described = describe_frequencies(values, count, 1e-9)
    assert described is not None
    assert described.frequencies(count) == pytest.approx(values, rel=1.001e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=6), st.floats(1e-12, 10.0)
)
def test_any_values_are_named_only_where_they_fit(values: list[float], rtol: float) -> None:
    described = describe_frequencies(values, len(values), rtol)
    if described is not None:
        for value, theta in zip(values, described.frequencies(len(values)), strict=True):
            assert abs(value - theta) <= 1.001 * rtol * theta + 1e-12 * theta


RAMPS = (
    # Corners are whole where they are rounded: more than one original length has them.
    (Yarn(16.0, 4096), 10000.0, 32, "scaled(by_parts(16.0, 10.0, 23.0), geometric(10000.0))"),
    (Yarn(4.0, 32768), 1000000.0, 64, "scaled(by_parts(4.0, 23.0, 40.0), geometric(1000000.0))"),
    (Yarn(4.0, 64), 10000.0, 8, "scaled(by_parts(4.0, 0.0, 3.0), geometric(10000.0))"),
    (Yarn(32.0, 4096, truncate=False), 150000.0, 32, "scaled(yarn(32.0, 4096, truncate=false), geometric(150000.0))"),
    (Yarn(8.0, 512, 4.0, 1.0, truncate=False), 10000.0, 32, None),
    (Llama3(8.0, 1.0, 4.0, 8192), 500000.0, 64, None),
    (Llama3(32.0, 1.0, 4.0, 8192), 500000.0, 32, None),
    (Llama3(8.0, 1.0, 4.0, 64), 10000.0, 8, None),
    # Only the ratios of low, high and original count.
    (Llama3(2.0, 0.5, 16.0, 256), 500000.0, 32, "scaled(llama3(2.0, 1.0, 32.0, 512), geometric(500000.0))"),
    (Proportional(4), 1000000.0, 16, None),
)  # fmt: skip


@pytest.mark.parametrize(("rule", "base", "count", "text"), RAMPS)
def test_a_rule_is_read_off_the_numbers(rule: Rule, base: float, count: int, text: str | None) -> None:
    spectrum = Scaled(rule, Geometric(base))
    values = as_float32(spectrum.frequencies(count))
    assert str(describe_frequencies(values, count, 2e-6)) == (text or str(spectrum))


@settings(max_examples=80, deadline=None)
@given(
    st.booleans(),
    st.floats(1.1, 100.0),
    st.floats(2.0, 1e7),
    st.integers(4, 100000),
    st.integers(4, 40),
)
def test_a_rule_that_is_named_reproduces_the_values(
    by_index: bool, factor: float, base: float, original: int, count: int
) -> None:
    rule: Rule = Yarn(factor, original) if by_index else Llama3(factor, 1.0, 4.0, original)
    values = Scaled(rule, Geometric(base)).frequencies(count)
    described = describe_frequencies(values, count, 1e-6)
    if described is not None:
        assert described.frequencies(count) == pytest.approx(values, rel=1.001e-6)


LINE = Geometric(10000.0).frequencies(16)


@pytest.mark.parametrize(
    "values",
    [
        # A step without a ramp: no plane tells where the corners are.
        (*LINE[:8], *(theta / 4 for theta in LINE[8:])),
        # Every plane on the ramp, none at its end.
        Scaled(Llama3(8.0, 1.0, 4.0, 8192), Geometric(10000.0)).frequencies(8),
        # A factor of each plane's own, as LongRoPE searches for.
        tuple(theta / (1.0 + 0.3 * j) for j, theta in enumerate(LINE)),
        # Numbers of many digits fit a ramp too, and were chosen by nobody.
        Scaled(Yarn(4.0012345, 4096), Geometric(10000.0)).frequencies(32),
        (0.0, 0.0),
        (1.0, 0.0, 0.01),
        (1.0, -0.1, 0.01),
        (1.0, 0.1, float("nan")),
        (1.0, 0.1, float("inf")),
        (1.0, 0.01, 0.1),
        (1.0, 0.1, 0.01 * (1 + 1e-5)),
    ],
)
def test_no_formula_is_claimed(values: tuple[float, ...]) -> None:
    assert describe_frequencies(values, len(values), 1e-6) is None


def test_digits_are_kept_where_the_tolerance_needs_them() -> None:
    values = Geometric(12345.678).frequencies(16)
    assert describe_frequencies(values, 16, 1e-12) == Geometric(12345.678)
    assert describe_frequencies(values, 16, 1e-2) == Geometric(12300.0)


@pytest.mark.parametrize("heads", [1, 8, 12, 71])
def test_alibi_slopes_are_recognised(heads: int) -> None:
    assert describe_slopes(as_float32(AlibiSlopes(heads).values()), 1e-6) == AlibiSlopes(heads)


def test_other_slopes_stay_as_they_are() -> None:
    # MPT's order for three heads: every other slope of the next power of two comes first.
    assert describe_slopes([0.0625, 0.00390625, 0.25], 1e-6) == AlibiSlopes(3)
    assert describe_slopes([0.25, 0.0625, 0.00390625], 1e-6) == Constant((0.25, 0.0625, 0.00390625))
    assert describe_slopes([-0.00390625], 1e-6) == Constant((-0.00390625,))
