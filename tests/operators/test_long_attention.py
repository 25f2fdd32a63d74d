"""Long sequences: blocks merged as one softmax, what is left out as it weighs nothing, digits of what is far away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_errors import NARROW, gradients, largest_difference, leaves
from torch import Tensor

from grape_compile.encoding import (
    Bias,
    Compose,
    Constant,
    Encoding,
    Gate,
    Identity,
    Learned,
    LogSigmoid,
    NegativeExp,
    PathBias,
    Steps,
    alibi,
    fox,
    grape_ap,
)
from grape_compile.operators import attend, reference_attend
from grape_compile.operators.blocks import BLOCK
from grape_compile.operators.samples import tensor


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_blocks_are_merged_as_one_softmax(masked: bool) -> None:
    """More than two blocks, and a head whose far past is skipped: a steep slope beside a flat one."""
    length, encoding = 2 * BLOCK + 40, Bias(Learned("slopes"), Steps())
    query, key, value = leaves(*(tensor(1, 2, length, 4, seed=seed) for seed in range(3)))
    slots = {"slopes": torch.tensor([4.0, 0.01], dtype=torch.float64)}
    mask = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -1e38)
    results = [
        function(query, key, value, encoding, slots, mask=mask if masked else None, is_causal=not masked)
        for function in (attend, reference_attend)
    ]
    assert largest_difference(*results) < 1e-12
    for found, wanted in zip(*(gradients([result], [query, key, value]) for result in results), strict=True):
        assert largest_difference(found, wanted) < 1e-11


def long_slots(length: int, steep: float) -> dict[str, Tensor]:
    """Slots of two heads, the first of which forgets fast: its far past is left out."""
    heads = torch.tensor([steep, 0.01], dtype=torch.float64)
    spread = tensor(1, 2, length, seed=5).abs()
    return {
        "slopes": heads,
        "log_forget": -heads[:, None] * spread,
        "gate_query": spread,
        "gate_key": tensor(1, 2, length, seed=6).abs(),
        "path_query": tensor(1, 2, length, 4, seed=7),
        "path_key": tensor(1, 2, length, 4, seed=8),
    }


LONG: dict[str, Encoding] = {
    "slopes": Bias(Learned("slopes"), Steps()),
    "fox": fox(),
    "gated": Bias(Learned("slopes"), Steps(), Gate("gate_query", "gate_key")),
    "gated_query": Bias(Learned("slopes"), Steps(), Gate("gate_query")),
    "path": PathBias(LogSigmoid(), Learned("slopes"), 4),
    "path_up": PathBias(Identity(), Learned("slopes"), 4),
    "path_and_fox": Compose((PathBias(LogSigmoid(), Learned("slopes"), 4), fox())),
}


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("steep", [4.0, -4.0], ids=["falling", "rising"])
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_leave_out_nothing_that_counts(name: str, steep: float, masked: bool) -> None:
    """Several blocks and steps; keys whose weights underflow are left out, and no others, whatever the signs."""
    length, encoding = 1100, LONG[name]
    query, key, value = leaves(*(3 * tensor(1, 2, length, 4, seed=seed) for seed in range(3)))
    filled = long_slots(length, steep)
    slots = dict(zip(encoding.slots, leaves(*(filled[slot] for slot in encoding.slots)), strict=True))
    mask = (torch.arange(length) != 700).expand(1, 1, 1, length) if masked else None
    results = [
        function(query, key, value, encoding, slots, mask=mask, is_causal=True)
        for function in (attend, reference_attend)
    ]
    assert largest_difference(*results) < 1e-11
    pairs = zip(
        *(gradients([result], [query, key, value, *slots.values()]) for result in results), strict=True
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_error_of_a_bias_written_relative() -> None:
    """No worse than slope * (j - t) written out; a bias centred once has several times that error."""
    query, key, value = (tensor(1, 8, 600, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    exact = reference_attend(query.double(), key.double(), value.double(), alibi(8), is_causal=True)
    ours = attend(query, key, value, alibi(8), is_causal=True)
    written = reference_attend(query, key, value, alibi(8), is_causal=True)
    errors = [float((found.double() - exact).square().mean().sqrt()) for found in (ours, written)]
    assert errors[0] <= 1.5 * errors[1]


def test_gradients_of_a_steep_link() -> None:
    """-exp multiplies the gradient of a far edge, which is next to nothing, by thousands: its digits must be right."""
    length, heads = 40, 2
    encoding = PathBias(NegativeExp(), Constant((0.4, 0.1)), 4)
    path = 3.0 * tensor(1, heads, length, 4, seed=1)
    cotangent = tensor(1, heads, length, 8, seed=2)
    parts = [tensor(1, heads, length, 8, seed=seed) for seed in (3, 4, 5)]

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        leaf = path.to(dtype).requires_grad_()
        query, key, value = (part.to(dtype) for part in parts)
        result = function(query, key, value, encoding, dict.fromkeys(encoding.slots, leaf), is_causal=True)
        (found,) = torch.autograd.grad(result, leaf, cotangent.to(dtype))
        return found.double()

    exact = gradient(reference_attend, torch.float64)
    ours, dense = (
        float((gradient(function, torch.float32) - exact).norm()) for function in (attend, reference_attend)
    )
    assert ours <= 1.25 * dense + 1e-7 * float(exact.norm())


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_along_a_path(dtype: torch.dtype) -> None:
    """They are as those of the definition, whose weights and their sums are rounded together."""
    length, heads = 200, 2
    encoding = grape_ap(heads, dim=4)
    parts = [tensor(1, heads, length, size, seed=seed) for seed, size in enumerate((8, 8, 8, 4))]
    cotangent = tensor(1, heads, length, 8, seed=7)

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        query, key, value, path = (part.to(dtype) for part in parts)
        path.requires_grad_()
        result = function(query, key, value, encoding, dict.fromkeys(encoding.slots, path), is_causal=True)
        (found,) = torch.autograd.grad(result, path, cotangent.to(dtype))
        return found.double()

    parts = [part.to(dtype).double() for part in parts]
    exact = gradient(reference_attend, torch.float64)
    ours, dense = (float((gradient(each, dtype) - exact).norm()) for each in (attend, reference_attend))
    assert ours <= 2.0 * dense + 1e-7 * float(exact.norm())
