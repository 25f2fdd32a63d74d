"""An upgraded model in every way it can be run, kept, copied and given away: with its new encoding, or not at all."""

import copy
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Logits, output_of
from torch import Tensor, nn
from upgrading import FAMILIES, ROWS, encodings, learn_anything, relative, upgraded

from grape_compile import grape_compile, inspect, parameter_groups, restore, rewrite, upgrade
from grape_compile.errors import UpgradeError

ROW = ROWS["llama"]
INPUTS = ROW.inputs(seq=8)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output_of(model(**INPUTS))


def learned(to: str = "fox", **options: Any) -> nn.Module:
    model = upgraded(ROW, to, **options)
    learn_anything(model)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return learned()


def test_never_by_its_own_code(model: nn.Module) -> None:
    """Copies, what is left after `restore`, another compiler, an exported program that was not rewritten."""
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restore(copy.deepcopy(model))]
    for each in copies:
        with pytest.raises(UpgradeError, match="grape_compile"):
            outputs(each)
        # A backend that knows nothing of ours; `_compiled_call_impl` of the original stays as it is.
        other: Any = torch.compile(each.forward, backend="aot_eager")
        with pytest.raises(UpgradeError):
            other(**INPUTS)
    exported = torch.export.export(model, (), INPUTS, strict=False)
    with pytest.raises(UpgradeError, match="rewrite"):
        exported.module()(**INPUTS)
    for each in copies[:2]:
        assert torch.equal(outputs(grape_compile(each, backend="eager")), outputs(model))


@pytest.mark.parametrize(
    "to",
    [
        "fox",
        *(pytest.param(to, marks=pytest.mark.slow) for to in ("grape-m", "grape-ap", "grape-a-qk", "nope")),
    ],
)
def test_exported_rewritten_saved_and_loaded(to: str) -> None:
    model = learned(to)
    exported = torch.export.export(model, (), INPUTS, strict=False)
    program, found = rewrite(exported)
    assert len(found.sites) == len(inspect(model, (), INPUTS).sites)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        assert relative(output_of(each.module()(**INPUTS)), outputs(model)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("share", ["layer", "model"])
def test_save_pretrained(share: str, tmp_path: Path) -> None:
    """A checkpoint of the library is one of the plain model with more in it: upgrade, then load."""
    safetensors = pytest.importorskip("safetensors.torch")
    model: Any = learned(share=share)
    model.save_pretrained(tmp_path)
    again = upgrade(type(model).from_pretrained(tmp_path), "fox", share=share, backend="eager")
    missing = again.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(outputs(again.eval()), outputs(model))


def test_parameter_groups(model: nn.Module) -> None:
    others, own = parameter_groups(model, lr=1e-3, weight_decay=0.1, encoding_lr=1e-2)
    assert {id(each) for each in own["params"]} == {id(each) for each in encodings(model).values()}
    assert (own["lr"], own["weight_decay"]) == (1e-2, 0.0)
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
    assert len(others["params"]) + len(own["params"]) == len(list(model.parameters()))
    torch.optim.AdamW([others, own])


@pytest.mark.slow
def test_everything_else_frozen() -> None:
    model = learned("grape-m+fox")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in encodings(model).values():
        parameter.requires_grad_(True)
    [group] = parameter_groups(model, lr=1e-3)
    assert len(group["params"]) == len(encodings(model))
    output_of(model(**INPUTS)).square().mean().backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert trained == encodings(model).keys()


@pytest.mark.slow
def test_adapters_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = upgraded(ROW, "fox")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["grape"]))
    output_of(tuned(**INPUTS)).square().mean().backward()
    trained = [
        name for name, each in tuned.named_parameters() if each.requires_grad and each.grad is not None
    ]
    assert any("grape.modules_to_save" in name for name in trained)
    assert any("lora_B" in name for name in trained)
    assert all("grape" in name or "lora" in name for name in trained)


@pytest.mark.slow
def test_gradient_checkpointing() -> None:
    gradients = []
    for checkpointed in (False, True):
        model: Any = learned()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        output_of(model(**INPUTS)).square().mean().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["fox", "grape-m", "grape-ap", "grape-a-qk", "grape-m-ctx"])
@pytest.mark.parametrize("target", ["standard", "portable"])
def test_exported_to_onnx(to: str, target: Any, tmp_path: Path) -> None:
    from grape_compile.export import onnx

    report = onnx.export(
        Logits(learned(to)).eval(), (INPUTS["input_ids"],), path=tmp_path / "model.onnx", target=target
    )
    assert report.comparisons


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("gptj", "grape-m"),
        ("deepseek_v3", "grape-m"),
        ("bloom", "fox"),
        ("gemma2", "fox"),
        ("bloom", "grape-a-qk"),
        ("gpt_neox", "grape-a-qk"),
        ("mpt", "grape-ap"),
        ("cohere", "grape-ap"),
        ("qwen3", "grape-m-ctx"),
        ("phi3", "grape-m-ctx"),
    ],
)
@pytest.mark.parametrize("target", ["ort", "portable"])
def test_families_exported_for_other_runtimes(name: str, to: str, target: Any, tmp_path: Path) -> None:
    from grape_compile.export import onnx

    row = ROWS[name]
    model = upgraded(row, to)
    learn_anything(model)
    report = onnx.export(model, (), row.inputs(), tmp_path / "model.onnx", target=target)
    assert len(report.comparisons) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to"),
    [
        (name, to)
        for name in FAMILIES
        for to in (("fox",) if ROWS[name].biases else ("grape-m", "grape-m+fox"))
    ],
)
def test_every_family_exported_to_onnx(name: str, to: str, tmp_path: Path) -> None:
    """The file computes what the model does after training, at sizes that were not traced."""
    from grape_compile.export import onnx

    row = ROWS[name]
    model = upgraded(row, to)
    learn_anything(model)
    report = onnx.export(model, (), row.inputs(), tmp_path / "model.onnx", target="standard")
    assert len(report.comparisons) == 3
    if "grape-m" in to:
        assert report.operators.get("RotaryEmbedding", 0) == row.rotations


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("to", ["fox", "grape-m"])
def test_sharded(to: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = learned(to)
    right = outputs(model)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = output_of(sharded(**INPUTS))
    assert relative(found.detach(), right) < 1e-6
    found.square().mean().backward()
    own = [each for name, each in sharded.named_parameters() if ".grape." in name]
    assert own
    assert all(each.grad is not None and each.grad.any() for each in own)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_sharded_layer_by_layer() -> None:
    """Each layer is a graph of its own, whose tables come from another: what needs positions is refused."""
    from torch.distributed.fsdp import fully_shard

    for to in ("fox", "grape-m"):
        model: Any = learned(to)
        right = outputs(model)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if to == "fox":
            assert relative(outputs(model), right) < 1e-6
        else:
            with pytest.raises(UpgradeError, match="tables"):
                outputs(model)
