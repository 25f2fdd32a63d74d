"""Run a program through `rewrite` and judge what came out: sites against truth, numbers against the original."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from measuring import Deviation, InDouble, bound
from torch import Tensor, nn

from generated import graphs
from generated.clocks import LIMIT
from generated.program import Loaded, Program, arguments, forget, load
from generated.spoils import VALUES
from generated.tally import Tally
from generated.truth import Truth, of_bias, of_side
from grape_compile import grape_compile, report, rewrite
from grape_compile.encoding import Geometric, Rotation, Scaled, Steps, Tables
from grape_compile.passes.site import Site
from grape_compile.reporting import Report

EXACT = 1e-10


class Unusable(Exception):
    """A program that does not run by itself: an edit or a spoil made no program of it."""


class Wrong(AssertionError):
    """What must never happen: another function, a site where there is none, or a site called what it is not."""


class Missed(AssertionError):
    """A site that was not found."""

    def __init__(self, message: str, tally: Tally) -> None:
        super().__init__(message)
        self.tally = tally


@dataclass
class Expected:
    """What the report must hold: `rotations` by planes, result and orientation; `optional` may be there or not."""

    rotations: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    biases: int = 0
    optional_rotations: int = 0
    optional_biases: int = 0
    near_misses: int = 0
    #: Near misses made by another value in the place of one: a rotation that is whole may stand before or behind it.
    around: int = 0


def expected(program: Program, loaded: Loaded) -> Expected:
    """Truth, measured on the program's own functions."""
    wanted = Expected()
    for name, side in program.sides.items():
        truth = of_side(program, loaded, name)
        if truth is Truth.TRUE:
            key = str(program.planes(side)), str(program.planes_out(side)), side.turn.orientation
            wanted.rotations[key] += 1
        elif program.spoil is None or program.spoil.part != name:
            raise AssertionError(
                f"a word that is not what it is said to be: {side.turn.name}\n{loaded.source}"
            )
        wanted.optional_rotations += truth is Truth.FREE
        wanted.near_misses += truth is Truth.FALSE
        wanted.around += truth is Truth.FALSE and program.spoil is not None and program.spoil.kind in VALUES
    if program.bias is not None:
        truth = of_bias(program, loaded)
        wanted.biases += truth is Truth.TRUE
        wanted.optional_biases += truth is Truth.FREE
        wanted.near_misses += truth is Truth.FALSE
    return wanted


def judge(program: Program) -> Tally:
    """Count what a program shows. Raises Unusable, Wrong or Missed; a missed site counts in the tally of the error."""
    loaded, usual = load(program), torch.get_default_dtype()
    # What the program makes itself is of its own type: in float64 every rounding is a float64 one.
    torch.set_default_dtype(program.dtype)
    try:
        return _judged(program, loaded)
    finally:
        torch.set_default_dtype(usual)
        forget(loaded)


def _judged(program: Program, loaded: Loaded) -> Tally:
    try:
        wanted = expected(program, loaded)
        model = drawn(loaded.model().eval())
        with _unwritten_is_no_number():
            output = model(*arguments(program, 2, program.length))
        if not output.isfinite().all():
            raise Unusable("what it computes are no numbers")
    except (RuntimeError, TypeError, IndexError, ValueError, NameError, AttributeError) as failure:
        raise Unusable(str(failure)) from failure
    found, original, rewritten, second = _through_door(program, model)
    tally = Tally(programs=1, near_misses=wanted.near_misses)
    tally.worst = _compared(program, model, original, rewritten, second)
    _count(tally, wanted, found)
    for site in found.sites:
        if isinstance(site.encoding, Rotation):
            _check_name(program, model, site)
    return tally


