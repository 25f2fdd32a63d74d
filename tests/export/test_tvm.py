"""Libraries by TVM: built, verified, saved, loaded and called; other targets, and what is told of a mistake."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tvm_models import Turned, turned

pytest.importorskip("tvm")

from grape_compile import cli
from grape_compile.encoding import parse
from grape_compile.errors import CaptureError, EngineError, GrapeError, ModelError, OperandError
from grape_compile.export.tvm import Artifact, build, load
from grape_compile.export.tvm.about import about_of
from grape_compile.export.tvm.operators import Operators


@pytest.fixture(scope="module")
def small() -> Artifact:
    model, args = turned()
    return build(model, args, target="llvm")


@pytest.fixture
def saved(small: Artifact, tmp_path: Path) -> Path:
    return small.save(tmp_path / "model.so")


# -- files -------------------------------------------------------------------------------------------------


def test_a_saved_library_computes_the_same(small: Artifact, saved: Path) -> None:
    x = torch.randn(3, 11, 8).numpy()
    assert sorted(each.name for each in saved.parent.iterdir()) == [
        "model.so",
        "model.so.json",
        "model.so.params",
    ]
    again = load(saved)
    assert again.about == small.about
    np.testing.assert_array_equal(again.run(x)["output"], small.run(x=x)["output"])
    with pytest.raises(GrapeError, match="copies of its three files"):
        again.save(saved.with_name("other.so"))


def test_weights_are_not_in_the_code(saved: Path) -> None:
    weight = turned()[0].layer.weight.detach().numpy()
    assert weight[0].tobytes() not in saved.read_bytes()
    assert weight[0].tobytes() in saved.with_name("model.so.params").read_bytes()


def test_a_description_reads_back(small: Artifact) -> None:
    about, files = about_of(small.about.to_json(sha256="x"), "read")
    assert (about, files) == (small.about, {"sha256": "x"})
    assert about.encodings[0].startswith("rotation(half(8)")
    assert [str(parse(text)) for text in about.encodings] == list(about.encodings)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.unlink(), "no file"),
        (lambda path: path.with_name("model.so.params").unlink(), "no file"),
        (lambda path: path.with_name("model.so.params").write_bytes(b"short"), "the whole file"),
        (lambda path: path.with_name("model.so.json").write_text("{"), "does not read"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "describes another library"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(saved: Path, spoil: Any, told: str) -> None:
    spoil(saved)
    with pytest.raises(GrapeError, match=told):
        load(saved)


def test_another_release_is_refused(saved: Path) -> None:
    text = saved.with_name("model.so.json")
    content = json.loads(text.read_text())
    content["versions"]["tvm"] = "0.1"
    text.write_text(json.dumps(content))
    with pytest.raises(EngineError, match="apache-tvm=="):
        load(saved)


@pytest.mark.parametrize("path", ["folder/model.so", "model.onnx"])
def test_a_path_that_cannot_be_written_leaves_nothing(small: Artifact, tmp_path: Path, path: str) -> None:
    with pytest.raises(GrapeError, match="write"):
        small.save(tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_a_linker_that_fails_leaves_nothing(
    small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EngineError, match=r"apt install g\+\+"):
        small.save(tmp_path / "model.so")
    assert not list(tmp_path.iterdir())


# -- calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((np.zeros((1, 2, 8), np.float64),), {}),
        ((np.zeros((1, 2, 7), np.float32),), {}),
        ((np.zeros((2, 8), np.float32),), {}),
        ((np.zeros((1, 2, 8), np.float32),), {"input": 1}),
        ((), {"y": 1}),
    ],
)
def test_a_wrong_argument_is_told_what_would_fit(small: Artifact, args: Any, kwargs: Any) -> None:
    with pytest.raises(OperandError, match=r"x float32\[batch, any, 8\]"):
        small.run(*args, **kwargs)


class _Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.rows = nn.Buffer(torch.arange(20.0).view(5, 4))

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = places.clamp(min=0)[..., None].expand(-1, -1, 4)
        return (
            self.table(places.clamp(min=0)),
            self.rows[places],
            self.rows.expand(places.shape[0], -1, -1).gather(1, wide),
        )


def test_places_past_the_end_of_a_table_read_its_last_row() -> None:
    places = torch.tensor([[0, 4, -1], [1, 2, -5]])
    artifact = build(_Looked(), (places,), target="llvm")
    table, rows, gathered = artifact.run(np.array([[10**9, 3, -1]])).values()
    last, *_ = artifact.run(np.array([[4, 4]])).values()
    np.testing.assert_array_equal(table[0, 0], last[0, 0])
    assert (rows[0, :, 0] == [16, 12, 16]).all()
    assert (gathered[0, :, 0] == [16, 12, 0]).all()


class _Sliced(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        changed = torch.diff(x, prepend=x[:, :1] - 1, dim=-1) > 0
        hidden = torch.where(changed, 0.0, torch.full_like(x, float("-inf")))
        ends = (x[:, -3:], x[:, -4:-1], x[:, 1::2], x[:, 5:2], x[:1, -1])
        return (changed.cumsum(-1), hidden, x.pow(3), *ends)


def test_slices_end_where_torch_says() -> None:
    artifact = build(_Sliced(), (torch.randn(2, 6),), target="llvm", verify=False)
    for size in (4, 6, 50):
        x = torch.randn(3, size)
        for found, wanted in zip(artifact.run(x.numpy()).values(), _Sliced()(x), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "told"),
    [
        (3, {}, ModelError, "an int|a int"),
        (nn.Linear(8, 8).bfloat16(), {"dtype": None}, GrapeError, "bfloat16"),
        (Turned(), {"target": "nvidia/nvidia-h10"}, EngineError, "nvidia/nvidia-h100"),
        (Turned(), {"kv_cache": True}, ModelError, "a causal language model"),
    ],
)
def test_a_mistake_is_told(model: Any, arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    x = torch.zeros(2, 6, 8, dtype=torch.bfloat16 if isinstance(model, nn.Linear) else torch.float32)
    with pytest.raises(error, match=told):
        build(model, (x,), **{"target": "llvm", **arguments})


def test_code_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unturned(self: Operators, node: Any, importer: Any) -> Any:
        return [importer.env[tensor] for tensor in node.args[0]]

    monkeypatch.setattr(Operators, "_rotate", unturned)
    model, args = turned()
    with pytest.raises(GrapeError, match="a library that computes what Turned computes"):
        build(model, args, target="llvm")


# -- other ways and targets --------------------------------------------------------------------------------


class _Scattered(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return (x * 0.5).scatter_add(1, index, x)


def test_an_operator_that_is_missing_takes_the_way_by_onnx() -> None:
    args = (torch.randn(2, 6, 8), torch.randint(0, 4, (2, 6, 8)))
    artifact = build(_Scattered(), args, target="llvm", dynamic_shapes=None)
    assert artifact.about.comparisons
    assert any("scatter_add" in note and "ONNX" in note for note in artifact.about.notes)


class _Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.special.bessel_j0(x)
        return result


def test_an_operator_that_nothing_has_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"bessel_j0.default \(.*test_tvm\.py:\d+"):
        build(_Unknown(), (torch.randn(2, 3),), target="llvm")


def test_another_processor_takes_objects(tmp_path: Path) -> None:
    model, args = turned()
    artifact = build(model, args, target="raspberry-pi/4b-aarch64")
    assert artifact.about.notes == ("not verified: the target is aarch64, this machine is x86_64",)
    with pytest.raises(EngineError, match=r"g\+\+ -shared"):
        artifact.save(tmp_path / "model.so")
    with pytest.raises(GrapeError, match="aarch64"):
        artifact.run(args[0])
    artifact.save(tmp_path / "model.tar")
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == ["model.so.json", "model.so.params", "model.tar"]
    with tarfile.open(tmp_path / "model.tar") as objects:
        for each in objects.getmembers():
            file = objects.extractfile(each)
            assert file is not None
            head = file.read(20)
            assert head[:4] == b"\x7fELF"
            assert int.from_bytes(head[18:20], "little") == 183  # EM_AARCH64


def test_a_gpu_that_is_not_there_still_gives_its_source() -> None:
    model, args = turned()
    artifact = build(model, args, target="nvidia/nvidia-h100")
    assert "__global__" in artifact.source
    if not torch.cuda.is_available():
        assert "no cuda device" in artifact.report


# -- the command line --------------------------------------------------------------------------------------


def test_the_command_line_writes_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.so"
    arguments = ["export", "tvm", "tvm_models:turned", "--target", "llvm", "-o", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", ["grape-compile", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["model"] == "Turned"
    assert "compile ..." in told.err
    assert load(out).run(turned()[1][0])["output"].shape == (2, 6, 8)


# -- records -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_tuned_is_built(tmp_path: Path) -> None:
    from grape_compile.tuning import tune

    model, args = turned()
    tune(model, args, target="llvm", trials=2, records=tmp_path)
    artifact = build(model, args, target="llvm", records=tmp_path)
    for operator in ("rotate rotation(half(8)", "linear"):
        assert any(note.startswith(f"tuned: {operator}") for note in artifact.about.notes)
    file = next(tmp_path.iterdir())
    file.write_text(file.read_text(encoding="utf-8").replace("half", "hall"), encoding="utf-8")
    plain = build(model, args, target="llvm", records=tmp_path)
    assert any("checksum" in note for note in plain.about.notes)
    assert not any(note.startswith("tuned: rotate") for note in plain.about.notes)
