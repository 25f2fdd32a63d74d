"""One mathematics, many spellings: every one is found, named alike and equal to itself."""

import copy

import pytest
import torch
from attention_layers import example, sharpen
from bias_spellings import BIAS_SPELLINGS, BiasSpelling
from measuring import GrapeCalls
from rotation_spellings import ROTATION_SPELLINGS, Spelling
from torch import nn

from grape_compile import grape_compile, inspect, report
from grape_compile.encoding import Bias, Rotation

rotations = pytest.mark.parametrize("spelling", ROTATION_SPELLINGS, ids=lambda row: row.name)
biases = pytest.mark.parametrize("spelling", BIAS_SPELLINGS, ids=lambda row: row.name)
EXACT = 1e-10


def assert_rewritten_exactly(layer: nn.Module, *, rotated: int, attended: int) -> None:
    plain = sharpen(layer).double()
    calls = GrapeCalls()
    compiled = grape_compile(copy.deepcopy(plain), backend=calls)
    x = example().double()
    wanted = plain(x)
    assert (compiled(x) - wanted).abs().max() <= EXACT * wanted.abs().max()
    assert (calls.rotated, calls.attended) == (rotated, attended), str(report(compiled))


@rotations
def test_a_rotation_is_found_and_named(spelling: Spelling) -> None:
    found = inspect(sharpen(spelling.make()), (example(),))
    assert found.refusals == (), str(found)
    assert len(found.sites) == spelling.rotations, str(found)
    for site in found.sites:
        assert isinstance(site.encoding, Rotation)
        assert str(site.encoding.planes) == spelling.planes
        assert site.encoding.orientation == spelling.orientation


@rotations
def test_a_rotation_equals_itself(spelling: Spelling) -> None:
    assert_rewritten_exactly(spelling.make(), rotated=spelling.rotations, attended=0)


@biases
def test_a_bias_is_found_and_named(spelling: BiasSpelling) -> None:
    found = inspect(sharpen(spelling.make()), (example(),))
    assert found.refusals == (), str(found)
    assert len(found.sites) == 1, str(found)
    assert isinstance(found.sites[0].encoding, Bias)


@biases
def test_a_bias_equals_itself(spelling: BiasSpelling) -> None:
    assert_rewritten_exactly(spelling.make(), rotated=0, attended=1)


@pytest.mark.parametrize("spelling", [ROTATION_SPELLINGS[0], BIAS_SPELLINGS[0]], ids=lambda row: row.name)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_sequences(spelling: Spelling | BiasSpelling, length: int) -> None:
    """At T = 1 every cosine is 1 and every sine is 0, whatever the frequencies."""
    plain = sharpen(spelling.make()).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    x = example(length).double()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "complex_product", "distance_then_masked_fill", "sliding_window"])
def test_gradients(name: str) -> None:
    spellings: dict[str, Spelling | BiasSpelling] = {row.name: row for row in ROTATION_SPELLINGS}
    spellings |= {row.name: row for row in BIAS_SPELLINGS}
    plain = sharpen(spellings[name].make()).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    cotangent = example(seed=1).double()
    gradients = []
    for layer in (plain, compiled):
        x = example().double().requires_grad_()
        torch.autograd.backward(layer(x), cotangent)
        assert x.grad is not None
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["angles_learned", "learned_slopes"])
def test_gradients_of_a_learned_encoding(name: str) -> None:
    """A frequency or a slope that is trained keeps its gradient through the operator."""
    rows: dict[str, Spelling | BiasSpelling] = {row.name: row for row in ROTATION_SPELLINGS}
    rows |= {row.name: row for row in BIAS_SPELLINGS}
    plain = sharpen(rows[name].make()).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    for layer in (plain, compiled):
        torch.autograd.backward(layer(example().double()), example(seed=1).double())
    wanted = {key: p.grad for key, p in plain.named_parameters()}
    found = {key: p.grad for key, p in compiled.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
