"""Rows of which a mask hides every key, left padding under a causal mask: what the model computes there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grape_compile

BATCH, TOKENS, HEADS, SIZE = 2, 12, 4, 8


class Filled(nn.Module):
    """ALiBi by hand; what hides keys is filled, in one mask or two, or added."""

    slopes: Tensor

    def __init__(self, kind: str, number: float) -> None:
        super().__init__()
        self.kind, self.number = kind, number
        self.project = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1.0))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.project(x).view(batch, tokens, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        place = torch.arange(tokens, device=x.device)
        bias = self.slopes[:, None, None] * (place - place[:, None])
        scores = query @ key.transpose(-1, -2) / SIZE**0.5
        later, padded = place[:, None] < place, ~kept[:, None, None, :]
        if self.kind == "once":
            scores = (scores + bias).masked_fill(later | padded, self.number)
        elif self.kind == "twice":
            scores = (scores + bias).masked_fill(later, self.number).masked_fill(padded, self.number)
        elif self.kind == "two kinds":
            scores = (scores + bias).masked_fill(padded, self.number).masked_fill(later, -torch.inf)
        elif self.kind == "raised":
            scores = (scores + bias).masked_fill(later | padded, -torch.inf)
            scores = torch.max(scores, torch.tensor(self.number))
        elif self.kind == "below":
            scores = torch.where(later | padded, self.number, scores) + bias
        elif self.kind == "added":
            scores = scores + (bias + torch.where(later | padded, self.number, 0.0))
        else:
            scores = scores + bias.masked_fill(later | padded, self.number)
        output: Tensor = scores.softmax(-1) @ value
        return output.transpose(1, 2).reshape(batch, tokens, -1)


LOWEST = torch.finfo(torch.float32).min
FOUND = [
    *((kind, number) for kind in ("once", "twice") for number in (LOWEST, -1e9, -1e4)),
    *(("below", LOWEST), ("added", LOWEST), ("added", -1e4), ("in the bias", LOWEST)),
]


def inputs() -> tuple[Tensor, Tensor]:
    kept = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    kept[0, :5] = False
    return torch.randn(BATCH, TOKENS, HEADS * SIZE, generator=torch.Generator().manual_seed(1)), kept


@pytest.mark.parametrize("differentiates", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("kind", "number"), FOUND)
def test_a_row_without_keys_is_that_of_the_model(kind: str, number: float, differentiates: bool) -> None:
    torch.manual_seed(0)
    model = Filled(kind, number)
    compiled = grape_compile.grape_compile(model, backend="eager")
    x, kept = inputs()
    with torch.set_grad_enabled(differentiates):
        compiled(x, torch.ones_like(kept))
        theirs, ours = model(x, kept), compiled(x, kept)
    assert len(grape_compile.report(compiled).sites) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if differentiates:
        weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
        one, two = (
            torch.autograd.grad((each * weights).sum(), list(model.parameters())) for each in (theirs, ours)
        )
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "number"),
    [("below", -1e4), ("in the bias", -1e4), ("two kinds", -1e4), ("two kinds", LOWEST), ("raised", LOWEST)],
)
def test_a_number_that_scores_can_be_told_from_is_refused(kind: str, number: float) -> None:
    compiled = grape_compile.grape_compile(Filled(kind, number), backend="eager")
    compiled(*inputs())
    found = grape_compile.report(compiled)
    assert not found.sites
    assert any("whose keys are all hidden" in refusal.reason for refusal in found.refusals)
