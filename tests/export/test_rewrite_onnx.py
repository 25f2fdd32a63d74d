"""ONNX files of others, rewritten: every site found, the same results, nothing else touched, nothing half written."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import BY_NAME, LAYERS, Architecture
from attention_layers import BiasedAttention, example
from bias_spellings import above_a_soft_cap
from cached_layers import CACHED, Cached
from finished_biases import BY_CUT, KEPT
from onnx_graphs import HEADS, NEAR_MISSES, TURNS, WIDTH, attention, biased
from torch import Tensor, nn
from torch.export import Dim

from grape_compile.cli import main
from grape_compile.errors import GrapeError
from grape_compile.export.onnx import OnnxReport, emit_tables, rewrite_onnx

LEAN = ("llama", "gptj", "bloom")
LONG = ("qwen2", "gpt_neox", "mpt", "cohere", "glm4", "gemma3", "phi3")


class _Logits(nn.Module):
    """A model as an exporter of old takes it: tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return logits


def _exported(row: Architecture, path: Path, opset: int, *, traced: bool = False) -> Path:
    """A model as a file of torch: by torch.export, or traced as it was before."""
    ids = torch.randint(3, 100, (2, 13))
    args, names = (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]
    options: dict[str, Any] = {"dynamic_axes": {name: {0: "batch", 1: "tokens"} for name in names}}
    if not traced:
        axes = {0: Dim("batch", max=64), 1: Dim("tokens", min=2, max=120)}
        options = {"dynamic_shapes": (axes, axes), "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(row.build()), args, path, dynamo=not traced, opset_version=opset,
            input_names=names, output_names=["logits"], **options,
        )  # fmt: skip
    return path


def _signature(path: Path) -> list[str]:
    graph = onnx.load(path).graph
    return [str(value) for value in (*graph.input, *graph.output)]


def _results(path: Path, feeds: dict[str, Any]) -> list[Any]:
    return list(onnxruntime.InferenceSession(str(path)).run(None, feeds))


def _holds(row: Architecture, source: Path, place: Path, report: OnnxReport) -> None:
    """Everything that was counted is found, was verified, and computes the same at sizes nobody verified."""
    kinds = Counter(site.kind for site in report.sites)
    assert (kinds["rotation"], kinds["bias"]) == (row.rotations, row.biases)
    assert not report.refusals
    assert len(report.comparisons) >= 5
    assert _signature(source) == _signature(place)
    ids = np.random.default_rng(5).integers(3, 100, (5, 23))
    mask = np.ones_like(ids)
    mask[1:4, :6] = 0
    feeds = {"input_ids": ids, "attention_mask": mask}
    (before,), (after,) = (_results(path, feeds) for path in (source, place))
    alive = mask.astype(bool)
    np.testing.assert_allclose(after[alive], before[alive], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*LEAN, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_a_file_of_torch_holds_every_site(name: str, tmp_path: Path) -> None:
    row = BY_NAME[name]
    source = _exported(row, tmp_path / "plain.onnx", 18)
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    _holds(row, source, tmp_path / "new.onnx", report)
    assert report.operators.get("RotaryEmbedding", 0) == row.rotations
    if row.biases:
        assert report.operators["Attention"] == LAYERS
        assert "Softmax" not in report.operators


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize("name", [*LEAN, "mpt", "cohere"])
def test_every_target_takes_a_file(name: str, target: str, tmp_path: Path) -> None:
    row = BY_NAME[name]
    source = _exported(row, tmp_path / "plain.onnx", 18)
    report = rewrite_onnx(source, tmp_path / "new.onnx", target=target)
    _holds(row, source, tmp_path / "new.onnx", report)
    domains = {each.domain for each in onnx.load(tmp_path / "new.onnx").opset_import}
    assert domains <= ({"", "com.microsoft"} if target == "ort" else {""})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LEAN, "mpt"])
def test_a_traced_file_of_an_older_opset(name: str, tmp_path: Path) -> None:
    row = BY_NAME[name]
    source = _exported(row, tmp_path / "plain.onnx", 14, traced=True)
    _holds(row, source, tmp_path / "new.onnx", rewrite_onnx(source, tmp_path / "new.onnx"))


