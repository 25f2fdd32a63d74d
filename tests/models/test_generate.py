"""Greedy generation: the same tokens as the plain model, for one prompt and for a padded batch."""

import pytest
import torch
from architectures import ENCODED, Architecture
from measuring import GrapeCalls
from torch import Tensor, nn

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


def generated(model: nn.Module, ids: Tensor, mask: Tensor, *, cache: bool = True) -> Tensor:
    generate = model.generate
    assert callable(generate)
    tokens: Tensor = generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=cache
    )
    return tokens


def prompt(row: Architecture, paddings: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch whose rows begin with so many padding tokens."""
    ids: Tensor = row.inputs(batch=len(paddings), seq=10)["input_ids"]
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
    wanted = generated(plain, ids, mask, cache=False)
    assert generated(model, ids, mask, cache=False).tolist() == wanted.tolist()
