"""Models as ONNX files: what is in the file, what it computes, and what it generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import CACHED, ENCODED, LAYERS, VOCABULARY, Architecture
from attention_layers import BiasedAttention, example
from bias_spellings import beside_sinks
from torch import Tensor, nn

from grape_compile.encoding import parse
from grape_compile.export.onnx import OnnxReport, compare, export

ARCHITECTURES = {row.name: row for row in (*CACHED, *ENCODED)}
#: What stands for attention and rotation in a file of each target.
FUSED = {
    "standard": ("Attention", "RotaryEmbedding"),
    "ort": ("MultiHeadAttention", "RotaryEmbedding"),
    "portable": (),
}
LEAN = ("llama", "gptj", "bloom")
LONG = (
    "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt_neox", "cohere", "glm4", "deepseek_v3", "gpt_oss",
    "falcon", "mpt", "esm", "roformer", "eurobert",
)  # fmt: skip


def _rows(*lean: str) -> list[object]:
    """Some architectures, and after them all others, slow."""
    others = [name for name in (*LEAN, *LONG) if name not in lean]
    return [*lean, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def _inputs(row: Architecture) -> dict[str, Tensor]:
    inputs = row.inputs(2, 16)
    return {**inputs, "attention_mask": torch.ones(2, 16, dtype=torch.int64)}


def _held(report: OnnxReport, row: Architecture, target: str) -> None:
    """Every rotation and every attention is one operator, where the target has it."""
    if target == "portable":
        assert not any("Embedding" in name or "Attention" in name for name in report.operators)
        return
    attention, rotation = FUSED[target]
    assert report.operators.get(rotation, 0) == row.rotations
    # Encoders see all tokens, and attention with sinks stays written out.
    assert report.operators.get("Loop", 0) == LAYERS * (row.decoder and row.name != "gpt_oss")
    if row.name != "gpt_oss" and not (row.name == "gemma2" and target == "ort"):
        assert report.operators.get(attention, 0) == LAYERS
        assert "Softmax" not in report.operators


@pytest.mark.parametrize("name", _rows("llama"))
@pytest.mark.parametrize("target", ["standard", "ort", "portable"])
def test_a_model_is_exported_and_verified(name: str, target: str, tmp_path: Path) -> None:
    row = ARCHITECTURES[name]
    report = export(row.build(), (), _inputs(row), tmp_path / "model.onnx", target=target)
    _held(report, row, target)
    assert len(report.comparisons) == 3
    proto = onnx.load(tmp_path / "model.onnx")
    domains = {each.domain for each in proto.opset_import}
    assert domains <= ({"", "com.microsoft"} if target == "ort" else {""})
    assert [[dim.dim_param for dim in each.type.tensor_type.shape.dim] for each in proto.graph.input] == [
        ["batch", "sequence"]
    ] * len(proto.graph.input)
    told = {each.key: each.value for each in proto.metadata_props}
    texts = json.loads(told["grape_compile.encodings"])
    assert texts
    assert [str(parse(text)) for text in texts] == texts


DECODERS = (*(name for name in (*LEAN, *LONG) if ARCHITECTURES[name].decoder), "falcon-alibi")
QUICK = (("llama", True), ("gptj", "shared"), ("bloom", "shared"))


@pytest.mark.parametrize(
    ("name", "way", "target"),
    [
        *((*row, "standard") for row in QUICK),
        *(
            pytest.param(name, way, "standard", marks=pytest.mark.slow)
            for name in DECODERS
            for way in (True, "shared")
            if (name, way) not in QUICK
        ),
        # Sinks are in no operator of com.microsoft either.
        pytest.param("gpt_oss", "shared", "ort", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_generates_what_the_model_does(
    name: str, way: bool | str, target: str, tmp_path: Path
) -> None:
    row = ARCHITECTURES[name]
    model: Any = row.build()
    path = tmp_path / "model.onnx"
    export(model, path=path, kv_cache=way, target=target)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    ids = ids.where(mask.bool(), 0)
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 7:]
    room = 7 + 12 if way == "shared" else 0
    assert np.array_equal(_generated(path, ids.numpy(), mask.numpy(), 12, room), expected.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["standard", "ort", "portable"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_oss"])
@pytest.mark.parametrize("way", [True, "shared"], ids=["growing", "shared"])
def test_a_cache_in_half_precision_is_verified(
    way: bool | Literal["shared"], name: str, target: str, tmp_path: Path
) -> None:
    """Prompts and steps, shared caches in three ways of giving buffers, to the error of the model in float16."""
    model = ARCHITECTURES[name].build().half()
    path = tmp_path / "model.onnx"
    report = export(model, path=path, kv_cache=way, target=target)
    assert len(report.comparisons) == (3 if way == "shared" else 1) * (4 if name == "gpt_oss" else 5)
    held = {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.input}
    kinds = {kind for input_name, kind in held.items() if input_name.startswith("past_key_values")}
    assert kinds == {onnx.TensorProto.FLOAT16}


def _generated(path: Path, ids: np.ndarray, mask: np.ndarray, count: int, room: int) -> np.ndarray:
    """Greedy tokens with the file and its cache alone, which has room for so many tokens at the start."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    held = {
        each.name: np.zeros((ids.shape[0], each.shape[1], room, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }
    asked = {each.name for each in session.get_inputs()}
    made = []
    for _ in range(count):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **held}
        logits, *grown = session.run(None, {name: each for name, each in given.items() if name in asked})
        held = dict(zip(held, grown, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        made.append(ids)
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
    return np.concatenate(made, 1)


@pytest.mark.slow
def test_a_bias_beside_sinks_is_written_with_them(tmp_path: Path) -> None:
    layer = BiasedAttention(beside_sinks).eval()
    report = export(layer, (example(),), path=tmp_path / "model.onnx", dynamic_shapes=None)
    assert [site.kind for site in report.sites] == ["bias"]
    assert "no operator has sinks" in report.lowered[0].how
    assert report.comparisons


class _Doubled(nn.Module):
    """A model with nothing to find, of which a file is a file all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_model_without_a_position_is_a_file_too(tmp_path: Path) -> None:
    report = export(_Doubled(), (torch.randn(2, 3),), path=tmp_path / "model.onnx")
    assert not report.lowered
    found = compare(tmp_path / "model.onnx", _Doubled(), (torch.randn(2, 3),))
    assert all(each.file == 0 for each in found)


class Filled(nn.Module):
    """Channels put into a new tensor by slices, as DeepSeek-V3 puts its keys together."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.ones(*x.shape[:-1], 12)
        out[..., :4] = x[..., 4:] + 1
        out[..., -4:-2] = 2 * x[..., :2]
        out[:, 1:3] = 0
        return out


def test_parts_put_into_a_tensor_are_joined(tmp_path: Path) -> None:
    export(Filled(), (torch.randn(2, 5, 8),), path=tmp_path / "model.onnx", target="portable")
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Concat" in kinds
    assert not kinds & {"ScatterND", "Transpose"}
