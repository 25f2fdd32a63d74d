"""The doors a model goes through, one column of the table each.

| door | what happens |
|---|---|
| static | `inspect`, the shapes of the example |
| dynamic | `torch.export` with a symbolic sequence, `rewrite`, run at a longer sequence |
| compile | `grape_compile(backend="eager")`, forward without gradients |
| cache | the same, one token after a prefill of the plain model |
| training | the same, gradients of every parameter for a random cotangent |
| bf16 | the same, parameters in bfloat16 |
| generate | greedy generation with a cache from a left-padded batch; its forward passes are counted together |
| inductor | `grape_compile(backend="inductor")`, gradients in float32 and a forward pass in bfloat16, for a sample |

Each counts its own truth by running the original through the same inputs.
"""

from __future__ import annotations

import copy
import functools
import inspect as python_inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage.arguments import Inputs
from benchmarks.coverage.generation import Ran, compared, encoder_of, generated, prompt
from benchmarks.coverage.inputs import decoded, lengthened, sequence_axes
from benchmarks.coverage.oracle import Run, cast, live, measured, output_of
from benchmarks.coverage.truth import Count, counting
from grape_compile import grape_compile, inspect, report, rewrite
from grape_compile.reporting import Report

LONGER = 5
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A tiny model in eval mode, an input it runs on, and what it rotates and biases on it."""

    model: nn.Module
    inputs: Inputs
    truth: Count

    def fresh(self) -> nn.Module:
        """A copy that nothing has been done to."""
        return copy.deepcopy(self.model)


def static(case: Case) -> Outcome:
    """What `inspect` finds."""
    return _found(inspect(case.model, (), case.inputs), case.truth)


def dynamic(case: Case) -> Outcome:
    """What `rewrite` finds in a program exported for any length, run at a longer one."""
    axes = sequence_axes(case.inputs)
    if not axes:
        return {"skipped": "no input has a sequence of free length"}
    still = pytree.tree_map(lambda _: None, case.inputs)
    shapes = still | {name: {axis: torch.export.Dim.DYNAMIC} for name, axis in axes.items()}
    try:
        program = torch.export.export(case.fresh(), (), case.inputs, dynamic_shapes=shapes, strict=False)
    except Exception as failure:
        return {"skipped": f"torch.export refuses: {first_line(failure)}"}
    rewritten, found = rewrite(program)
    outcome = _found(found, case.truth)
    if not found.sites:
        return outcome
    plain = program.module()
    inputs = lengthened(case.inputs, LONGER)
    try:
        with torch.no_grad():
            case.fresh()(**inputs), plain(**inputs)
    except Exception:  # a length the model itself does not take
        inputs = case.inputs
    lengths = sorted({inputs[name].shape[axis] for name, axis in axes.items()})
    verdict = measured(
        rewritten.module(), case.fresh(), case.fresh(), inputs, _forward, compiled=lambda: plain
    )
    return outcome | {"lengths": lengths} | verdict


def compiled(case: Case) -> Outcome:
    """A forward pass through `torch.compile`, rewritten and run as it is."""
    return _through_compile(case, _forward)


def cache(case: Case) -> Outcome:
    """One more token after a prefill, the past kept in a cache."""
    accepted = python_inspect.signature(case.model.forward).parameters
    if "past_key_values" not in accepted or "input_ids" not in case.inputs:
        return {"skipped": "the model keeps no cache"}
    inputs = decoded(case.inputs)
    if inputs is None:
        return {"skipped": "no decoder of token ids"}
    model, decode = case.fresh(), _decode_its_own if "pixel_values" in inputs else _decode
    try:
        with torch.no_grad(), counting(model) as truth:
            filled = _prefilled(model, inputs)
            if decode is _decode:
                truth.rotations = truth.biases = 0
            output_of(_step(model, inputs, filled))
    except Exception as failure:
        return {"skipped": f"the original does not decode: {first_line(failure)}"}
    return _through_compile(Case(model, inputs, truth), decode)


def training(case: Case) -> Outcome:
    """Gradients of every parameter for a random cotangent of the output."""
    model = case.fresh().train()
    try:
        with counting(model) as truth:
            spent = copy.deepcopy(model)  # some keep the state of their last run
            _gradients(spent, spent, case.inputs)
    except Exception as failure:
        return {"skipped": f"the original does not train: {first_line(failure)}"}
    return _through_compile(Case(model, case.inputs, truth), _gradients)


def bf16(case: Case) -> Outcome:
    """A forward pass with parameters in bfloat16; buffers stay as a loaded checkpoint has them."""
    return _in_bf16(case, "eager")


def inductor(case: Case) -> Outcome:
    """Through Inductor: gradients in float32, then a forward pass in bfloat16."""
    outcome = _through_compile(case, _gradients, backend="inductor")
    torch.compiler.reset()
    half = _in_bf16(case, "inductor")
    told = {name: half[name] for name in ("error", "bound", "skipped", "failed") if name in half}
    return outcome | {"bf16": told, "holds": outcome.get("holds", True) and half.get("holds", True)}


def _in_bf16(case: Case, backend: str) -> Outcome:
    model, inputs = case.fresh(), cast(case.inputs, torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    try:
        with torch.no_grad(), counting(model) as truth:
            output_of(model(**inputs))
    except Exception as failure:
        return {"skipped": f"the original does not run: {first_line(failure)}"}
    return _through_compile(Case(model, inputs, truth), _forward, torch.bfloat16, backend)


def generate(case: Case) -> Outcome:
    """The prompt, then one token at a time: all tokens must run through every operator."""
    if not getattr(case.model, "can_generate", bool)() or "input_ids" not in case.inputs:
        return {"skipped": "the model does not generate from token ids"}
    given = decoded(case.inputs)
    if given is None:
        return {"skipped": "no decoder of token ids"}
    model, inputs = case.fresh(), prompt(given)
    try:
        with counting(model) as truth:
            generated(model, inputs)
    except Exception as failure:
        return {"skipped": f"the original does not generate: {first_line(failure)}"}
    ran = Ran("eager")
    ours = grape_compile(case.fresh(), backend=ran)
    if "pixel_values" in inputs:
        # `generate` calls it by itself, not through the forward of the model.
        grape_compile(encoder_of(ours), backend=ran)
    try:
        generated(ours, inputs)
    except Exception as failure:
        return _alone(
            Case(model, inputs, truth),
            lambda plain, _, given: {"output": generated(plain, given).logits},
            failure,
            _compiled_alone(case, "eager"),
        )
    found = _found(report(ours), truth) | {"rotations": ran.rotations, "biases": ran.biases}
    return found | compared(ours, model, given)


DOORS: dict[str, Callable[[Case], Outcome]] = {
    "static": static,
    "dynamic": dynamic,
    "compile": compiled,
    "cache": cache,
    "training": training,
    "bf16": bf16,
    "generate": generate,
    "inductor": inductor,
}
SAMPLED = {"inductor": 25}
"""Doors for a sample of so many architectures."""


def first_line(failure: BaseException) -> str:
    """The kind of a failure and the first line of what it says."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''}"


