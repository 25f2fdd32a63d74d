"""Generation by upgraded models: a cache, of whatever kind, changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import StaticCache
from upgrading import FAMILIES, ROWS, learn_anything, relative, upgraded

from grape_compile.errors import UpgradeError

CACHED = ("grape-m-ctx", "fox", "grape-a-qk", "grape-ap", "grape-m+fox")
#: Rounding of float32 in a forward pass of two layers, in another order of sums.
ROUNDING = 3e-6


def model_of(name: str, to: str) -> nn.Module:
    model = upgraded(ROWS[name], to)
    learn_anything(model)
    return model


def generated(model: nn.Module, ids: Tensor, mask: Tensor, **settings: Any) -> Any:
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
    } | settings
    generate: Any = model.generate
    return generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **settings)


def prompt(padding: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return ids, mask


def assert_same(found: Any, right: Any) -> None:
    assert torch.equal(found.sequences, right.sequences)
    for one, other in zip(found.logits, right.logits, strict=True):
        assert relative(one, other) < ROUNDING


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("llama", "grape-ap"),
        pytest.param("llama", "grape-m-ctx", marks=pytest.mark.slow),
        *(pytest.param("llama", to, marks=pytest.mark.slow) for to in CACHED[1:3]),
        *(pytest.param("bloom", to, marks=pytest.mark.slow) for to in ("grape-a-k", "grape-ap")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "grape-m+grape-a-qk"),
                ("gptj", "grape-m-ctx+grape-a-k"),
                ("gemma3", "grape-m+fox+grape-a-qk"),
            )
        ),
        *(pytest.param("gptj", to, marks=pytest.mark.slow) for to in ("grape-m", "fox", "grape-m-ctx")),
        *(pytest.param("gemma3", to, marks=pytest.mark.slow) for to in CACHED),
        *(pytest.param("mistral", to, marks=pytest.mark.slow) for to in CACHED),
    ],
)
def test_greedy_with_a_cache(name: str, to: str) -> None:
    """Left padding, and more tokens than a window of some of these models holds."""
    model, ids = model_of(name, to), prompt(padding=2)
    assert_same(generated(model, *ids), generated(model, *ids, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_generates(name: str) -> None:
    """What turns and what is summed up, with a cache that grows and with one of fixed size."""
    model, ids = model_of(name, "fox" if ROWS[name].biases else "grape-m+fox"), prompt(padding=2)
    right = generated(model, *ids, use_cache=False)
    found = generated(model, *ids, use_cache=True)
    assert found.past_key_values is not None
    assert_same(found, right)
    assert_same(generated(model, *ids, cache_implementation="static"), right)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("llama", "fox"),
        *(
            pytest.param("llama", to, marks=pytest.mark.slow)
            for to in ("grape-m", "grape-m-ctx", "grape-a-q", "grape-m+grape-a-q", "grape-m+fox+grape-a-qk")
        ),
        *(
            pytest.param("bloom", to, marks=pytest.mark.slow)
            for to in ("fox", "grape-a-q", "grape-a-k", "grape-ap")
        ),
        *(pytest.param(name, "grape-a-qk", marks=pytest.mark.slow) for name in ("llama", "qwen3")),
    ],
)
def test_greedy_with_a_cache_of_fixed_size(name: str, to: str) -> None:
    model, ids = model_of(name, to), prompt()
    found = generated(model, *ids, cache_implementation="static")
    assert_same(found, generated(model, *ids, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["fox", "grape-ap"])
@pytest.mark.parametrize("kind", [None, "static"])
def test_beams(to: str, kind: str | None) -> None:
    model, ids = model_of("llama", to), prompt()
    settings: dict[str, Any] = {"num_beams": 3, "output_logits": False}
    found = generated(model, *ids, cache_implementation=kind, **settings)
    right = generated(model, *ids, use_cache=False, **settings)
    assert torch.equal(found.sequences, right.sequences)


@pytest.mark.parametrize("to", CACHED)
@pytest.mark.slow
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(to: str) -> None:
    model = model_of("llama", to)
    ids, _ = prompt()
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        cache.crop(-4)
        found = model(input_ids=ids[:, 5:7] + 1, past_key_values=cache).logits
        right = model(input_ids=torch.cat([ids[:, :5], ids[:, 5:7] + 1], 1), use_cache=False).logits
    assert relative(found, right[:, 5:]) < ROUNDING


@pytest.mark.slow
def test_gates_of_keys_that_are_made_of_what_a_cache_keeps_are_refused() -> None:
    """A latent cache keeps turned parts of keys: keys before they turned cannot be made of it."""
    model, ids = model_of("deepseek_v3", "grape-m+grape-a-k"), prompt()
    generated(model, *ids, use_cache=False)
    with pytest.raises(UpgradeError, match="between their rotation and a gate"):
        generated(model, *ids)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["grape-ap", "grape-a-qk"])
def test_a_cache_of_fixed_size_compiles_the_prompt_and_one_token(to: str) -> None:
    graphs: list[fx.GraphModule] = []
    counts = []

    def backend(graph: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    model = upgraded(ROWS["llama"], to, backend=backend)
    for tokens in (4, 9):
        settings: dict[str, Any] = {"max_cache_len": 32, "max_new_tokens": tokens, "min_new_tokens": tokens}
        generated(model, *prompt(), cache_implementation="static", **settings)
        counts.append(len(graphs))
    assert counts == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mistral"])
@pytest.mark.parametrize("to", ["grape-ap", "grape-a-k", "grape-m-ctx", "grape-m+fox+grape-a-qk"])
@pytest.mark.parametrize("length", [5, 9])
def test_a_window_of_fixed_size_that_fills(name: str, to: str, length: int) -> None:
    """A window of 8 is full at once, or while tokens are added one by one."""
    model, (ids, mask) = model_of(name, to), prompt()
    inputs = ids[:, :length], mask[:, :length]
    right = generated(model, *inputs, use_cache=False)
    assert_same(generated(model, *inputs, cache_implementation="static"), right)


@pytest.mark.slow
def test_a_window_of_fixed_size_goes_on_with_several_tokens() -> None:
    """Behind a window that is full, or that becomes full."""
    model, (ids, _) = model_of("mistral", "grape-m-ctx+grape-ap"), prompt()
    for first in (4, 9):
        tokens = torch.cat([ids, ids + 1], 1)[:, : first + 6]
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=32)
            model(input_ids=tokens[:, :first], past_key_values=cache)
            found = model(input_ids=tokens[:, first:], past_key_values=cache).logits
            right = model(input_ids=tokens, use_cache=False).logits
        assert relative(found, right[:, first:]) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to"), [("llama", "grape-ap"), ("mistral", "grape-m-ctx"), ("gemma3", "fox")]
)
def test_assisted_generation(name: str, to: str) -> None:
    """Tokens that were looked up are taken back where they were wrong, from windows too."""
    model, (ids, mask) = model_of(name, to), prompt()
    ids, mask = ids[:1].repeat(1, 2), mask[:1].repeat(1, 2)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "output_logits": False}
    found = generated(model, ids, mask, prompt_lookup_num_tokens=3, **settings)
    right = generated(model, ids, mask, use_cache=False, **settings)
    assert torch.equal(found.sequences, right.sequences)
