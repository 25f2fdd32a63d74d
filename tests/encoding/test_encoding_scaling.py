"""The scaling rules against the initialisers of transformers, for configurations that models ship with."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grape_compile.encoding import (
    Geometric,
    Linear,
    Llama3,
    Ntk,
    Rule,
    Scaled,
    Yarn,
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


@pytest.mark.parametrize("seq_len", [1024, 4096, 10000])
def test_ntk_is_the_dynamic_rule_at_one_length(seq_len: int) -> None:
    frequencies, _ = of_transformers("dynamic", 10000.0, 64, seq_len=seq_len, factor=2.0)
    stretch = 2.0 * max(seq_len, 2048) / 2048 - 1.0
    assert ours(Ntk(stretch), 10000.0, 64) == pytest.approx(frequencies, rel=FLOAT32)


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


@pytest.mark.parametrize("rule", [Linear(1.0), Ntk(1.0), Yarn(1.0, 4096), Llama3(1.0, 1.0, 4.0, 8192)])
def test_factor_one_changes_nothing(rule: Rule) -> None:
    plain = Geometric(10000.0)
    assert Scaled(rule, plain).frequencies(32) == pytest.approx(plain.frequencies(32), rel=1e-15)
    assert Scaled(rule, plain).canonical() == plain


def test_equal_rules_multiply_and_different_rules_stay() -> None:
    plain = Geometric(10000.0)
    assert Scaled(Linear(2.0), Scaled(Linear(4.0), plain)).canonical() == Scaled(Linear(8.0), plain)
    assert Scaled(Ntk(2.0), Scaled(Ntk(4.0), plain)).canonical() == Scaled(Ntk(8.0), plain)
    assert Scaled(Linear(2.0), Scaled(Linear(0.5), plain)).canonical() == plain
    mixed = Scaled(Linear(2.0), Scaled(Ntk(4.0), plain))
    assert mixed.canonical() == mixed


def test_ntk_keeps_the_first_frequency_and_divides_the_last() -> None:
    plain, changed = Geometric(10000.0).frequencies(32), ours(Ntk(8.0), 10000.0, 64)
    assert changed[0] == plain[0] == 1.0
    assert changed[-1] == pytest.approx(plain[-1] / 8.0, rel=1e-14)
    base = 10000.0 * 8.0 ** (64 / 62)
    assert changed == pytest.approx([base ** (-2 * j / 64) for j in range(32)], rel=1e-13)
    assert math.isclose(ours(Ntk(8.0), 10000.0, 2)[0], 1.0)