@pytest.mark.slow
def test_a_file_whose_rotations_run_on_one_row_runs_on_three(tmp_path: Path) -> None:
    """Torch at opset 23 fuses a rotation whose tables ONNX Runtime does not broadcast."""
    source = _exported(BY_NAME["llama"], tmp_path / "plain.onnx", 23)
    feeds = {name: np.ones((3, 9), np.int64) for name in ("input_ids", "attention_mask")}
    with pytest.raises(Exception, match="cos_cache"):
        _results(source, feeds)
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    assert len(report.sites) == BY_NAME["llama"].rotations
    assert _results(tmp_path / "new.onnx", feeds)[0].shape[:2] == (3, 9)


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True])
def test_a_cache_between_calls(traced: bool, tmp_path: Path) -> None:
    """Names of sizes that depend on each other without saying so, a past of any length or none, token by token."""
    Cached().export(tmp_path / "plain.onnx", traced=traced)
    report = rewrite_onnx(tmp_path / "plain.onnx", tmp_path / "new.onnx")
    assert [str(site.encoding) for site in report.sites] == [CACHED] * 4
    told = " ".join(each.case for each in report.comparisons)
    assert "past 0" in told
    assert "tokens 1," in told
    assert _signature(tmp_path / "plain.onnx") == _signature(tmp_path / "new.onnx")


# -- graphs by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", TURNS)
def test_a_graph_by_hand(spelling: str, tmp_path: Path) -> None:
    source = attention(tmp_path / "hand.onnx", spelling)
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    expected = f'rotation({TURNS[spelling]}, geometric(100.0), positions("positions"))'
    assert [str(site.encoding) for site in report.sites] == [expected] * 2
    assert report.operators["RotaryEmbedding"] == 2
    assert report.operators.get("Cos") == 1, "the tables are made once for queries and keys"
    feeds = {
        "hidden": np.random.default_rng(1).standard_normal((3, 7, HEADS * WIDTH)).astype(np.float32),
        "positions": np.random.default_rng(2).integers(0, 500, (3, 7)),
    }
    (before,), (after,) = (_results(path, feeds) for path in (source, tmp_path / "new.onnx"))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelling", NEAR_MISSES)
def test_a_near_miss_is_left_as_it_is(spelling: str, tmp_path: Path) -> None:
    source = attention(tmp_path / "hand.onnx", spelling)
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    assert not report.sites
    assert len(report.refusals) >= 2
    values = {name for node in onnx.load(source).graph.node for name in node.output}
    assert all(each.node in values and each.reason for each in report.refusals)
    assert (tmp_path / "new.onnx").read_bytes() == source.read_bytes()
    assert report.notes == ("nothing was replaced: the file is a copy",)


def test_a_constant_table_of_biases_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    """An example of a few tokens shows a few entries; a longer call reads the others."""
    report = rewrite_onnx(biased(tmp_path / "linear.onnx", "linear"), tmp_path / "new.onnx")
    assert [str(site.encoding) for site in report.sites] == [
        "bias(constant((0.5, 0.25, 0.125, 0.0625)), steps)"
    ]
    assert report.operators["Attention"] == 1
    hidden = np.random.default_rng(1).standard_normal((2, 60, HEADS * WIDTH)).astype(np.float32)
    (before,), (after,) = (
        _results(tmp_path / name, {"hidden": hidden}) for name in ("linear.onnx", "new.onnx")
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    report = rewrite_onnx(biased(tmp_path / "hand.onnx", "saturating"), tmp_path / "same.onnx")
    assert not report.sites
    assert report.refusals


def test_a_file_that_counts_no_tokens_by_integers_has_no_past(tmp_path: Path) -> None:
    """An axis of activations alone is not tried without entries, which the operator does not take."""
    kept = BY_CUT["jina"].make().eval()
    source, given = tmp_path / "kept.onnx", torch.randn(2, 9, kept.qkv.in_features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            kept, (given,), source, dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: Dim("batch"), 1: Dim("tokens", max=KEPT)},),
        )  # fmt: skip
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    assert [site.kind for site in report.sites] == ["bias"]


