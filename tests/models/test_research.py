"""Hand-written models that already are GRAPE are seen for what they are, and stay what they are."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measuring import bound, errors_of
from research import dense
from research.dense import Formula, dense_logits
from research.near_misses import NEAR_MISSES, NearMiss
from research.rows import LENGTH, RESEARCH_MODELS, ResearchModel
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report
from grape_compile.passes.site import Site

TESTS = Path(__file__).parents[1]
BY_NAME = {row.name: row for row in RESEARCH_MODELS}
EXACT = 1e-10

rows = pytest.mark.parametrize("row", RESEARCH_MODELS, ids=lambda row: row.name)
near_misses = pytest.mark.parametrize("row", NEAR_MISSES, ids=lambda row: row.name)


def of_kind(sites: tuple[Site, ...], kind: str) -> list[Site]:
    return [site for site in sites if site.kind == kind]


def ids_of(length: int = LENGTH, seed: int = 0) -> Tensor:
    ids: Tensor = RESEARCH_MODELS[0].inputs(seq=length, seed=seed)["input_ids"]
    return ids


# The models.


@rows
def test_a_model_is_its_formula(row: ResearchModel) -> None:
    """Each spelling against dense loops over the same weights, logits and gradients, in float64.

    The tolerance is that of frequencies kept in float32: 12 positions times half a rounding, 6e-8.
    """
    model, ids = row.build().double(), ids_of(13)
    other = copy.deepcopy(model)
    found, wanted = model(ids), dense_logits(other, ids, row.formula)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    torch.autograd.backward(found, cotangent)
    torch.autograd.backward(wanted, cotangent)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max(), name


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("fox-nanogpt", dense.forgetting(inclusive=False)),
        ("fox-exclusive_by_pad", dense.forgetting()),
        ("fox-rope", dense.forgetting()),
        ("gate_qk-before_norm", dense.gated(query=True, key=True, norm="after")),
        ("gate_qk", dense.gated(query=True, key=True, unit=True)),
        ("contextual", dense.contextual(dense.NEIGHBOURS)),
        ("learned-orthogonal", dense.learned_spectrum(dense.HALVES)),
        ("path-total_minus_cumulative", dense.path(dense.PATH_HALVES, normalised="both")),
        ("path-heads_last", dense.path(dense.PATH_NEIGHBOURS)),
        ("alibi-before_scaling", dense.linear()),
        ("alibi-both_ways", dense.linear()),
        ("planar-euclidean", dense.two_slopes_of_places),
    ],
)
def test_another_formula_is_told_apart(name: str, wrong: Formula) -> None:
    model, ids = BY_NAME[name].build().double(), ids_of(13)
    assert (model(ids) - dense_logits(model, ids, wrong)).abs().max() > 1e-2


# What is found in them.


@rows
def test_every_site_is_found_and_named(row: ResearchModel) -> None:
    found = inspect(row.build(), (ids_of(),))
    assert found.refusals == (), str(found)
    rotations, biases = of_kind(found.sites, "rotation"), of_kind(found.sites, "bias")
    assert (len(rotations), len(biases)) == (row.rotations, row.biases), str(found)
    for sites, texts in ((rotations, row.rotation_text), (biases, row.bias_text)):
        for site in sites:
            assert all(text in str(site.encoding) for text in texts), f"{site.encoding}, not {texts}"


@rows
def test_the_error_contract(row: ResearchModel) -> None:
    assert_within_the_contract(row, training=False)


@pytest.mark.parametrize(
    "name",
    [
        "fox-nanogpt",
        "fox-float_mask",
        "gate_qk-before_norm",
        "phase_bias",
        "contextual",
        "learned-orthogonal",
        "path-rope",
        "alibi-baddbmm",
        "planar-two_slopes",
    ],
)
def test_the_error_contract_in_training(name: str) -> None:
    assert_within_the_contract(BY_NAME[name], training=True)


def assert_within_the_contract(row: ResearchModel, *, training: bool) -> None:
    """Logits, and every parameter's gradient for random cotangents, over three draws of weights and tokens."""
    compiled = grape_compile(row.build().train(training), backend="eager")
    ways = {"original": row.build().train(training), "compiled": compiled}
    errors = errors_of(row, ways, oracle=row.build().train(training))
    original, rewritten = errors["original"], errors["compiled"]
    assert rewritten.logits.relative <= bound([original.logits.relative])
    assert rewritten.gradients.relative <= bound([original.gradients.relative])
    assert len(report(compiled).sites) == row.sites, str(report(compiled))


