"""One mathematics, many spellings: every one is found, named alike and equal to itself."""

import copy

import pytest
import torch
from attention_layers import example, sharpen
from bias_spellings import BIAS_SPELLINGS, BiasSpelling
from detour_spellings import DETOUR_SPELLINGS
from layer_spellings import LAYER_SPELLINGS
from library_spellings import LIBRARY_SPELLINGS
from matrix_spellings import MATRIX_SPELLINGS
from measuring import GrapeCalls
from place_spellings import PLACE_SPELLINGS
from rotation_spellings import ROTATION_SPELLINGS, Spelling
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report, rewrite
from grape_compile.encoding import Bias, Rotation

ROTATIONS = (
    *(*ROTATION_SPELLINGS, *DETOUR_SPELLINGS, *MATRIX_SPELLINGS),
    *(*LAYER_SPELLINGS, *PLACE_SPELLINGS, *LIBRARY_SPELLINGS),
)
rotations = pytest.mark.parametrize("spelling", ROTATIONS, ids=lambda row: row.name)
growing = pytest.mark.parametrize(
    "spelling", [row for row in ROTATIONS if row.grows], ids=lambda row: row.name
)
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


def in_double(spelling: Spelling, length: int) -> tuple[Tensor, ...]:
    return tuple(each.double() if each.is_floating_point() else each for each in spelling.inputs(length))


@rotations
def test_a_rotation_is_found_and_named(spelling: Spelling) -> None:
    found = inspect(sharpen(spelling.make()), spelling.inputs(12))
    assert found.refusals == (), str(found)
    assert len(found.sites) == spelling.rotations, str(found)
    for site in found.sites:
        assert isinstance(site.encoding, Rotation)
        assert spelling.planes is None or str(site.encoding.planes) == spelling.planes
        assert site.encoding.orientation == spelling.orientation
        assert spelling.proved is None or site.evidence == ("proved" if spelling.proved else "tables")


@rotations
def test_a_rotation_equals_itself(spelling: Spelling) -> None:
    """Also at a second length, where torch.compile turns to symbolic sizes."""
    plain = sharpen(spelling.make()).double()
    calls = GrapeCalls()
    compiled = grape_compile(copy.deepcopy(plain), backend=calls)
    lengths = (
        (12, 17)
        if spelling.grows and spelling not in (*ROTATION_SPELLINGS, *DETOUR_SPELLINGS, *MATRIX_SPELLINGS)
        else (12,)
    )
    for length in lengths:
        inputs = in_double(spelling, length)
        calls.reset()
        torch.testing.assert_close(compiled(*inputs), plain(*inputs), rtol=EXACT, atol=EXACT)
        assert (calls.rotated, calls.attended) == (spelling.rotations, 0), str(report(compiled))


@growing
def test_a_rotation_exported_for_any_length(spelling: Spelling) -> None:
    plain = sharpen(spelling.make()).double()
    inputs = in_double(spelling, 12)
    shapes = [
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(short.shape) if long.shape[axis] != size}
        for short, long in zip(inputs, in_double(spelling, 13), strict=True)
    ]
    x, *places = shapes
    given = (
        {"x": x, "places": tuple(places)}
        if places and "other" not in plain.forward.__annotations__
        else shapes
    )
    program = torch.export.export(copy.deepcopy(plain), inputs, dynamic_shapes=given, strict=False)
    rewritten, found = rewrite(program)
    assert (len(found.sites), found.refusals) == (spelling.rotations, ()), str(found)
    for length in (12, 17):
        inputs = in_double(spelling, length)
        torch.testing.assert_close(rewritten.module()(*inputs), plain(*inputs), rtol=EXACT, atol=EXACT)


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
