"""`grape-compile tune --kernels`, with the tuner itself replaced."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from grape_compile import tuning
from grape_compile.cli import main
from grape_compile.encoding import rope
from grape_compile.tuning import KernelReport, Shape


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["grape-compile", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    def tune_kernels(shapes: Any, encodings: Any, **options: Any) -> KernelReport:
        seen.append((shapes, encodings, options))
        return KernelReport((), Path("records.json"))

    monkeypatch.setattr(tuning, "tune_kernels", tune_kernels)
    return seen


def test_a_layer_is_tuned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[tuple[Any, ...]]
) -> None:
    layer = "--batch 2 --tokens 512 --heads 8 --key-heads 2 --head-dim 64 --dtype float16"
    words = [
        "tune",
        "--kernels",
        *layer.split(),
        "--fresh",
        "--encoding",
        str(rope(64)),
        "--records",
        "r.json",
    ]
    assert command(monkeypatch, *words) == 0
    assert calls == [
        ([Shape(2, 512, 8, 2, 64, torch.float16)], [rope(64)], {"records": "r.json", "fresh": True})
    ]
    assert "records: records.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tune"], "--kernels"),
        (["tune", "--kernels", "--dtype", "int8"], "bfloat16"),
        (["tune", "--kernels", "--encoding", "circles"], "circles"),
    ],
)
def test_mistakes_are_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calls: list[tuple[Any, ...]],
    words: list[str],
    sentence: str,
) -> None:
    assert command(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
    assert not calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "tune", "--kernels") == 2
    assert "no CUDA device" in capsys.readouterr().err
