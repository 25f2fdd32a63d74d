"""Through every door the same sites, no refusals, and outputs and gradients within the error contract."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import BY_NAME, Architecture, Logits, draw_parameters
from measuring import SEEDS, Deviation, InDouble, bound, in_double
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from grape_compile import grape_compile, inspect, report, rewrite
from grape_compile.reporting import Report

ROWS = [BY_NAME[name] for name in ("llama", "gptj", "bloom", "mpt", "deepseek_v3", "gpt_oss", "phi")]


@dataclass(frozen=True)
class Entered:
    """What comes out of a door, what torch alone gives there, and the report, which may wait for the first run."""

    ours: nn.Module
    torchs: nn.Module
    found: Callable[[], Report]


@dataclass(frozen=True)
class Door:
    """How a model becomes something that runs; all that comes out shares its parameters."""

    name: str
    enter: Callable[[nn.Module, Tensor], Entered]


def through_export(
    model: nn.Module,
    ids: Tensor,
    *,
    strict: bool = False,
    dynamic: bool = False,
    before: bool = False,
    after: bool = False,
) -> Entered:
    shapes: Any = ({0: Dim("batch", min=2, max=8), 1: Dim("length", min=4, max=64)},) if dynamic else None
    exported: ExportedProgram = torch.export.export(model, (ids,), dynamic_shapes=shapes, strict=strict)
    if before:
        exported = exported.run_decompositions()
    program, found = rewrite(exported)
    if after:
        program = program.run_decompositions()
    return Entered(program.module(), exported.module(), lambda: found)


def through_compile(model: nn.Module, ids: Tensor, **options: Any) -> Entered:
    compiled: nn.Module = grape_compile(Logits(model.get_submodule("model")), backend="eager", **options)
    return Entered(compiled, model, lambda: report(compiled))


DOORS = [
    Door("export", through_export),
    Door("export, strict", functools.partial(through_export, strict=True)),
    Door("export, dynamic", functools.partial(through_export, dynamic=True)),
    Door("export, strict and dynamic", functools.partial(through_export, strict=True, dynamic=True)),
    Door("export, decomposed", functools.partial(through_export, before=True)),
    Door("export, dynamic and decomposed", functools.partial(through_export, dynamic=True, before=True)),
    Door("export, decomposed afterwards", functools.partial(through_export, dynamic=True, after=True)),
    Door("compile, static", functools.partial(through_compile, dynamic=False)),
    Door("compile, dynamic", functools.partial(through_compile, dynamic=True, fullgraph=True)),
    Door("compile", functools.partial(through_compile, fullgraph=True)),
]
LEAN = {"export, strict and dynamic", "export, dynamic and decomposed", "compile, dynamic"}
CASES = [
    pytest.param(
        row,
        door,
        marks=[] if row.name in ("llama", "bloom") or door.name in LEAN else pytest.mark.slow,
        id=f"{row.name}-{door.name}",
    )
    for row in ROWS
    for door in DOORS
]


@functools.cache
def told_by_inspect(row: Architecture) -> Counter[tuple[str, str]]:
    """Kinds and encodings of the sites, each as often as it is met."""
    return summary(inspect(Logits(row.build()), (row.inputs()["input_ids"],)))


def summary(found: Report) -> Counter[tuple[str, str]]:
    return Counter((site.kind, str(site.encoding)) for site in found.sites)


def run(model: nn.Module, leaves: list[nn.Parameter], ids: Tensor, seed: int, trains: bool) -> list[Tensor]:
    """The output, then the gradients of the leaves for a random cotangent."""
    with torch.set_grad_enabled(trains):
        output: Tensor = model(ids)
    if not trains:
        return [output]
    for leaf in leaves:
        leaf.grad = None
    generator = torch.Generator().manual_seed(seed)
    torch.autograd.backward(output, torch.randn(output.shape, generator=generator).to(output.dtype))
    found = [torch.zeros(()) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    return [output.detach(), *found]


def trains(model: nn.Module, ids: Tensor) -> bool:
    """Whether torch can go back through what it made: not where experts were decomposed into copies."""
    try:
        torch.autograd.backward(model(ids).sum())
    except RuntimeError as failure:
        if "is not implemented" not in str(failure):
            raise
        return False
    return True


def assert_contract(row: Architecture, plain: nn.Module, torchs: nn.Module, ours: nn.Module) -> None:
    """Errors against the oracle at most 1.25 times those of the plain model and of torch alone."""
    ways = (plain, torchs, ours)
    errors = [[Deviation(), Deviation()] for _ in ways]
    apart = Deviation()
    parameters = [each for each in plain.parameters() if each.requires_grad]
    trained = trains(torchs, row.inputs()["input_ids"])
    for seed in SEEDS:
        ids: Tensor = row.inputs(seed=seed)["input_ids"]
        draw_parameters(plain, seed)
        wide = Logits(in_double(plain.get_submodule("model")))
        with InDouble():
            wanted = run(wide, [each for each in wide.parameters() if each.requires_grad], ids, seed, trained)
        found = [run(way, parameters, ids, seed, trained) for way in ways]
        smallest = 1e-12 * max((float(each.square().mean()) for each in wanted[1:]), default=0.0)
        for way, own in zip(errors, found, strict=True):
            way[0].add(own[0], wanted[0])
        for place, reference in enumerate(wanted[1:], 1):
            size = float(reference.square().mean())
            if size > smallest:
                for way, own in zip(errors, found, strict=True):
                    way[1].add(own[place], reference, 1 / (size * reference.numel()))
                apart.add(found[2][place], found[1][place].double(), 1 / (size * reference.numel()))
    for theirs, alone, own in list(zip(*errors, strict=True))[: 2 if trained else 1]:
        assert own.relative <= bound([theirs.relative, alone.relative])
    # A strict export of BLOOM loses gradients; what torch leaves of them is left.
    assert not trained or apart.relative <= 1e-4


@pytest.mark.parametrize(("row", "door"), CASES)
def test_the_same_sites_and_the_same_numbers(row: Architecture, door: Door) -> None:
    plain = Logits(row.build())
    entered = door.enter(plain, row.inputs()["input_ids"])
    assert_contract(row, plain, entered.torchs, entered.ours)
    found = entered.found()
    assert summary(found) == told_by_inspect(row), str(found)
    assert found.refusals == ()


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_every_door_names_the_modules(name: str) -> None:
    """The module a site belongs to, as the model itself calls it."""
    row = BY_NAME[name]
    ids = row.inputs()["input_ids"]
    told = []
    for door in DOORS:
        if door.name in ("export, strict", "export, dynamic", "compile"):
            entered = door.enter(Logits(row.build()), ids)
            entered.ours(ids)
            told.append(Counter(site.module for site in entered.found().sites))
    modules = {name for name, _ in Logits(row.build()).named_modules()}
    assert all(names.keys() <= modules for names in told)
    assert told[0] == told[1] == told[2]