def _through_compile(
    case: Case, run: Run, dtype: torch.dtype = torch.float32, backend: str = "eager"
) -> Outcome:
    ran = Ran(backend)
    ours, original = grape_compile(case.fresh(), backend=ran), case.fresh()
    try:
        run(ours, original, case.inputs)
        ran.rotations = ran.biases = 0
        run(ours, original, case.inputs)
    except Exception as failure:
        return _alone(case, run, failure, _compiled_alone(case, backend))
    found = _found(report(ours), case.truth) | {"rotations": ran.rotations, "biases": ran.biases}
    alone = functools.partial(_compiled_alone, case, backend)
    return found | measured(ours, original, case.fresh(), case.inputs, run, dtype, alone)


def _compiled_alone(case: Case, backend: str) -> nn.Module:
    """The original through torch.compile without us."""
    torch.compiler.reset()
    plain = case.fresh()
    plain.compile(backend=backend)
    return plain


def _alone(case: Case, run: Run, failure: Exception, plain: nn.Module) -> Outcome:
    """Whose failure it is: torch.compile alone may not take the model either."""
    try:
        run(plain, case.model, case.inputs)
    except Exception as other:
        return {"skipped": f"torch.compile alone fails: {first_line(other)}"}
    return {"failed": first_line(failure)}


def _found(found: Report, truth: Count) -> Outcome:
    errors = [site.error for site in found.sites if site.error is not None]
    return {
        "rotations": sum(site.kind == "rotation" for site in found.sites),
        "biases": sum(site.kind == "bias" for site in found.sites),
        "truth": {"rotations": truth.rotations, "biases": truth.biases},
        "replay": max(errors, default=None),
        "proved": sum(site.evidence == "proved" for site in found.sites),
        "encodings": sorted({str(site.encoding) for site in found.sites}),
        "refusals": [
            {
                "rule": each.rule,
                "reason": each.reason,
                "module": each.module,
                "source": each.source.rpartition("transformers/")[2],
                "nearest": each.nearest,
            }
            for each in found.refusals
        ],
    }


# -- ways to run a model: itself, a plain twin of the same weights, the inputs ----------------------------


def _forward(model: nn.Module, plain: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"output": output_of(model(**inputs))}


def _decode(model: nn.Module, plain: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """One token, the past filled by the plain twin: the step alone is judged."""
    with torch.no_grad():
        return {"output": output_of(_step(model, inputs, _prefilled(plain, inputs)))}


def _decode_its_own(model: nn.Module, plain: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The same after a past of its own: some remember more of a picture than their cache holds."""
    with torch.no_grad():
        return {"output": output_of(_step(model, inputs, _prefilled(model, inputs)))}


def _prefilled(model: nn.Module, inputs: Inputs) -> Any:
    """The cache after all tokens but the last."""
    axes = sequence_axes(inputs)
    begun = {
        name: value.narrow(axis, 0, value.shape[axis] - 1) if (axis := axes.get(name)) else value
        for name, value in inputs.items()
    }
    past = model(**begun, use_cache=True).past_key_values
    if past is None:
        raise ValueError("no cache came back")
    return past


def _step(model: nn.Module, inputs: Inputs, past: Any) -> Any:
    return model(input_ids=inputs["input_ids"][:, -1:], past_key_values=past, use_cache=True)


def _gradients(model: nn.Module, plain: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    output = output_of(model(**inputs))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    numbers = live(output)
    torch.autograd.backward(output[numbers], cotangent[numbers])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}
