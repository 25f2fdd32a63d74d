"""What cannot be upgraded says why, and is as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import output_of
from torch import nn
from upgrading import ROWS, upgraded

from grape_compile import upgrade
from grape_compile.errors import GrapeError, ModelError, UpgradeError


def state(model: nn.Module) -> tuple[object, ...]:
    """What an upgrade changes: names, hooks, how the model is called."""
    modules = dict(model.named_modules())
    hooks = {name: list(module._forward_pre_hooks.values()) for name, module in modules.items()}
    kinds = {name: type(module) for name, module in modules.items()}
    return list(model.state_dict()), hooks, kinds, model._compiled_call_impl


def frozen_for_good() -> nn.Module:
    with torch.inference_mode():
        return ROWS["llama"].build()


def quantised() -> nn.Module:
    model = ROWS["llama"].build()
    projection: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    weight = (projection.weight.detach() * 100).to(torch.int8)
    projection.weight = nn.Parameter(weight, requires_grad=False)
    projection.forward = lambda hidden: hidden @ projection.weight.to(hidden.dtype).mT / 100
    return model


def taken() -> nn.Module:
    model = ROWS["llama"].build()
    model.get_submodule("model.layers.1.self_attn").register_buffer("grape", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("make", "to", "options", "told"),
    [
        (ROWS["llama"].build, "alibi", {}, "nope, or a sum such as"),
        (ROWS["llama"].build, "grape-m+grape-m-ctx", {}, "names one kind twice"),
        (ROWS["llama"].build, "grape-m", {"share": "heads"}, "share="),
        (ROWS["llama"].build, "grape-m", {"basis": "givens"}, "cayley or householder"),
        (ROWS["llama"].build, "fox", {"basis": "cayley"}, "these options for grape-m"),
        (ROWS["llama"].build, "fox", {"dim": 4}, "dim=4"),
        (ROWS["llama"].build, "grape-m", {"where": "encoder.*"}, "no layer that where="),
        (ROWS["llama"].build, "grape-m", {"non_commuting": 20}, "8 planes"),
        (ROWS["gptj"].build, "grape-m", {"non_commuting": 10}, "4 planes"),
        (ROWS["bloom"].build, "grape-m", {}, "turns neither queries nor keys"),
        (ROWS["gpt2"].build, "grape-m", {}, "no position encoding"),
        (ROWS["esm"].build, "grape-ap", {}, "not causal"),
        (ROWS["deepseek_v3"].build, "grape-m", {"basis": "cayley"}, "different planes"),
        (ROWS["gemma3"].build, "grape-m", {"share": "model"}, "encodes position otherwise"),
        (lambda: upgraded(ROWS["llama"], "fox"), "grape-m", {}, "upgraded already"),
        (frozen_for_good, "grape-m", {}, "frozen for good"),
        (quantised, "grape-m", {}, "is quantised"),
        (taken, "grape-m", {}, "called 'grape' already"),
    ],
)
def test_refused(make: Callable[[], nn.Module], to: str, options: dict[str, Any], told: str) -> None:
    model = make()
    before = state(model)
    with pytest.raises(UpgradeError, match=told):
        upgrade(model, to, backend="eager", **options)
    assert state(model) == before


def test_a_layer_that_does_not_move_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails after the first module was installed."""
    model = ROWS["llama"].build()
    before, right = state(model), output_of(copy.deepcopy(model)(**ROWS["llama"].inputs()))

    def fail(*_: object) -> None:
        raise UpgradeError("move", "nothing", "another model")

    monkeypatch.setattr("grape_compile.upgrading._require_moved", fail)
    with pytest.raises(UpgradeError):
        upgrade(model, "fox", backend="eager")
    assert state(model) == before
    assert torch.equal(output_of(model(**ROWS["llama"].inputs())), right)


def test_no_module() -> None:
    with pytest.raises(ModelError):
        upgrade("llama", "grape-m")  # type: ignore[type-var] # no module


def test_no_example() -> None:
    with pytest.raises(UpgradeError, match="args or kwargs"):
        upgrade(nn.Linear(2, 2), "grape-m")


def test_a_scripted_model() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(GrapeError, match="scripted"):
        upgrade(scripted, "grape-m", args=(torch.zeros(1, 2),))
