"""What cannot be exported: one message a person can act on, and nothing half written."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grape_compile.errors import CaptureError, GrapeError, ModelError
from grape_compile.export.onnx import export, exporter, files, runtime


class _Line(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class _Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.special.bessel_j0(x)
        return result


X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "arguments", "error", "told"),
    [
        (_Line(), {"target": "coreml"}, GrapeError, "target='standard' or target='ort'"),
        (3, {}, ModelError, "a int"),
        (_Line(), {"kv_cache": True}, ModelError, "a causal language model of transformers"),
        (_Line(), {"kv_cache": "static"}, GrapeError, "False, True or 'shared'"),
        (_Line(torch.bfloat16), {}, GrapeError, "no bfloat16"),
        (_Unknown(), {}, CaptureError, "bessel_j0"),
        (_Line(), {"providers": ["CUDAExecutionProvider"]}, GrapeError, "CUDAExecutionProvider"),
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(
    model: Any, arguments: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
) -> None:
    given = X.bfloat16() if isinstance(model, _Line) and model.inner.weight.dtype == torch.bfloat16 else X
    with pytest.raises(error, match=told):
        export(model, (given,), path=tmp_path / "model.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"test_bad_exports\.py:\d+"):
        export(_Unknown(), (X,), path=tmp_path / "model.onnx")


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "model.onnx", tmp_path):
        with pytest.raises(GrapeError, match="a path in a folder that exists"):
            export(_Line(), (X,), path=path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are changed behind the exporter's back: verification has to see it, and the old file has to stay."""
    place = tmp_path / "model.onnx"
    place.write_text("an older file")
    genuine = files.write

    def spoiled(model: Any, path: Path, above: int | None) -> Path | None:
        for value in model.graph.initializers.values():
            if value.const_value.dtype.is_floating_point():
                value.const_value = type(value.const_value)(value.const_value.raw * 1.00001, name=value.name)
        return genuine(model, path, above)

    monkeypatch.setattr(exporter, "write", spoiled)
    with pytest.raises(GrapeError, match="relative error"):
        export(_Line(), (X,), path=place)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert place.read_text() == "an older file"


def test_weights_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = nn.Sequential(nn.Linear(64, 64))
    given = torch.randn(2, 64)
    report = export(big, (given,), path=tmp_path / "model.onnx", external_data_above=1000)
    assert report.external_data == tmp_path / "model.onnx.data"
    assert report.external_data.stat().st_size >= 64 * 64 * 4 > (tmp_path / "model.onnx").stat().st_size
    assert len(report.comparisons) == 3
    monkeypatch.setattr(files, "LIMIT", 1000)
    with pytest.raises(GrapeError, match="weights in a file of their own"):
        export(big, (given,), path=tmp_path / "other.onnx", external_data_above=None)
    assert not (tmp_path / "other.onnx").exists()


def test_two_packages_of_onnxruntime_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(GrapeError, match="both installed"):
        runtime.runtime()
