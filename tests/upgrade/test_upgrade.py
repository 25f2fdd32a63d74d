"""What an upgraded model computes at the start, that it trains, and that its weights come back."""

import warnings
from typing import Any

import pytest
import torch
from architectures import output_of
from torch import nn
from upgrading import (
    FAMILIES,
    ROWS,
    drop_weights,
    encodings,
    learn_anything,
    relative,
    starts_the_same,
    targets,
    upgraded,
)

from grape_compile import report, upgrade

QUICK = {("gptj", "grape-m"), ("bloom", "grape-a-qk")}
CASES = [(name, to) for name in FAMILIES for to in targets(ROWS[name])]
CASES += [("eurobert", to) for to in ("grape-m", "fox", "grape-a-qk", "grape-m+fox")]
#: Rounding of float32 in a forward pass of two layers; that of the phases of grape-m-ctx among it.
ROUNDING = 2e-6


@pytest.mark.parametrize(
    ("name", "to"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_an_upgraded_model(name: str, to: str) -> None:
    """Step 0, gradients, twenty steps, weights."""
    row = ROWS[name]
    plain, ids = row.build(), row.inputs(seq=12)["input_ids"]
    model = upgraded(row, to)
    names = [key for key in model.state_dict() if key not in plain.state_dict()]
    assert all(".grape." in key for key in names)
    if starts_the_same(row, to):
        assert relative(outputs(model, ids), outputs(plain, ids)) < ROUNDING
    losses = train(model, ids, steps=20, all_learn=to != "nope")
    assert losses[-1] < 0.9 * losses[0]
    sites = report(model).sites
    assert all("learned" in str(site.encoding) or "forget" in str(site.encoding) for site in sites)
    again = upgraded(row, to, seed=1)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(again, ids), outputs(model, ids), rtol=1e-5, atol=1e-5)


def run(model: nn.Module, ids: torch.Tensor) -> Any:
    """One call for all that a test asks for, so that a model is compiled once: logits and the loss of these tokens."""
    return model(input_ids=ids, labels=ids, **({"use_cache": False} if hasattr(model, "generate") else {}))


def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return output_of(run(model, ids)).detach()


def train(model: nn.Module, ids: torch.Tensor, *, steps: int, all_learn: bool) -> list[float]:
    """The losses of learning these tokens by heart; every parameter of an encoding has a gradient."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = run(model, ids).loss
        optimiser.zero_grad()
        loss.backward()
        if step == 1 and all_learn:
            own = encodings(model)
            assert own
            still = [name for name, each in own.items() if each.grad is None or not each.grad.any()]
            assert not still
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("fox", "starts as in the authors' models"),
        ("grape-m+grape-ap", "a thousandth of ALiBi's slopes"),
        ("nope", "no longer encoded"),
    ],
)
def test_what_does_not_start_the_same_is_told(to: str, told: str) -> None:
    with pytest.warns(UserWarning, match=told):
        upgrade(ROWS["llama"].build(), to, backend="eager")


@pytest.mark.slow
def test_what_starts_the_same_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        upgrade(ROWS["bloom"].build(), "fox", backend="eager")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"basis": "cayley"}, marks=pytest.mark.slow),
        pytest.param({"basis": "householder"}, marks=pytest.mark.slow),
        pytest.param({"basis": "orthogonal"}, marks=pytest.mark.slow),
        pytest.param({"non_commuting": 8}, marks=pytest.mark.slow),
        {"non_commuting": 16, "basis": "cayley"},
        {"per_head": True},
    ],
    ids=str,
)
def test_options_start_the_same_and_learn(options: dict[str, Any]) -> None:
    row = ROWS["llama"]
    inputs = row.inputs(seq=8)
    model = upgraded(row, "grape-m", **options)
    output = output_of(model(**inputs))
    assert relative(output.detach(), output_of(row.build()(**inputs)).detach()) < ROUNDING
    output.square().mean().backward()
    assert all(each.grad is not None and each.grad.any() for each in encodings(model).values())


def test_some_layers_alone() -> None:
    row = ROWS["llama"]
    model = upgraded(row, "fox", where="model.layers.1.*")
    model(**row.inputs())
    kinds = {(site.module, site.kind) for site in report(model).sites}
    assert kinds == {("model.layers.0.self_attn", "rotation"), ("model.layers.1.self_attn", "bias")}


@pytest.mark.slow
def test_one_encoding_for_all_layers() -> None:
    row = ROWS["llama"]
    model = upgraded(row, "grape-m", share="model")
    assert list(encodings(model)) == ["model.layers.0.self_attn.grape.spectrum.log_theta"]
    one, inputs = upgraded(row, "grape-m"), row.inputs()
    with torch.no_grad():
        next(iter(encodings(model).values())).add_(2.0)
        for each in encodings(one).values():
            each.add_(2.0)
        assert torch.equal(output_of(model(**inputs)), output_of(one(**inputs)))


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("falcon-alibi", "fox"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bloom", "fox"),
                ("bloom", "grape-a-qk"),
                ("llama", "grape-m"),
                ("llama", "grape-m+grape-ap"),
                ("roformer", "grape-m"),
                ("esm", "grape-m+fox"),
            )
        ),
    ],
)
def test_weights_that_are_dropped_out_are_those_of_the_plain_model(name: str, to: str) -> None:
    """The draws of one seed are the same with the attention written out and fused, and training learns."""
    row = ROWS[name]
    plain, model = (drop_weights(each, 0.1) for each in (row.build(), upgraded(row, to)))
    ids = row.inputs(seq=12)["input_ids"]
    if starts_the_same(row, to):
        right = seeded(plain, ids)
        assert relative(seeded(model, ids), right) < ROUNDING
        assert relative(seeded(plain.eval(), ids), right) > 0.01
    losses = train(model, ids, steps=20, all_learn=True)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to", "attention"),
    [
        ("bloom", "grape-a-qk", "eager"),
        ("mpt", "grape-ap", "eager"),
        ("llama", "grape-a-k", "sdpa"),
        ("gemma2", "fox", "eager"),
        ("gpt_oss", "grape-m+fox", "eager"),
        ("qwen3", "grape-m+grape-ap", "eager"),
        ("esm", "fox", "sdpa"),
    ],
)
def test_weights_that_are_not_dropped_are_those_of_the_operator(name: str, to: str, attention: str) -> None:
    """A share of next to nothing: training computes what evaluation does, with gradients and left padding."""
    row = ROWS[name]
    model: Any = upgraded(row, to)
    learn_anything(model)
    model.set_attn_implementation(attention)
    ids = row.inputs(seq=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    outputs, gradients = [], []
    drop_weights(model, 1e-12)
    for training in (True, False):
        model.train(training).zero_grad()
        output = output_of(model(input_ids=ids, attention_mask=mask))
        output[1:].square().mean().backward()
        outputs.append(output.detach())
        gradients.append(torch.cat([each.grad.flatten() for each in encodings(model).values()]))  # type: ignore[union-attr]
    assert relative(*outputs) < ROUNDING
    assert relative(*gradients) < 2 * ROUNDING


@pytest.mark.slow
def test_weights_that_are_returned_are_the_new_ones() -> None:
    model: Any = upgraded(ROWS["llama"], "grape-m+fox")
    learn_anything(model)
    inputs = ROWS["llama"].inputs(seq=12)
    with torch.no_grad():
        right = model(**inputs).logits
        model.set_attn_implementation("eager")
        found = model(**inputs, output_attentions=True)
    assert relative(found.logits, right) < ROUNDING
    for weights in found.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights.triu(1).any()


def seeded(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return outputs(model, ids)
