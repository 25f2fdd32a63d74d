"""The code for GPUs, read by a GPU's compiler and run by a CPU's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

import torch
from cuda_on_cpu import COMPILER, run, source_of
from tensorir_cases import Case, double, heads, operand

from grape_compile.encoding import Encoding, Rotation, alibi, fox, gated_alibi, grape_ap, nope, rope
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.attention import attention, attention_space, hand
from grape_compile.kernels.tensorir.attention_call import Attention, supports
from grape_compile.kernels.tensorir.attention_gpu import SPLITS
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.kernels.tensorir.rotation import rotation
from grape_compile.kernels.tensorir.rotation import supports as supports_rotation
from grape_compile.operators.reference import reference_rotate
from grape_compile.operators.rotation_samples import ROTATIONS
from grape_compile.operators.sample import BATCH, HEAD_DIM, HEADS, LENGTH, Sample
from grape_compile.operators.samples import BIASES, COMPOSITIONS, PATHS

NVCC = shutil.which("nvcc")
GPUS = {"sm_80": "nvidia/nvidia-a100", "sm_90": "nvidia/nvidia-h100"}
SAMPLES = [sample for sample in (*BIASES, *PATHS, *COMPOSITIONS) if supports(sample.encoding) is True]
SMALL = {"rows": 32, "block": 16, "tile": 4, "cores": 0, "splits": 1}

needs_cpu = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the CUDA source for a CPU with")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the CUDA source with")


def check(folder: Path, case: Case, point: Mapping[str, int] = SMALL) -> None:
    function = attention(case.described(), engine.to_target(GPUS["sm_80"]), point)
    output = case.output()
    arrays = {name: tensor.numpy() for name, tensor in (case.named | {"output": output}).items()}
    run(function, arrays, folder, GPUS["sm_80"])
    case.hold(output)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_bias_is_what_it_is_defined_to_be(sample: Sample, tmp_path: Path) -> None:
    options = {"is_causal": sample in PATHS}
    check(tmp_path, Case(sample.encoding, heads(LENGTH, LENGTH), sample.slots(torch.float32), options))


@needs_cpu
@pytest.mark.parametrize(
    ("encoding", "options"),
    [
        (alibi(HEADS), {"is_causal": True, "window": 20}),
        (grape_ap(HEADS), {"is_causal": True}),
        (nope(), {"cap": 2.0, "sinks": torch.tensor([[0.5, -1.0, 2.0, 0.0]])}),
        (fox(), {"mask": torch.rand(BATCH, 1, 37, 41, generator=torch.Generator().manual_seed(1)) > 0.5}),
    ],
    ids=["alibi", "grape_ap", "nope", "fox"],
)
def test_what_a_query_sees(encoding: Encoding, options: dict[str, Any], tmp_path: Path) -> None:
    slots = {
        "log_forget": torch.rand(BATCH, HEADS, 41).log(),
        "path_query": torch.randn(BATCH, HEADS, 37, 8),
        "path_key": torch.randn(BATCH, HEADS, 41, 8),
    }
    used = {name: slots[name] for name in encoding.slots}
    check(tmp_path, Case(encoding, heads(37, 41, kv_heads=2), used, options))


@needs_cpu
@pytest.mark.parametrize(
    ("encoding", "splits", "options"),
    [
        (fox(), 1, {"window": 70}),
        (grape_ap(HEADS), 2, {"window": 70}),
        (alibi(HEADS), 4, {"sinks": torch.tensor([[0.5, -1.0, 2.0, 0.0]]), "cap": 2.0}),
    ],
    ids=["fox", "grape_ap", "alibi"],
)
def test_few_queries_are_taken_one_by_one(
    encoding: Encoding, splits: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Three pieces of keys in one, two and four parts, the last of which has none."""
    slots = {
        "log_forget": torch.rand(BATCH, HEADS, 81).log(),
        "path_query": torch.randn(BATCH, HEADS, 2, 8),
        "path_key": torch.randn(BATCH, HEADS, 81, 8),
    }
    used = {name: slots[name] for name in encoding.slots}
    case = Case(encoding, heads(2, 81, width=33, kv_heads=2), used, {"is_causal": True} | options)
    check(tmp_path, case, {**SMALL, "splits": splits})


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_keys_split_among_blocks_give_the_same_bias(sample: Sample, tmp_path: Path) -> None:
    slots = sample.slots(torch.float32, queries=4)
    case = Case(sample.encoding, heads(4, LENGTH), slots, {"is_causal": True})
    check(tmp_path, case, {**SMALL, "rows": 4, "splits": 2})


@needs_cpu
@pytest.mark.parametrize("encoding", [alibi(HEADS), grape_ap(HEADS)], ids=["alibi", "grape_ap"])
def test_tensor_cores_take_half_precision(encoding: Encoding, tmp_path: Path) -> None:
    torch.manual_seed(3)
    query = torch.randn(1, HEADS, 70, 32).half()
    key, value = (torch.randn(1, 2, 70, size).half() for size in (32, 16))
    slots = {name: torch.randn(1, HEADS, 70, 8) for name in encoding.slots}
    case = Case(encoding, (query, key, value), slots, {"is_causal": True})
    check(tmp_path, case, {"rows": 64, "block": 32, "tile": 8, "cores": 1, "splits": 1})


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sample",
    [sample for sample in ROTATIONS if supports_rotation(sample.encoding) is True],
    ids=lambda sample: sample.name,
)
def test_a_tensor_turns_as_defined(sample: Sample, dtype: torch.dtype, tmp_path: Path) -> None:
    turn_and_check(sample, dtype, tmp_path)


