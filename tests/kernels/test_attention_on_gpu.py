"""Attention kernels on a GPU: tiles of the default configurations, all kinds of numbers, long sequences."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, HEADS, Case, compare, kernels_only
from kernel_cases import DEVICE

pytest.importorskip("triton")

from grape_compile.encoding import Encoding, alibi, fox
from grape_compile.operators import attend, reference_attend
from grape_compile.operators.samples import tensor, unit_roundoff


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(
    "name", ["none", "alibi", "slopes_window", "fox", "phase", "gated", "gated_clock", "absolute"]
)
def test_on_hardware(name: str, head: int, dtype: torch.dtype) -> None:
    """Tiles of the default configurations, ragged ends, all kinds of numbers."""
    case = CASES[name]
    options = {key: 300 if key == "window" else value for key, value in case.options.items()}
    compare(Case(case.encoding, options, 700, 900, 1, head, head, dtype, batch=2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("encoding", [alibi(HEADS), fox()], ids=["alibi", "fox"])
def test_long_sequences_on_hardware(encoding: Encoding) -> None:
    """The last 64 of 65536 queries, against the definition over all keys."""
    length = 65536
    query, key, value = (
        tensor(1, HEADS, length, 64, seed=seed, dtype=torch.bfloat16).to(DEVICE) for seed in range(3)
    )
    slots = {
        name: -0.01 * tensor(1, HEADS, length, seed=5).abs().float().to(DEVICE) for name in encoding.slots
    }
    with kernels_only():
        found = attend(query, key, value, encoding, slots, is_causal=True)[:, :, -64:]
    wide = {name: slot.double() for name, slot in slots.items()}
    wanted = reference_attend(
        query[:, :, -64:].double(), key.double(), value.double(), encoding, wide, is_causal=True
    )
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= 8 * unit_roundoff(torch.bfloat16)
