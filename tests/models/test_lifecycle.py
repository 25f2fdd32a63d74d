"""A compiled model is still the model: undone, copied, stored, hooked and trained like any other."""

import copy
import io
import pickle

import pytest
import torch
from architectures import BY_NAME, output_of
from attention_layers import example, sharpen
from measuring import GrapeCalls
from rotation_mutants import ROTATION_MUTANTS
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report, restore
from grape_compile.errors import ModelError, RefusalError

LLAMA = BY_NAME["llama"]


def outputs(model: nn.Module, **more: object) -> Tensor:
    with torch.no_grad():
        return output_of(model(**LLAMA.inputs(), **more))


CALLS = GrapeCalls()


def rotated_by(model: nn.Module) -> int:
    """Tensors that `grape::rotate` turns in a forward pass of a model compiled with `backend=CALLS`."""
    CALLS.reset()
    outputs(model)
    return CALLS.rotated


@pytest.fixture
def model() -> nn.Module:
    compiled: nn.Module = grape_compile(LLAMA.build(), backend=CALLS)
    outputs(compiled)
    return compiled


def test_the_same_object_comes_back() -> None:
    model = LLAMA.build()
    kind, keys = type(model), list(model.state_dict())
    compiled = grape_compile(model, backend="eager")
    assert compiled is model
    assert type(compiled) is kind
    outputs(compiled)
    assert list(compiled.state_dict()) == keys


def test_nothing_is_reported_before_the_first_run() -> None:
    model = grape_compile(LLAMA.build(), backend="eager")
    assert report(model).sites == ()


def test_a_model_that_was_never_compiled_has_no_report() -> None:
    with pytest.raises(ModelError, match="did not compile"):
        report(LLAMA.build())


def test_restore(model: nn.Module) -> None:
    assert rotated_by(model) == LLAMA.rotations
    assert restore(model) is model
    assert rotated_by(model) == 0
    torch.testing.assert_close(outputs(model), outputs(LLAMA.build()), rtol=0, atol=0)
    with pytest.raises(ModelError):
        report(model)
    assert vars(model).keys() == vars(LLAMA.build()).keys()


def test_restore_of_a_plain_model_changes_nothing() -> None:
    model = LLAMA.build()
    restore(model)
    torch.testing.assert_close(outputs(model), outputs(LLAMA.build()), rtol=0, atol=0)


def test_a_second_call_replaces_the_first(model: nn.Module) -> None:
    again = grape_compile(model, backend=CALLS)
    assert again is model
    assert rotated_by(model) == LLAMA.rotations
    assert len(report(model).sites) == LLAMA.sites


def test_compiled_again_after_restore(model: nn.Module) -> None:
    restore(model)
    grape_compile(model, backend=CALLS)
    assert rotated_by(model) == LLAMA.rotations


def test_a_deep_copy_is_plain(model: nn.Module) -> None:
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    assert rotated_by(copied) == 0
    with pytest.raises(ModelError):
        report(copied)
    torch.testing.assert_close(outputs(copied), outputs(LLAMA.build()), rtol=0, atol=0)
    assert rotated_by(model) == LLAMA.rotations


def test_a_pickled_model_is_plain(model: nn.Module) -> None:
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(model)
    assert rotated_by(loaded) == 0
    assert rotated_by(model) == LLAMA.rotations


def test_weights_are_saved_and_loaded(model: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = LLAMA.build(seed=1)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(outputs(other), outputs(LLAMA.build()), rtol=0, atol=0)


def test_weights_loaded_after_compilation_are_used(model: nn.Module) -> None:
    other = LLAMA.build(seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-4, atol=1e-5)


def test_hooks_run(model: nn.Module) -> None:
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    outputs(model)
    assert seen == ["before", "model"]


def test_a_hook_on_a_layer_runs() -> None:
    model = LLAMA.build()
    shapes: list[torch.Size] = []
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(
        lambda module, args, output: shapes.append(output.shape)
    )
    grape_compile(model, backend=CALLS)
    assert rotated_by(model) == LLAMA.rotations
    assert shapes


def test_training_and_evaluation_take_turns() -> None:
    model, plain = grape_compile(LLAMA.build(), backend="eager"), LLAMA.build()
    for training in (True, False, True):
        model.train(training)
        plain.train(training)
        assert model.training is training
        torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing() -> None:
    gradients = []
    for compiled in (False, True):
        model = LLAMA.build().train()
        model.gradient_checkpointing_enable()  # type: ignore[operator]  # a method of transformers' models
        if compiled:
            grape_compile(model, backend="eager")
        torch.autograd.backward(output_of(model(**LLAMA.inputs())).square().mean())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_autocast(name: str) -> None:
    row = BY_NAME[name]
    model, plain = grape_compile(row.build(), backend="eager"), row.build()
    exact = output_of(plain(**row.inputs()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = output_of(model(**row.inputs())), output_of(plain(**row.inputs()))
    assert found.dtype == wanted.dtype
    assert (found - exact).norm() <= 1.25 * (wanted - exact).norm() + 1e-7 * exact.norm()


def test_an_optimizer_step_is_the_same_step() -> None:
    losses = []
    for compiled in (False, True):
        model = LLAMA.build().train()
        if compiled:
            grape_compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = []
        for seed in range(4):
            inputs = LLAMA.inputs(seed=seed)
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "bloom", "mpt"])
def test_attention_weights_that_are_asked_for(name: str) -> None:
    """An operator that forms no weights must not stand where they are returned."""
    row = BY_NAME[name]
    model, plain = row.build(), row.build()
    for each in (model, plain):
        each.set_attn_implementation("eager")  # type: ignore[operator]  # a method of transformers' models
    grape_compile(model, backend="eager")
    with torch.no_grad():
        found = model(**row.inputs(), output_attentions=True).attentions
        wanted = plain(**row.inputs(), output_attentions=True).attentions
    assert len(found) == len(wanted) == 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_attention_dropout_is_kept() -> None:
    """In training, weights that are dropped are part of the model; the same draw gives the same output."""
    row = BY_NAME["bloom"]
    found = []
    for compiled in (False, True):
        model = row.build().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        if compiled:
            grape_compile(model, backend="eager")
        torch.manual_seed(0)
        found.append(output_of(model(**row.inputs())).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def refused_layer() -> nn.Module:
    mutant = next(row for row in ROTATION_MUTANTS if row.refused)
    return sharpen(mutant.make())


def test_a_refusal_becomes_an_error_where_that_is_asked_for() -> None:
    layer = refused_layer()
    reason = inspect(layer, (example(),)).refusals[0].reason
    with pytest.raises(RefusalError) as caught:
        grape_compile(layer, backend="eager", on_refusal="raise")(example())
    assert reason in str(caught.value)


def test_a_refusal_is_reported_and_the_layer_runs() -> None:
    layer = refused_layer()
    wanted = layer(example())
    compiled = grape_compile(layer, backend="eager")
    torch.testing.assert_close(compiled(example()), wanted)
    assert report(compiled).refusals
    assert report(compiled).sites == ()