@contextmanager
def _unwritten_is_no_number() -> Iterator[None]:
    """Fill new memory, so that a program that reads what it never wrote is seen to compute no numbers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _through_door(program: Program, model: nn.Module) -> tuple[Report, nn.Module, nn.Module, bool]:
    """The report, what was rewritten and what it became, and whether both hold at other lengths."""
    args = arguments(program, 2, program.length)
    if program.door == "compile":
        torch.compiler.reset()
        compiled = grape_compile(copy.deepcopy(model), backend="eager", dynamic=program.dynamic or None)
        compiled(*args)
        return report(compiled), model, _Parameters(compiled, model), True
    shapes = None
    if program.dynamic:
        auto = torch.export.Dim.AUTO
        shapes = tuple(dict.fromkeys(range(min(value.dim(), 2)), auto) for value in args)
    try:
        exported = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
        exported = graphs.decomposed(exported, program.decomposed)
    except Exception as failure:
        raise Unusable(f"torch.export: {failure}") from failure
    if program.shuffle is not None:
        graphs.shuffle(exported, program.shuffle)
    rewritten, found = rewrite(exported)
    sizes = exported.graph.find_nodes(op="placeholder")[-1].meta["val"].shape
    free = program.dynamic and any(isinstance(size, torch.SymInt) for size in sizes)
    return found, _Parameters(exported.module(), model), _Parameters(rewritten.module(), model), free


class _Parameters(nn.Module):
    """A program or a compiled copy that is given the model's weights before each call."""

    def __init__(self, module: Any, model: nn.Module) -> None:
        super().__init__()
        self.module, self.model = module, [model]

    def forward(self, *args: Tensor) -> Tensor:
        own = dict(self.module.named_parameters())
        for name, value in self.model[0].named_parameters():
            if own[name].data_ptr() != value.data_ptr():
                own[name].data.copy_(value.data)
        result: Tensor = self.module(*args)
        return result


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the projections so that attention is sharp: a wrong angle must be seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                noise = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                module.weight.copy_(1.5 * noise / module.in_features**0.5)
    return model


def _compared(
    program: Program, model: nn.Module, original: nn.Module, rewritten: nn.Module, second: bool
) -> float:
    """The largest error as a part of what is allowed."""
    sizes = [(2, program.length)] + ([(3, program.length + 4)] if second else [])
    if program.dtype is torch.float64:
        worst = max(_exactly(program, original, rewritten, batch, length) for batch, length in sizes)
    else:
        worst = max(_by_contract(program, model, rewritten, batch, length) for batch, length in sizes)
    if not worst <= 1.0:
        raise Wrong(f"the rewritten program computes something else: {worst:.3g} times the error allowed")
    return worst


def _exactly(program: Program, original: nn.Module, rewritten: nn.Module, batch: int, length: int) -> float:
    """The largest difference as a part of what is allowed: EXACT, or ten times what the original's roundings make.

    How much those are is seen from the original itself, on an input that differs in the last digit.
    """
    args = arguments(program, batch, length, seed=length)
    try:
        wanted = _results(program, original, args)
    except RuntimeError as failure:  # torch has no derivative of aten::copy, which functionalising leaves
        raise Unusable(str(failure)) from failure
    worst = _furthest(_results(program, rewritten, args), wanted)
    if 1.0 < worst < float("inf"):
        signs = torch.randn(
            args[0].shape, generator=torch.Generator().manual_seed(2), dtype=args[0].dtype
        ).sign()
        nudged = args[0] * (1 + torch.finfo(args[0].dtype).eps * signs)
        worst /= max(1.0, 10 * _furthest(_results(program, original, (nudged, *args[1:])), wanted))
    return worst


