"""The scaling rules against the initialisers of transformers, for configurations that models ship with."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grape_compile.encoding import (
    ByParts,
    DynamicNtk,
    Geometric,
    Half,
    Linear,
    Llama3,
    Longrope,
    Ntk,
    PerPlane,
    Proportional,
    Rotation,
    Rule,
    Scaled,
    Steps,
    Tiled,
    Yarn,
    longrope_norm_factor,
    yarn_norm_factor,
)
from grape_compile.errors import EncodingError

# transformers computes frequencies in float32: a power and a few products, each within 2^-24 of its value.
FLOAT32 = 8 * 2.0**-24


def of_transformers(
    kind: str, base: float, head_dim: int, seq_len: int | None = None, **parameters: Any
) -> tuple[list[float], float]:
    """Frequencies and norm factor of a Llama configuration with these rope parameters."""
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
    )
    frequencies, norm = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=seq_len)
    return [float(theta) for theta in frequencies.double()], norm


def ours(rule: Rule, base: float, head_dim: int) -> tuple[float, ...]:
    return Scaled(rule, Geometric(base)).frequencies(head_dim // 2)


@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0])
@pytest.mark.parametrize(("base", "head_dim"), [(10000.0, 64), (500000.0, 128), (10000.0, 6)])
def test_linear(factor: float, base: float, head_dim: int) -> None:
    frequencies, norm = of_transformers("linear", base, head_dim, factor=factor)
    assert ours(Linear(factor), base, head_dim) == pytest.approx(frequencies, rel=FLOAT32)
    assert norm == 1.0


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("seq_len", [1, 1024, 2048, 4096, 10000])
def test_dynamic_ntk_is_ntk_by_the_length(seq_len: int, factor: float) -> None:
    frequencies, norm = of_transformers("dynamic", 10000.0, 64, seq_len=seq_len, factor=factor)
    assert ours(DynamicNtk(factor, 2048).at(seq_len), 10000.0, 64) == pytest.approx(frequencies, rel=FLOAT32)
    assert norm == 1.0


SHORT, LONG = tuple(1.0 + 0.125 * j for j in range(16)), tuple(1.5 + 2.0 * j for j in range(16))


@pytest.mark.parametrize("seq_len", [1, 512, 513, 2048])
def test_longrope(seq_len: int) -> None:
    frequencies, norm = of_transformers(
        "longrope",
        10000.0,
        32,
        seq_len=seq_len,
        short_factor=list(SHORT),
        long_factor=list(LONG),
        original_max_position_embeddings=512,
        factor=4.0,
    )
    rule = Longrope(SHORT, LONG, 512)
    assert ours(rule.at(seq_len), 10000.0, 32) == pytest.approx(frequencies, rel=FLOAT32)
    assert longrope_norm_factor(4.0, 512) == pytest.approx(norm, rel=1e-12)
    assert longrope_norm_factor(0.5, 512) == 1.0


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize(
    ("proportion", "head_dim"), [(0.25, 64), (0.3, 64), (0.29, 200), (1.0, 32), (0.5, 6)]
)
def test_proportional(proportion: float, head_dim: int, factor: float) -> None:
    frequencies, norm = of_transformers(
        "proportional", 1e6, head_dim, partial_rotary_factor=proportion, factor=factor
    )
    rule = Proportional(int(proportion * head_dim // 2))
    found = Scaled(Linear(factor), Scaled(rule, Geometric(1e6))).frequencies(head_dim // 2)
    assert found == pytest.approx(frequencies, rel=FLOAT32)
    assert norm == 1.0


def test_a_rule_by_length_acts_wherever_it_stands() -> None:
    dynamic = Scaled(DynamicNtk(2.0, 64), Geometric(1e4))
    settled = Scaled(Ntk(3.0), Geometric(1e4))
    assert dynamic.at(128) == settled
    assert Tiled(dynamic, 2).at(128) == Tiled(settled, 2)
    assert Scaled(Linear(2.0), dynamic).at(128) == Scaled(Linear(2.0), settled)
    assert Rotation(Half(8), dynamic, Steps()).at(128) == Rotation(Half(8), settled, Steps())
    assert dynamic.at(64).canonical() == Geometric(1e4)
    assert settled.at(7) == settled


def test_yarn_is_by_parts_at_its_corners() -> None:
    by_turns, by_index = ours(Yarn(4.0, 4096), 10000.0, 64), ours(ByParts(4.0, 10.0, 23.0), 10000.0, 64)
    assert by_turns == pytest.approx(by_index, rel=1e-15)


@pytest.mark.parametrize(
    ("base", "head_dim", "factor", "original", "options"),
    [
        (10000.0, 128, 16.0, 4096, {}),
        (10000.0, 64, 40.0, 4096, {"beta_fast": 32.0, "beta_slow": 1.0}),
        (1000000.0, 128, 4.0, 32768, {}),
        (150000.0, 64, 32.0, 4096, {"truncate": False}),
        (10000.0, 16, 4.0, 64, {}),
        (10000.0, 16, 4.0, 8, {}),
        (10000.0, 16, 4.0, 4, {}),
        (500000.0, 12, 2.0, 100000000, {"beta_fast": 8.0, "beta_slow": 2.0}),
    ],
)
def test_yarn(base: float, head_dim: int, factor: float, original: int, options: dict[str, Any]) -> None:
    frequencies, norm = of_transformers(
        "yarn", base, head_dim, factor=factor, original_max_position_embeddings=original, **options
    )
    assert ours(Yarn(factor, original, **options), base, head_dim) == pytest.approx(frequencies, rel=FLOAT32)
    assert yarn_norm_factor(factor) == pytest.approx(norm, rel=1e-12)


def test_yarn_norm_factor_of_deepseek_is_a_quotient() -> None:
    _, norm = of_transformers(
        "yarn",
        10000.0,
        64,
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=0.707,
        mscale_all_dim=1.0,
    )
    assert yarn_norm_factor(40.0, 0.707) / yarn_norm_factor(40.0) == pytest.approx(norm, rel=1e-12)
    assert yarn_norm_factor(0.5) == 1.0


def test_yarn_is_the_same_over_a_spectrum_that_starts_elsewhere() -> None:
    # Twice the frequencies over half the context make the same turns.
    doubled = Scaled(Yarn(4.0, 1024), Scaled(Linear(0.5), Geometric(10000.0))).frequencies(32)
    plain = Scaled(Yarn(4.0, 2048), Geometric(10000.0)).frequencies(32)
    assert doubled == pytest.approx([2 * theta for theta in plain], rel=1e-12)


@pytest.mark.parametrize(("base", "count"), [(10000.0, 1), (1.0, 4), (0.5, 4)])
def test_yarn_refuses_frequencies_that_do_not_fall(base: float, count: int) -> None:
    with pytest.raises(EncodingError, match="two or more frequencies that fall"):
        Scaled(Yarn(4.0, 4096), Geometric(base)).frequencies(count)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (2.0, 0.5, 16.0, 64)],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3(factor: float, low: float, high: float, original: int, head_dim: int) -> None:
    frequencies, norm = of_transformers(
        "llama3",
        500000.0,
        head_dim,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    assert ours(Llama3(factor, low, high, original), 500000.0, head_dim) == pytest.approx(
        frequencies, rel=FLOAT32
    )
    assert norm == 1.0


IDENTITIES = (
    *(Linear(1.0), Ntk(1.0), Yarn(1.0, 4096), Llama3(1.0, 1.0, 4.0, 8192)),
    *(ByParts(1.0, 1.0, 5.0), DynamicNtk(2.0, 4096).at(4096), PerPlane((1.0,) * 32)),
)


@pytest.mark.parametrize("rule", IDENTITIES)
def test_factor_one_changes_nothing(rule: Rule) -> None:
    plain = Geometric(10000.0)
    assert Scaled(rule, plain).frequencies(32) == pytest.approx(plain.frequencies(32), rel=1e-15)
    assert Scaled(rule, plain).canonical() == plain


def test_equal_rules_multiply_and_different_rules_stay() -> None:
    plain = Geometric(10000.0)
    assert Scaled(Linear(2.0), Scaled(Linear(4.0), plain)).canonical() == Scaled(Linear(8.0), plain)
    assert Scaled(Ntk(2.0), Scaled(Ntk(4.0), plain)).canonical() == Scaled(Ntk(8.0), plain)
    assert Scaled(Linear(2.0), Scaled(Linear(0.5), plain)).canonical() == plain
    assert Scaled(Proportional(3), Scaled(Proportional(2), plain)).canonical() == Scaled(
        Proportional(2), plain
    )
    both = Scaled(PerPlane((2.0, 3.0)), Scaled(PerPlane((1.5, 4.0)), plain))
    assert both.canonical() == Scaled(PerPlane((3.0, 12.0)), plain)
    mixed = Scaled(Linear(2.0), Scaled(Ntk(4.0), plain))
    assert mixed.canonical() == mixed


def test_ntk_keeps_the_first_frequency_and_divides_the_last() -> None:
    plain, changed = Geometric(10000.0).frequencies(32), ours(Ntk(8.0), 10000.0, 64)
    assert changed[0] == plain[0] == 1.0
    assert changed[-1] == pytest.approx(plain[-1] / 8.0, rel=1e-14)
    base = 10000.0 * 8.0 ** (64 / 62)
    assert changed == pytest.approx([base ** (-2 * j / 64) for j in range(32)], rel=1e-13)
    assert math.isclose(ours(Ntk(8.0), 10000.0, 2)[0], 1.0)
