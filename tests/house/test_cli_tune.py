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
        (["tune", "model.pt2", "--kernels", "--target", "llvm"], "--kernels and --target"),
        (["tune", "model.pt2", "--target", "llvm"], "--records DIR"),
        (["tune", "--target", "llvm", "--records", "r"], "MODEL, or --encoding"),
        (["tune", "model.pt2", "--target", "llvm", "--records", "r"], "no such file"),
        (["tune", "--merge", "nowhere", "-o", "out"], "no tuning records"),
        (["tune", "--merge", "nowhere"], "no --out"),
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


def test_a_layer_is_tuned_for_a_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two draws of what would run are shown as one line each, and the report is what is printed."""
    pytest.importorskip("tvm")
    from grape_compile.records import Task
    from grape_compile.tuning import Progress, programs

    seen: list[Any] = []

    def tune(model: Any, args: Any, kwargs: Any, *, progress: Any, **options: Any) -> str:
        seen.append((model, args, kwargs, options))
        progress(Progress(Task("rotate", str(model), "", "float32"), 1, 8, 1e-05, 1.0, 70.0))
        return "what was found"

    monkeypatch.setattr(programs, "tune", tune)
    layer = "--tokens 512 --heads 8 --head-dim 64 --dtype float32"
    words = ["tune", "--target", "llvm", "--trials", "8", "--tracker", "host:9190", "--key", "pi"]
    words += [*layer.split(), "--encoding", str(rope(64)), "--records", str(tmp_path)]
    assert command(monkeypatch, *words) == 0
    options = {"target": "llvm", "trials": 8, "records": str(tmp_path), "tracker": "host:9190", "key": "pi"}
    assert seen == [(rope(64), (Shape(1, 512, 8, 8, 64, torch.float32),), {}, options)]
    told = capsys.readouterr()
    assert told.out == "what was found\n"
    assert "1 of 8 trials, best 10.0 us, 100 % of the time, 1:10 left" in told.err


def test_records_are_merged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from grape_compile.records import Log

    for name in ("a", "b"):
        Log(tmp_path / name).close()
    words = ["tune", "--merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "c")]
    assert command(monkeypatch, *words) == 0
    assert capsys.readouterr().out.startswith("0 trials and 0 winners in ")
