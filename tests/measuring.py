"""What a test measures: the error contract, the operators that really ran.

The contract: relative root-mean-square error against the original model in float64, over several draws of
weights and inputs, at most `MARGIN` times the larger error of the original and of plain `torch.compile`, plus
`FLOOR`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import Architecture, draw_parameters, output_of
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.coverage.oracle import InDouble as InDouble
from benchmarks.coverage.oracle import in_double as in_double

SEEDS = (0, 1, 2)
MARGIN = 1.25
FLOOR = 1e-7


class GrapeCalls(TorchDispatchMode):
    """A backend that runs a graph as it is and counts what ran of ours.

    `rotated` is the number of tensors given to `grape::rotate`, `attended` the number of calls of
    `grape::attend`, since the last `reset`. It is a backend because torch.compile steps aside while a mode is
    active around it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.reset()

    def reset(self) -> None:
        self.rotated = self.attended = 0

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            with self:
                return module(*args)

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        self.rotated += len(args[0]) if name == "grape::rotate" else 0
        self.attended += name == "grape::attend"
        return func(*args, **(kwargs or {}))


def widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with floating tensors in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@dataclass
class Deviation:
    """Squared error and squared reference, gathered over runs."""

    squared_error: float = 0.0
    squared_reference: float = 0.0

    def add(self, found: Tensor, reference: Tensor, weight: float = 1.0) -> None:
        self.squared_error += weight * (found.double() - reference).square().sum().item()
        self.squared_reference += weight * reference.square().sum().item()

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared_error / self.squared_reference)


@dataclass
class Errors:
    """Relative error of the logits and of the gradients of one way to run a model."""

    logits: Deviation = field(default_factory=Deviation)
    gradients: Deviation = field(default_factory=Deviation)


Gradients = dict[str, Tensor]


def forward_backward(model: nn.Module, inputs: Mapping[str, Any], seed: int) -> tuple[Tensor, Gradients]:
    """The output, and every parameter's gradient for a random cotangent."""
    model.zero_grad()
    output = output_of(model(**inputs))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    torch.autograd.backward(output, cotangent)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def errors_of(
    row: Architecture,
    ways: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype = torch.float32,
    gradients: bool = True,
    oracle: nn.Module | None = None,
) -> dict[str, Errors]:
    """Each way to run the model of a row, measured against its float64 oracle over `SEEDS`.

    The oracle is the row's own model unless another is given.
    """
    errors = {name: Errors() for name in ways}
    for seed in SEEDS:
        inputs = row.inputs(seed=seed, dtype=dtype)
        original = oracle or row.build(seed, dtype)
        draw_parameters(original, seed)
        wide = in_double(original)
        with InDouble(), torch.set_grad_enabled(gradients):
            reference = run(wide, widened(inputs), seed, gradients)
        for name, model in ways.items():
            draw_parameters(model, seed)
            with torch.set_grad_enabled(gradients):
                _gather(errors[name], run(model, inputs, seed, gradients), reference)
    return errors


def run(model: nn.Module, inputs: Mapping[str, Any], seed: int, gradients: bool) -> tuple[Tensor, Gradients]:
    return forward_backward(model, inputs, seed) if gradients else (output_of(model(**inputs)), {})


def _gather(errors: Errors, found: tuple[Tensor, Gradients], reference: tuple[Tensor, Gradients]) -> None:
    """Each parameter's gradient counts by its relative error: a large one does not hide a wrong small one.

    Gradients that vanish in exact arithmetic (a bias of the keys, which the softmax does not see) are noise.
    """
    errors.logits.add(found[0], reference[0])
    wanted = reference[1]
    lost = wanted.keys() - found[1].keys()
    assert not lost, f"parameters without a gradient: {', '.join(sorted(lost))}"
    largest = max((_mean_square(gradient) for gradient in wanted.values()), default=0.0)
    for name, gradient in wanted.items():
        size = _mean_square(gradient)
        if size > 1e-12 * largest:
            errors.gradients.add(found[1][name], gradient, 1 / (size * gradient.numel()))


def _mean_square(x: Tensor) -> float:
    return x.square().mean().item()


def bound(errors: Iterable[float]) -> float:
    """The largest relative error the contract allows, given those of the ways to compare with."""
    return MARGIN * max(errors) + FLOOR
