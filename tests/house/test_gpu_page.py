"""The page of GPU measurements says what the files say, and that there are none where there are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_page
from benchmarks.gpu_decoding import DENSE, FLOOR, OURS, PREFILL, ROWS, Layer, result
from benchmarks.gpu_timing import Timed
from grape_compile.operators import attend

ROOT = Path(__file__).parents[2]
ABOUT = {"gpu": {"name": "a GPU", "torch": "2", "triton": "3"}, "date": "2026-01-01", "quick": False}


def decoded(microseconds: float, **changed: Any) -> dict[str, Any]:
    row = replace(ROWS[0], **changed)
    times = {name: Timed(microseconds, (microseconds, microseconds), 0) for name in (OURS, PREFILL, FLOOR)}
    return result(row, times, 1000.0, {})


def made(folder: Path, case: str, rows: list[dict[str, Any]], **changed: Any) -> None:
    (folder / f"gpu_{case}.json").write_text(json.dumps({"case": case, **ABOUT, **changed, "rows": rows}))


def page_of(folder: Path) -> str:
    gpu_page.main(["--results", str(folder), "--page", str(folder / "gpu.md")])
    return (folder / "gpu.md").read_text()


def test_without_measurements_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.count("No measurements yet") == len(gpu_page.CASES)
    assert "figures" not in page
    assert not (tmp_path / "figures").exists()


def test_a_quick_run_is_no_measurement(tmp_path: Path) -> None:
    made(tmp_path, "decoding", [decoded(10.0)], quick=True)
    assert page_of(tmp_path).count("No measurements yet") == len(gpu_page.CASES)


def test_what_was_measured_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [decoded(5.0), decoded(300.0, keys=32768), decoded(150.0, keys=32768)]
    turned = {
        "name": "llama, forward",
        "told": "80 us",
        "holds": True,
        "shape": [4, 32, 8, 4096, 128],
        "bytes": 335544320,
        "copy_gb_s": 4300.0,
        "ways": {"ours": {"us": 80.0}},
    }
    made(tmp_path, "decoding", rows)
    made(tmp_path, "rotation", [turned])
    page = page_of(tmp_path)
    assert page.count("No measurements yet") == 1
    assert "a GPU, torch 2, Triton 3, 2026-01-01" in page
    # 134 MB at 1000 GB/s are 134 us.
    assert [line.rsplit("|", 2)[1].strip() for line in page.splitlines() if line.startswith("| none")] == [
        "",
        "does not hold",
        "holds",
    ]
    for name in ("roofline", "scaling"):
        assert f"figures/gpu_{name}.png" in page
        assert (tmp_path / "figures" / f"gpu_{name}.png").stat().st_size > 1000
    # Three operations for each of 671 million coordinates, of two bytes read and two written.
    assert gpu_page.points("rotation", {"rows": [turned]}) == [pytest.approx((0.75, 3.146), rel=1e-3)]


def test_the_page_in_the_repository_is_made_of_its_results(tmp_path: Path) -> None:
    found = {case: gpu_page.read(ROOT / "benchmarks/results" / f"gpu_{case}.json") for case in gpu_page.CASES}
    figures = [name for name in ("roofline", "scaling") if (ROOT / f"docs/figures/gpu_{name}.png").exists()]
    assert (ROOT / "docs/gpu.md").read_text() == gpu_page.text(found, figures)


@pytest.mark.parametrize("bias", ["none", "alibi", "fox", "gated", "path"])
def test_ways_to_decode_agree(bias: str) -> None:
    row = next(row for row in ROWS if row.bias == bias).small()
    layer = Layer(row, "cpu")
    errors = layer.errors()
    assert set(errors) == {OURS, PREFILL, *((FLOOR,) if bias == "none" else (DENSE,))}
    assert all(error < 2**-6 for error in errors.values())
    assert torch.equal(layer.ours(), attend(layer.query, layer.key, layer.value, row.encoding, layer.slots))