MEASURE = """
import sys
import torch
from research.rows import RESEARCH_MODELS
from grape_compile import grape_compile, report

torch.set_num_threads(1)

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":")) / 1024

name, way, backward = sys.argv[1:]
row = next(row for row in RESEARCH_MODELS if row.name == name)
model = row.build()
if way == "compiled":
    model = grape_compile(model, backend="eager", dynamic=False)
ids = row.inputs(batch=1, seq=4096)["input_ids"]

def once():
    with torch.set_grad_enabled(backward == "yes"):
        logits = model(ids)
        if backward == "yes":
            logits.backward(torch.ones_like(logits))

once()  # compiles, and touches what stays
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = resident("VmRSS")
once()
print(resident("VmHWM") - before)
"""


def peak_of(*arguments: str) -> float:
    """MiB above what was resident before, in a process of its own."""
    program = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{MEASURE}"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("backward", ["no", "yes"], ids=["forward", "and_backward"])
@pytest.mark.parametrize("name", ["fox-softplus", "path-total_minus_cumulative"])
def test_peak_memory(name: str, backward: str) -> None:
    """A quarter of the original's peak at 4096 tokens, whose one matrix of scores is 256 MiB."""
    original, compiled = (peak_of(name, way, backward) for way in ("original", "compiled"))
    assert original >= 256
    assert 0 < compiled <= original / 4


# What comes near.


def outputs(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    found = model(ids)
    return found if isinstance(found, tuple) else (found,)


def near(found: Tensor, wanted: Tensor, noise: float = 0.0) -> bool:
    """Equal but for rounding; `noise` is what a number that vanishes in exact arithmetic may be."""
    return bool((found - wanted).abs().max() <= EXACT * wanted.abs().max() + noise)


@near_misses
def test_a_near_miss_is_named_rightly_or_not_at_all(row: NearMiss) -> None:
    found = inspect(built(row), (ids_of(),))
    if row.refused:
        assert of_kind(found.sites, "bias") == [], str(found)
    for site in found.sites:
        assert not any(text in str(site.encoding) for text in row.never), str(site.encoding)
        assert site.error is not None
        assert site.error < 1e-9


@near_misses
@pytest.mark.parametrize(
    "dynamic", [True, pytest.param(None, marks=pytest.mark.slow)], ids=["dynamic", "by need"]
)
def test_a_near_miss_stays_what_it_is(row: NearMiss, dynamic: bool | None) -> None:
    """Outputs and gradients in float64, at the length of the first call, again, and at a longer one."""
    plain = built(row).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager", dynamic=dynamic)
    for length in (LENGTH, LENGTH, 40):
        wanted, found = outputs(plain, ids_of(length)), outputs(compiled, ids_of(length))
        assert len(found) == len(wanted)
        assert all(map(near, found, wanted))
        cotangent = torch.randn(wanted[0].shape, dtype=wanted[0].dtype)
        for model, logits in ((plain, wanted[0]), (compiled, found[0])):
            model.zero_grad()
            torch.autograd.backward(logits, cotangent)
        gradients = [each.grad for each in plain.parameters() if each.grad is not None]
        # What the softmax does not see (a constant of each row) has a gradient of roundings of the others.
        noise = 1e-14 * max(float(gradient.abs().max()) for gradient in gradients)
        for (name, mine), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            assert mine.grad is None or theirs.grad is None or near(mine.grad, theirs.grad, noise), name


def test_a_dropout_that_drops_keeps_its_draws() -> None:
    """In training the weights that are dropped are those the model draws: nothing may be fused over them."""
    plain = built(next(row for row in NEAR_MISSES if row.name == "dropping")).double().train()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    drawn = []
    for model in (plain, compiled):
        torch.manual_seed(5)
        drawn.append(model(ids_of()))
    assert near(drawn[1], drawn[0])
    assert of_kind(report(compiled).sites, "bias") == []


def built(row: NearMiss) -> nn.Module:
    """The model of a row in eval mode, its matrices drawn so that attention is sharp."""
    model = row.make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model
