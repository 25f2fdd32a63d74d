"""Path kernels on a GPU: tiles of the default configurations, all kinds of numbers, long sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE
from path_cases import AP, BOTH, CASES, SLOW, compare, kernels_only

pytest.importorskip("triton")

from grape_compile.operators import attend, reference_attend
from grape_compile.operators.samples import tensor, unit_roundoff

EVERY = {**CASES, **SLOW}


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("name", ["ap", "bounded", "identity_window", "mask_of_keys", "groups"])
def test_on_hardware(name: str, head: int, dtype: torch.dtype) -> None:
    """Tiles of the default configurations, ragged ends, all kinds of numbers."""
    case = EVERY[name]
    options = {key: 300 if key == "window" else value for key, value in case.options.items()}
    compare(
        replace(case, options=options, queries=700, keys=900, head=head, values=head, dtype=dtype, edge=0.5)
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("encoding", [AP, BOTH], ids=["keys", "both"])
@pytest.mark.parametrize("slopes", [(0.5, 0.01), (0.0, 0.1)], ids=str)
def test_long_sequences_on_hardware(encoding: object, slopes: tuple[float, float]) -> None:
    """The last 64 of 65536 queries, whose walks end early or do not, against the definition over all keys."""
    length = 65536
    bias = AP if encoding is AP else BOTH
    query, key, value = (
        tensor(1, 2, length, 64, seed=seed, dtype=torch.bfloat16).to(DEVICE) for seed in range(3)
    )
    slots = {
        "slopes": torch.tensor(slopes).to(DEVICE),
        "path_query": tensor(1, 2, length, bias.dim, seed=5).float().to(DEVICE),
        "path_key": tensor(1, 2, length, bias.dim, seed=6).float().to(DEVICE),
    }
    with kernels_only():
        found = attend(query, key, value, bias, slots, is_causal=True)[:, :, -64:]
    wide = {name: slot.double() for name, slot in slots.items()}
    wide["path_query"] = wide["path_query"][:, :, -64:]
    wanted = reference_attend(
        query[:, :, -64:].double(), key.double(), value.double(), bias, wide, is_causal=True
    )
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= 8 * unit_roundoff(torch.bfloat16)
