"""The GPU benchmark turns what it says it turns; how fast is a matter for a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import DEVICE, kernels_first

from benchmarks import gpu
from benchmarks.gpu_rotation import ROWS, Layer, Row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_ways_of_a_row_agree(row: Row) -> None:
    layer = Layer(row.small(), DEVICE)
    with kernels_first():
        errors = layer.errors({"ours": layer.ours, "eager": layer.written})
        ours = layer.step(layer.ours)
    # Tables of bfloat16 are off by 2^-9, and so is every product with them; ours is rounded once.
    assert errors["ours"] <= 2**-7
    assert errors["eager"] <= 2**-5
    for found, wanted in zip(ours, layer.step(layer.written), strict=True):
        largest = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1 * largest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "rotation", "--out", "/nowhere"])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 2
    assert "need a CUDA device" in capsys.readouterr().err