@needs_cpu
def test_one_tensor_turns_as_defined(tmp_path: Path) -> None:
    """The sample with all of it: several axes, whose positions are sums, and a frequency for each plane."""
    turn_and_check(
        next(each for each in ROTATIONS if each.name == "axes_accumulated"), torch.float16, tmp_path
    )


def turn_and_check(sample: Sample, dtype: torch.dtype, folder: Path) -> None:
    assert isinstance(sample.encoding, Rotation)
    torch.manual_seed(0)
    tensor = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM).to(dtype)
    slots = sample.slots(torch.float32)
    described = {name: operand(slot) for name, slot in slots.items()}
    point = {"tokens": 4, "threads": 32, "parts": 2}
    function = rotation(sample.encoding, operand(tensor), described, engine.to_target(GPUS["sm_80"]), point)
    turned = torch.full_like(tensor, 7.0)
    arrays = {"x": tensor, "y": turned} | slots
    run(function, {name: each.numpy() for name, each in arrays.items()}, folder, GPUS["sm_80"])
    (wanted,) = reference_rotate([tensor.double()], sample.encoding, double(slots))
    unit = torch.finfo(dtype).eps / 2 + 6 * torch.finfo(torch.float32).eps
    assert (turned.double() - wanted).abs().amax() <= 2 * unit * sample.encoding.scale * tensor.abs().amax()


def functions(gpu: str) -> dict[str, Any]:
    """One function of each kind, of any batch and length, in half precision."""
    target = engine.to_target(gpu)
    shape = Operand(("batch", 8, "tokens", 64), "float16")
    shared = Operand(("batch", 2, "keys", 64), "float16")
    one = Operand(("batch", 8, 1, 64), "float16")
    slots = {
        "log_forget": Operand(("batch", 8, "keys")),
        "gate_query": Operand(("batch", 8, "tokens")),
        "gate_key": Operand(("batch", 8, "keys")),
        "path_query": Operand(("batch", 8, "tokens", 8)),
        "path_key": Operand(("batch", 8, "keys", 8)),
    }
    attending = {
        name: Attention(
            encoding,
            query,
            shared,
            shared,
            slots={slot: slots[slot] for slot in encoding.slots}
            | ({"path_query": Operand(("batch", 8, 1, 8))} if name == "decode_path" else {}),
            is_causal=True,
        )
        for name, encoding, query in (
            ("plain", nope(), shape),
            ("alibi", alibi(8), shape),
            ("fox", fox(), shape),
            ("gated", gated_alibi(8), shape),
            ("grape_ap", grape_ap(8), shape),
            ("decode", alibi(8), one),
            ("decode_path", grape_ap(8), one),
        )
    }
    found = {name: attention(call, target, name=name) for name, call in attending.items()}
    return found | {"rotation": rotation(rope(64), shape, {}, target, name="rotation")}


@needs_nvcc
@pytest.mark.parametrize("architecture", GPUS)
def test_every_operator_compiles_for_a_gpu(architecture: str, tmp_path: Path) -> None:
    written = functions(GPUS[architecture])
    source, compiled = tmp_path / "kernels.cu", tmp_path / "kernels.ptx"
    source.write_text(source_of(written, GPUS[architecture]))
    command = [str(NVCC), f"-arch={architecture}", "-ptx", "-w", "-o", str(compiled), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    text = compiled.read_text()
    assert f".target {architecture}" in text
    assert all(f".entry {name}_kernel" in text for name in written)
    assert ".entry decode_kernel_1" in text  # what merges the parts of the keys
    assert "wmma.mma.sync" in text


def test_points_of_the_space_fit_the_gpu() -> None:
    case = Case(alibi(HEADS), heads(64, 64, dtype=torch.float16), {}, {"is_causal": True})
    points = attention_space(case.described(), engine.to_target(GPUS["sm_80"])).candidates()
    assert len(points) > 8
    assert all(point["rows"] % point["tile"] ** 2 == 0 for point in points)


def test_keys_are_split_until_blocks_fill_a_gpu() -> None:
    target = engine.to_target(GPUS["sm_80"])

    def splits(queries: int | str, keys: int | str) -> int:
        query, key = (Operand((1, 8, size, 64), "float16") for size in (queries, keys))
        return hand(Attention(alibi(8), query, key, key, is_causal=True), target)["splits"]

    assert [splits(1, "keys"), splits(1, 512), splits(4, 4096), splits("queries", 4096)] == [32, 4, 8, 1]
    case = Case(alibi(HEADS), heads(1, 64), {}, {"is_causal": True})
    assert {each["splits"] for each in attention_space(case.described(), target).candidates()} == set(SPLITS)
