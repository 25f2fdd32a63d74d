"""Generation: the same tokens as the plain model, with every cache, and no more graphs for more tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import CACHED, ENCODED, Architecture
from measuring import GrapeCalls
from torch import Tensor, fx, nn
from transformers import CompileConfig

from grape_compile import grape_compile, report

NEW_TOKENS = 6
QUICK = {"llama", "gptj", "bloom", "mpt", "gemma3", "deepseek_v3"}

decoders = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if row.name in QUICK else pytest.mark.slow, id=row.name)
        for row in ENCODED
        if row.decoder
    ],
)


class CountedGraphs(GrapeCalls):
    """Counts the graphs compiled as well."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return super().__call__(module, examples)


def generated(
    model: nn.Module, ids: Tensor, mask: Tensor, *, tokens: int = NEW_TOKENS, **settings: Any
) -> Tensor:
    generate = model.generate
    assert callable(generate)
    settings = {"max_new_tokens": tokens, "do_sample": False, **settings}
    found: Tensor = generate(input_ids=ids, attention_mask=mask, **settings)
    return found


def prompt(row: Architecture, paddings: tuple[int, ...], length: int = 10) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch whose rows begin with so many padding tokens."""
    ids: Tensor = row.inputs(batch=len(paddings), seq=length)["input_ids"]
    mask = torch.ones_like(ids)
    for sample, padding in enumerate(paddings):
        ids[sample, :padding] = 0
        mask[sample, :padding] = 0
    return ids, mask


@decoders
@pytest.mark.parametrize("paddings", [(0,), (0, 2, 5)], ids=["one", "left-padded batch"])
@pytest.mark.timeout(600)
def test_the_same_tokens(row: Architecture, paddings: tuple[int, ...]) -> None:
    ids, mask = prompt(row, paddings)
    calls = GrapeCalls()
    plain, model = row.build(), grape_compile(row.build(), backend=calls)
    wanted, found = generated(plain, ids, mask), generated(model, ids, mask)
    assert wanted.shape == (len(paddings), ids.shape[1] + NEW_TOKENS)
    assert found.tolist() == wanted.tolist()
    # The prompt and the single token are different graphs of the same places.
    assert len(report(model).sites) == row.sites, str(report(model))
    assert report(model).refusals == (), str(report(model))
    passes = (calls.rotated + calls.attended) / row.sites
    assert passes == NEW_TOKENS, "the prompt, then one token at a time, each through every operator"


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_generation_without_a_cache(name: str) -> None:
    row = next(row for row in ENCODED if row.name == name)
    ids, mask = prompt(row, (0, 3))
    plain, model = row.build(), grape_compile(row.build(), backend="eager", dynamic=True)
    wanted = generated(plain, ids, mask, use_cache=False)
    assert generated(model, ids, mask, use_cache=False).tolist() == wanted.tolist()


STATIC: dict[str, Any] = {"cache_implementation": "static"}
ROWS = {row.name: row for row in CACHED}
LEFT_OUT = {
    "falcon-alibi": "fails with a static cache in transformers itself",
    "llama-dynamic": "compiles by length",
    "phi3-longrope": "drops its cache at the trained length, with torch.compile alone too: a test of its own, below",
}
SHORT = 5
"""Tokens of a prompt within the window of 8: generation crosses it."""


def _marked(name: str, quick: tuple[str, ...]) -> Any:
    return pytest.param(ROWS[name], id=name, marks=[] if name in quick else pytest.mark.slow)


def _graphs(row: Architecture, length: int, counts: Sequence[int], settings: dict[str, Any]) -> list[int]:
    """Graphs compiled so far after each of some generations, every one compared with the plain model's."""
    calls = CountedGraphs()
    plain, model = row.build(), grape_compile(row.build(), backend=calls)
    ids, mask = prompt(row, (0, 2), length)
    found = []
    for tokens in counts:
        calls.reset()
        new = generated(model, ids, mask, tokens=tokens, max_cache_len=64, **settings)
        assert calls.rotated + calls.attended == tokens * row.sites, "every token through every operator"
        assert (
            new.tolist() == generated(plain, ids, mask, tokens=tokens, max_cache_len=64, **settings).tolist()
        )
        found.append(calls.graphs)
    assert report(model).refusals == (), str(report(model))
    return found


