"""Half precision, mixed precision, autocast: all sites found, outputs and gradients within the error contract."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from architectures import BY_NAME, output_of
from torch import Tensor, nn

from benchmarks.coverage.arguments import Inputs
from benchmarks.coverage.oracle import measured
from grape_compile import grape_compile, report

NAMES = ("llama", "gptj", "gpt_oss", "bloom", "mpt", "phi", "deepseek_v3")
WAYS = ("float16", "bfloat16", "norms in float32", "autocast")
QUICK = {("llama", "float16"), ("gpt_oss", "bfloat16"), ("gptj", "norms in float32"), ("bloom", "autocast")}


def prepared(name: str, way: str) -> nn.Module:
    """A model with the parameters in the type of the way; norms may keep theirs."""
    model = BY_NAME[name].build()
    if way == "autocast":
        return model
    model.to(torch.float16 if way == "float16" else torch.bfloat16)
    for part in model.modules():
        if way == "norms in float32" and "norm" in type(part).__name__.lower():
            part.float()
    return model


@contextmanager
def around(way: str) -> Iterator[None]:
    """Types that differ need autocast to meet."""
    with torch.autocast("cpu", torch.bfloat16, enabled=way in ("autocast", "norms in float32")):
        yield


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in QUICK else pytest.mark.slow)
        for name in NAMES
        for way in WAYS
    ],
)
def test_precisions_below_float32(name: str, way: str) -> None:
    row = BY_NAME[name]
    model = prepared(name, way)
    ours = grape_compile(copy.deepcopy(model), backend="eager")

    def run(each: nn.Module, plain: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        each.zero_grad()
        with around(way):
            output = output_of(each(**inputs))
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
        torch.autograd.backward(output, cotangent)
        # One vector: of a bias of two numbers alone, half precision leaves noise.
        attention = [p.grad for name, p in each.named_parameters() if "att" in name and p.grad is not None]
        return {"output": output.detach(), "gradients": torch.cat([each.flatten() for each in attention])}

    def compiled() -> nn.Module:
        plain = copy.deepcopy(model)
        plain.compile(backend="eager")
        return plain

    verdict = measured(ours, model, model, row.inputs(), run, torch.bfloat16, compiled)
    assert verdict["oracle"] == "fp64"
    assert verdict["holds"], str(verdict)
    found = report(ours)
    assert len(found.sites) == row.rotations + row.biases, str(found)
    assert found.refusals == ()
