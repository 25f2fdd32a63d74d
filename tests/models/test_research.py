"""Hand-written models that already are GRAPE are seen for what they are, and stay what they are."""

import copy

import pytest
import torch
from research.dense import dense_logits
from research.rows import RESEARCH_MODELS, ResearchModel

rows = pytest.mark.parametrize("row", RESEARCH_MODELS, ids=lambda row: row.name)


@rows
def test_the_model_is_its_formula(row: ResearchModel) -> None:
    """Each spelling against dense loops over the same weights, logits and gradients, in float64.

    The tolerance is that of frequencies kept in float32: 12 positions times half a rounding, 6e-8.
    """
    model, ids = row.build().double(), row.inputs(seq=13)["input_ids"]
    dense = copy.deepcopy(model)
    found, wanted = model(ids), dense_logits(dense, ids, row.formula)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    torch.autograd.backward(found, cotangent)
    torch.autograd.backward(wanted, cotangent)
    for (name, mine), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max(), name