def test_a_bias_above_a_soft_cap_is_written_with_it(tmp_path: Path) -> None:
    layer, given, source = BiasedAttention(above_a_soft_cap).eval(), example(), tmp_path / "plain.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (given,), source, dynamo=True, external_data=False, verbose=False)
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    assert [site.kind for site in report.sites] == ["bias"]
    (name,) = (each.name for each in onnx.load(source).graph.input)
    (before,), (after,) = (_results(path, {name: given.numpy()}) for path in (source, tmp_path / "new.onnx"))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_detection_goes_on_around_an_operator_it_does_not_know(tmp_path: Path) -> None:
    source = attention(tmp_path / "hand.onnx", "halves", activation=("QuickGelu", "com.microsoft"))
    report = rewrite_onnx(source, tmp_path / "new.onnx")
    assert len(report.sites) == 2
    assert report.notes == ("1 x QuickGelu: not read, left as it is",)
    assert all(each.case.endswith("against the original") for each in report.comparisons)
    assert report.operators["QuickGelu"] == 1


def test_weights_beside_the_file_stay_beside_it(tmp_path: Path) -> None:
    model = onnx.load(attention(tmp_path / "whole.onnx", "halves"))
    for weights in model.graph.initializer:
        if weights.data_type == onnx.TensorProto.FLOAT and weights.dims:  # the frequencies too, four numbers
            onnx.external_data_helper.set_external_data(weights, "weights.bin")
    onnx.save(model, tmp_path / "apart.onnx")
    out = tmp_path / "out"
    out.mkdir()
    report = rewrite_onnx(tmp_path / "apart.onnx", out / "new.onnx")
    assert report.external_data == out / "new.onnx.data"
    assert sorted(each.name for each in out.iterdir()) == ["new.onnx", "new.onnx.data"]
    assert (out / "new.onnx").stat().st_size < (out / "new.onnx.data").stat().st_size
    (tmp_path / "weights.bin").unlink()
    feeds = {"hidden": np.ones((1, 3, HEADS * WIDTH), np.float32), "positions": np.arange(3)[None]}
    _results(out / "new.onnx", feeds)
    with pytest.raises(GrapeError, match=r"weights\.bin is missing"):
        rewrite_onnx(tmp_path / "apart.onnx", out / "again.onnx")


def test_the_command_line_rewrites_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = str(attention(tmp_path / "hand.onnx", "halves")), str(tmp_path / "new.onnx")
    monkeypatch.setattr("sys.argv", ["grape-compile", "export", "onnx", source, "-o", place, "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["operators"]["RotaryEmbedding"] == 2
    assert "verify ..." in told.err
    assert (tmp_path / "new.onnx").is_file()
    monkeypatch.setattr("sys.argv", ["grape-compile", "export", "onnx", source, "-o", place, "--kv-cache"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return attention(tmp_path_factory.mktemp("hand") / "hand.onnx", "halves").read_bytes()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda whole: whole[: len(whole) // 2], "."),
        (lambda whole: b"", "without nodes"),
        (lambda whole: b"no protocol buffer at all", "."),
    ],
    ids=["truncated", "empty", "text"],
)
def test_a_file_that_is_none(content: Any, found: str, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(content(whole))
    with pytest.raises(GrapeError, match=found) as raised:
        rewrite_onnx(tmp_path / "broken.onnx", tmp_path / "new.onnx")
    assert "broken.onnx" in raised.value.asked
    assert [each.name for each in tmp_path.iterdir()] == ["broken.onnx"]


def test_mistakes_are_told(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "hand.onnx").write_bytes(whole)
    with pytest.raises(GrapeError, match="no such file"):
        rewrite_onnx(tmp_path / "missing.onnx", tmp_path / "new.onnx")
    with pytest.raises(GrapeError, match=r"write .*nowhere"):
        rewrite_onnx(tmp_path / "hand.onnx", tmp_path / "nowhere" / "new.onnx")
    with pytest.raises(GrapeError, match="target='gpu'"):
        rewrite_onnx(tmp_path / "hand.onnx", tmp_path / "new.onnx", target="gpu")
    old = attention(tmp_path / "old.onnx", "halves", opset=11)
    with pytest.raises(GrapeError, match="opset 11"):
        rewrite_onnx(old, tmp_path / "new.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["hand.onnx", "old.onnx"]


def test_a_file_that_is_worse_is_not_kept(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hand.onnx").write_bytes(whole)
    turn = emit_tables.turn

    def spoiled(*args: Any) -> emit_tables.Turn:
        made = turn(*args)
        return replace(made, sin=made.cos)

    monkeypatch.setattr("grape_compile.export.onnx.emit_rotation.turn", spoiled)
    with pytest.raises(GrapeError, match=r"its error is .*more than"):
        rewrite_onnx(tmp_path / "hand.onnx", tmp_path / "new.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["hand.onnx"]
