"""Decoders by TVM: with a cache and without, within the error contract, run where torch is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tvm_models import BLOCKED, RUNNER, decoder, program

pytest.importorskip("tvm")

from grape_compile.export.contract import FACTOR, FLOOR
from grape_compile.export.deviation import Deviation
from grape_compile.export.oracle import InDouble
from grape_compile.export.tvm import build


def calls(vocabulary: int) -> dict[str, Tensor]:
    """Prompts of three lengths, behind the last of them a step of one token and one of two."""
    random = torch.Generator().manual_seed(1)
    shapes = {
        "prompt 3": (1, 3),
        "prompt 9": (2, 9),
        "prompt 17": (3, 17),
        "step 1": (3, 1),
        "step 2": (3, 2),
    }
    return {name: torch.randint(3, vocabulary, shape, generator=random) for name, shape in shapes.items()}


def logits_of(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    found, held = {}, None
    for name, ids in given.items():
        with torch.no_grad():
            result = model(ids, past_key_values=None if name.startswith("prompt") else held, use_cache=True)
        found[name], held = result.logits, result.past_key_values
    return found


def check_without_torch(model: Any, path: Path) -> None:
    given = calls(96)
    arrays: dict[str, Any] = {name: ids.numpy() for name, ids in given.items()}
    np.savez(path.with_name("calls.npz"), **arrays)
    out = path.with_name("logits.npz")
    command = [*program(RUNNER), str(path), str(path.with_name("calls.npz")), str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    own = logits_of(model, given)
    with InDouble():
        truth = logits_of(model.double(), given)
    for name, found in np.load(out).items():
        errors = []
        for logits in (found, own[name].numpy()):
            errors.append(Deviation().add(logits, truth[name].numpy()).relative)
        assert errors[0] <= FACTOR * errors[1] + FLOOR, (name, errors)


def test_a_decoder_is_built_saved_and_runs_where_torch_is_not(tmp_path: Path) -> None:
    model = decoder("llama", 64, 2)
    artifact = build(model, kv_cache=True, target="llvm")
    hows = {place.encoding.partition("(")[0]: place.how for place in artifact.about.places}
    assert hows == {"rotation": "TensorIR", "attention": "TensorIR"}
    assert len(artifact.about.comparisons) == 4
    check_without_torch(model, artifact.save(tmp_path / "model.so"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
def test_decoders_keep_the_error_contract(family: str, tmp_path: Path) -> None:
    model = decoder(family, 256, 4)
    artifact = build(model, kv_cache=True, target="llvm")
    assert {place.how for place in artifact.about.places} == {"TensorIR"}
    check_without_torch(model, artifact.save(tmp_path / "model.so"))
    ids = torch.arange(3, 13)[None]
    whole = build(
        decoder(family, 256, 4), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, target="llvm"
    )
    assert len(whole.about.comparisons) == 3


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
def test_a_decoder_is_built_as_it_is_called(family: str) -> None:
    model, ids = decoder(family, 64, 1), torch.arange(3, 13)[None]
    artifact = build(model, (), {"input_ids": ids, "use_cache": False}, target="llvm", verify=False)
    assert {place.how for place in artifact.about.places} == {"TensorIR"}
    assert any(place.encoding == "attention" or "bias" in place.encoding for place in artifact.about.places)
    # Sizes between which the model's own code may choose.
    for size in (1, 2, 17):
        x = ids[:, :1].expand(2, size).contiguous() + torch.arange(size)
        with torch.no_grad():
            own = model(x, use_cache=False).logits.numpy()
        np.testing.assert_allclose(artifact.run(x.numpy())["logits"], own, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
def test_decoders_in_half_precision(family: str) -> None:
    artifact = build(decoder(family, 256, 4), kv_cache=True, target="llvm", dtype=torch.float16)
    assert {value.dtype for value in artifact.about.outputs} == {"float16"}


@pytest.mark.slow
def test_the_runners_say_what_the_model_says(tmp_path: Path) -> None:
    model = decoder("llama", 64, 2)
    path = build(model, kv_cache=True, target="llvm").save(tmp_path / "model.so")
    prompt = [5, 17, 42]
    made = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    right = " ".join(map(str, made[0, len(prompt) :].tolist()))
    root = Path(__file__).parents[2]
    example = str(root / "examples/run_tvm.py")
    start = "import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    by_python = [*program(BLOCKED + start), example]
    done = subprocess.run(
        [*by_python, str(path), *map(str, prompt), "--tokens", "8"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == right
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("there is no g++ or make")
    (tmp_path / "examples").symlink_to(root / "examples")
    # As `make run_tvm`, in another folder, with this interpreter's packages.
    made_here = ["READY=", f"BIN={Path(sys.executable).parent}"]
    subprocess.run(["make", "-f", str(root / "Makefile"), "run_tvm", *made_here], cwd=tmp_path, check=True)
    runner = [str(tmp_path / "run_tvm"), str(path), "8", *map(str, prompt)]
    done = subprocess.run(runner, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == right