@pytest.mark.parametrize(
    "row", [_marked(row.name, ("llama", "bloom")) for row in CACHED if row.name not in LEFT_OUT]
)
@pytest.mark.timeout(600)
def test_a_static_cache_compiles_the_prompt_and_one_token(row: Architecture) -> None:
    assert _graphs(row, 10, (8, 32), STATIC) == [2, 2]


@pytest.mark.parametrize("row", [_marked(name, ("mistral",)) for name in ("mistral", "gemma3", "gpt_oss")])
@pytest.mark.timeout(600)
def test_a_static_cache_past_the_window(row: Architecture) -> None:
    # The prompt, a token while the window fills, a token when it is full.
    assert _graphs(row, SHORT, (8, 32), STATIC) == [3, 3]


@pytest.mark.parametrize(
    "row",
    [
        _marked(row.name, ("gptj", "mpt"))
        for row in CACHED
        if row.name == "falcon-alibi" or row.name not in LEFT_OUT
    ],
)
@pytest.mark.timeout(600)
def test_a_growing_cache_compiles_a_bounded_number_of_graphs(row: Architecture) -> None:
    few, many = _graphs(row, SHORT, (12, 32), {})
    assert many == few <= (5 if row.name in ("mistral", "gemma3", "gpt_oss") else 3)


@pytest.mark.parametrize("row", [_marked(name, ("llama",)) for name in ("llama", "bloom", "gemma3")])
@pytest.mark.timeout(600)
def test_the_compile_transformers_puts_around_a_token_takes_nothing_away(row: Architecture) -> None:
    """On an accelerator `generate` compiles the decoding step by itself; the graphs in it stay ours."""
    calls, taken = CountedGraphs(), CountedGraphs()
    plain, model = row.build(), grape_compile(row.build(), backend=calls)
    config = CompileConfig(backend=taken, mode=None)
    config._compile_all_devices = True
    ids, mask = prompt(row, (0, 2))
    found = generated(model, ids, mask, compile_config=config, **STATIC)
    assert found.tolist() == generated(plain, ids, mask, **STATIC).tolist()
    assert calls.rotated + calls.attended == NEW_TOKENS * row.sites
    assert (calls.graphs, taken.graphs) == (2, 0)


@pytest.mark.parametrize("row", [_marked(row.name, ("mpt",)) for row in CACHED if row.name not in LEFT_OUT])
@pytest.mark.parametrize("settings", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.timeout(600)
def test_beams_reorder_the_cache(row: Architecture, settings: dict[str, Any]) -> None:
    few, many = _graphs(row, 10, (6, 12), {"num_beams": 3, **settings})
    assert many == few <= 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, STATIC, {"num_beams": 3}], ids=["growing", "static", "beams"])
@pytest.mark.timeout(600)
def test_a_model_that_drops_its_cache_compiles_as_often_as_with_torch(settings: dict[str, Any]) -> None:
    """Past the trained length Phi-3 computes all anew and goes on with a cache of its own; then nothing is compiled."""
    row, counts = ROWS["phi3-longrope"], (8, 32, 32)
    alone = CountedGraphs()
    plain = row.build()
    plain.compile(backend=alone)
    ids, mask = prompt(row, (0, 2), 10)
    with_torch = []
    for tokens in counts:
        generated(plain, ids, mask, tokens=tokens, max_cache_len=64, **settings)
        with_torch.append(alone.graphs)
    torch.compiler.reset()  # the limit of recompilations is of the code, which both run
    found = _graphs(row, 10, counts, settings)
    assert found == with_torch
    assert found[1] == found[2]


@pytest.mark.parametrize("row", [_marked(name, ("llama",)) for name in ("llama", "bloom", "gptj")])
@pytest.mark.timeout(600)
def test_further_prompts_of_other_lengths_add_one_graph(row: Architecture) -> None:
    """The second length makes the prompt's graph symbolic; from then on nothing is compiled any more."""
    calls = CountedGraphs()
    plain, model = row.build(), grape_compile(row.build(), backend=calls)
    counts = []
    for length in (7, 10, 13, 9):
        ids, mask = prompt(row, (0, 2), length)
        calls.reset()
        found = generated(model, ids, mask, max_cache_len=64, **STATIC)
        assert found.tolist() == generated(plain, ids, mask, max_cache_len=64, **STATIC).tolist()
        assert calls.rotated + calls.attended == NEW_TOKENS * row.sites
        counts.append(calls.graphs)
    assert counts == [2, 3, 3, 3]