def _results(program: Program, model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The output, and where the program asks for them the gradients of input and parameters."""
    if not program.gradients:
        with torch.no_grad():
            return [model(*args)]
    x = args[0].clone().requires_grad_()
    output = model(x, *args[1:])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    own = dict((model.module if isinstance(model, _Parameters) else model).named_parameters())
    inputs = [x, *(own[name] for name in sorted(own))]
    gradients = torch.autograd.grad(output, inputs, cotangent, allow_unused=True)
    return [output.detach(), *gradients]


def _furthest(found: list[Tensor | None], wanted: list[Tensor | None]) -> float:
    """The largest difference of results that belong together, in units of EXACT of their size."""
    # A gradient that is nothing beside the others is their rounding.
    noise = 1e-3 * max(float(each.abs().max()) for each in wanted if each is not None)
    worst = 0.0
    for other, plain in zip(found, wanted, strict=True):
        if plain is None:
            if other is None or float(other.abs().max()) == 0.0:
                continue
            plain = torch.zeros_like(other)
        other = torch.zeros_like(plain) if other is None else other
        worst = max(worst, _apart(other, plain, noise if len(wanted) > 1 else 0.0))
    return worst


def _apart(found: Tensor, wanted: Tensor, noise: float) -> float:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    size = max(float(wanted.abs().max()), noise, 1e-30)
    return float((found - wanted).abs().max()) / (EXACT * size)


def _by_contract(program: Program, model: nn.Module, rewritten: nn.Module, batch: int, length: int) -> float:
    """Relative root-mean-square error against float64, pooled over three draws; over thirty where it is close."""
    part = 0.0
    for draws in (3, 30):
        plain, ours = Deviation(), Deviation()
        for seed in range(draws):
            drawn(model, seed)
            args = arguments(program, batch, length, seed)
            wide = _widened(model)
            with torch.no_grad():
                torch.set_default_dtype(torch.float64)
                with InDouble():
                    reference = wide(*(arg.double() if arg.is_floating_point() else arg for arg in args))
                torch.set_default_dtype(program.dtype)
                plain.add(model(*args), reference)
                ours.add(rewritten(*args), reference)
        part = ours.relative / bound([plain.relative])
        if part <= 1.0:
            return part
    return part


def _widened(model: nn.Module) -> nn.Module:
    """A copy in float64, complex buffers included."""
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    copied = copy.deepcopy(model)
    copied._apply(lambda value: value.to(wider.get(value.dtype, value.dtype)))
    return copied


def _count(tally: Tally, wanted: Expected, found: Report) -> None:
    rotations = [site for site in found.sites if site.kind == "rotation"]
    biases = [site for site in found.sites if site.kind == "bias"]
    # That the program computes the same is known by now: what stands around a value is a rotation.
    inside = min(max(len(rotations) - wanted.rotations.total() - wanted.optional_rotations, 0), wanted.around)
    wanted.optional_rotations += inside
    wanted.near_misses -= inside
    tally.near_misses -= inside
    for sites, truths, optional in (
        (rotations, wanted.rotations.total(), wanted.optional_rotations),
        (biases, wanted.biases, wanted.optional_biases),
    ):
        tally.truths += truths
        tally.found += min(len(sites), truths)
        tally.free += min(max(len(sites) - truths, 0), optional)
        if len(sites) > truths + optional:
            raise Wrong(f"{len(sites)} sites where there are {truths} (and {optional} that may be):\n{found}")
    tally.refused += wanted.near_misses
    tally.told += wanted.near_misses if found.refusals else 0
    if tally.found < tally.truths:
        raise Missed(f"{tally.found} of {tally.truths} sites were found:\n{found}", tally)
    if wanted.optional_rotations == 0:
        told = Counter(map(_told, rotations))
        if not _agree(told, wanted.rotations):
            raise Wrong(f"rotations of other planes than {dict(wanted.rotations)}:\n{found}")


def _told(site: Site) -> tuple[str, str, int]:
    """Planes, result and orientation; 0 where sines or frequencies are read from a tensor, whatever their sign."""
    encoding = site.encoding
    assert isinstance(encoding, Rotation)
    named = isinstance(encoding.spectrum, Geometric | Scaled) and not isinstance(encoding.clock, Tables)
    orientation = encoding.orientation if named else 0
    return str(encoding.planes), str(encoding.output), orientation


def _agree(told: Counter[tuple[str, str, int]], wanted: Counter[tuple[str, str, int]]) -> bool:
    """Whether the rotations told are among those wanted; one by tables may be told of a view, [..., planes, 2] say."""
    return not Counter({key: count for key, count in told.items() if key[2]}) - wanted


def _check_name(program: Program, model: nn.Module, site: Site) -> None:
    """A spectrum in closed form at the positions 0, 1, 2, ... must be that of the model."""
    encoding = site.encoding
    assert isinstance(encoding, Rotation)
    if not isinstance(encoding.clock, Steps) or not isinstance(encoding.spectrum, Geometric | Scaled):
        return
    length = min(12, LIMIT - 4)
    given = model.angles(*arguments(program, 1, length))  # type: ignore[operator]  # a method of the program
    parts = [
        part.real if part.is_complex() else part for part in (given if isinstance(given, tuple) else (given,))
    ]
    frequencies = torch.tensor(encoding.spectrum.frequencies(program.shape.width // 2), dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    first = parts[0].reshape(length, -1)[:, : parts[0].shape[-1]].double()
    table = None if program.angles is None else program.angles.table
    form = "angle" if table is None else table.form
    if form == "wide":
        first_pair = encoding.planes.pairs()[0]
        halves = first_pair[1] - first_pair[0] > 1
        first = first[:, : first.shape[-1] // 2] if halves else first[:, ::2]
    if not torch.allclose(first.cos() if form == "angle" else first, angle.cos(), rtol=0, atol=1e-4):
        raise Wrong(f"called {encoding}, which has other angles than the model")
