"""Nothing is ever rewritten into something else than itself: encodings with one thing wrong."""

import copy

import bias_mutants
import pytest
import rotation_mutants
import torch
from attention_layers import RotaryAttention, example, sharpen
from bias_mutants import BIAS_MUTANTS, BiasMutant
from measuring import GrapeCalls
from rotation_mutants import ROTATION_MUTANTS, RotationMutant
from scaled_mutants import SCALED_MUTANTS
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report
from grape_compile.encoding import Geometric, Rotation, Scaled, Steps
from grape_compile.passes.site import Site

Mutant = RotationMutant | BiasMutant
ROTATIONS = (*ROTATION_MUTANTS, *SCALED_MUTANTS)
EXACT = 1e-10


def name_of(mutant: Mutant) -> str:
    return mutant.name


def outputs(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    found = layer(x)
    return found if isinstance(found, tuple) else (found,)


def is_ordinary(site: Site) -> bool:
    """Whether the site claims a spectrum in closed form at the positions 0, 1, 2, ..."""
    encoding = site.encoding
    return (
        isinstance(encoding, Rotation)
        and isinstance(encoding.clock, Steps)
        and isinstance(encoding.spectrum, Geometric | Scaled)
    )


def assert_equal_in_double(
    layer: nn.Module, *, lengths: tuple[int, ...], dynamic: bool | None = None
) -> None:
    """The compiled layer computes what the layer computes, to rounding in float64, at every length."""
    plain = layer.double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager", dynamic=dynamic)
    for length in lengths:
        x = example(length).double()
        for found, wanted in zip(outputs(compiled, x), outputs(plain, x), strict=True):
            assert (found - wanted).abs().max().item() <= EXACT * wanted.abs().max().item()


@pytest.mark.parametrize("mutant", [*ROTATIONS, *BIAS_MUTANTS], ids=name_of)
def test_a_mutant_stays_what_it_is(mutant: Mutant) -> None:
    assert_equal_in_double(sharpen(mutant.make()), lengths=(12, 12, 20))


@pytest.mark.parametrize("mutant", [*ROTATIONS, *BIAS_MUTANTS], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_what_is_no_encoding_is_refused(mutant: Mutant, dtype: torch.dtype) -> None:
    found = inspect(sharpen(mutant.make()).to(dtype), (example().to(dtype),))
    if not mutant.refused:
        for site in found.sites:
            assert site.error is not None
            assert site.error < 1e-9
        return
    assert found.sites == ()
    assert found.refusals or not mutant.told, "left alone without a word"
    for refusal in found.refusals:
        assert len(refusal.reason.split()) >= 4, refusal.reason
        assert refusal.rule
        assert refusal.node


@pytest.mark.parametrize("mutant", ROTATIONS, ids=name_of)
def test_what_turns_otherwise_is_not_called_ordinary(mutant: RotationMutant) -> None:
    found = inspect(sharpen(mutant.make()), (example(),))
    assert sum(map(is_ordinary, found.sites)) <= mutant.ordinary, str(found)


@pytest.mark.parametrize("mutant", [*rotation_mutants.LATE_MUTANTS, *bias_mutants.LATE_MUTANTS], ids=name_of)
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "by need"])
def test_a_mutant_that_shows_beyond_the_captured_length(mutant: Mutant, dynamic: bool | None) -> None:
    assert_equal_in_double(sharpen(mutant.make()), lengths=(12, 40, 33), dynamic=dynamic)


def test_the_unmutated_layers_are_rewritten() -> None:
    """Without this, a detector that finds nothing would pass everything above."""
    rotation = RotaryAttention(rotation_mutants.turn, expose=True)
    biased = bias_mutants.added(bias_mutants.linear)()
    for layer, rotated, attended in ((rotation, 2, 0), (biased, 0, 1)):
        calls = GrapeCalls()
        compiled = grape_compile(sharpen(layer), backend=calls)
        compiled(example())
        assert (calls.rotated, calls.attended) == (rotated, attended), str(report(compiled))


def test_a_table_written_to_after_compilation() -> None:
    """What a buffer held when the graph was looked at says nothing about later."""
    layer = sharpen(bias_mutants.KeptTable())
    compiled = grape_compile(copy.deepcopy(layer), backend="eager")
    compiled(example())
    for each in (layer, compiled):
        table = each.get_buffer("table")
        table[..., 3] += 1.0
    torch.testing.assert_close(compiled(example()), layer(example()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mutant", SCALED_MUTANTS, ids=name_of)
def test_a_scale_by_position_is_refused_as_what_it_is(mutant: Mutant) -> None:
    """xPos is no rotation: the length of what it turns depends on the token."""
    found = inspect(sharpen(mutant.make()), (example(),))
    assert [refusal.rule for refusal in found.refusals] == ["orthogonal", "orthogonal"]
    assert all("depending on the token, as xPos does" in refusal.reason for refusal in found.refusals)
    assert all("not orthogonal" in refusal.reason for refusal in found.refusals)
