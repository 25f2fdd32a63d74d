"""The error contract: relative root-mean-square error against the original in float64, over several draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from benchmarks.coverage.arguments import Inputs
from benchmarks.coverage.choices import Choices, OtherChoices, held, noted
from benchmarks.coverage.inputs import redrawn

SEEDS = (0, 1, 2)
MARGIN = 1.25
FLOOR = 1e-7
MASKED = 1e30
AGAINST_ORIGINAL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference to the original itself where no float64 run of it is possible: a few roundings of a sum each way
(2^-24 and 2^-8 times the depth of the tiny models)."""


_DRAWN = {torch.rand, torch.randn, torch.rand_like, torch.randn_like}
_DRAWN_INTO = {Tensor.uniform_, Tensor.normal_, Tensor.exponential_}


class InDouble(TorchFunctionMode):
    """Turns requests for float32 into ones for float64: `.double()` leaves the casts a model writes out.

    Random numbers are those of float32: a generator gives other ones in float64.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DRAWN:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        if func in _DRAWN_INTO:
            return args[0].copy_(func(args[0].float(), *args[1:], **kwargs))
        if func is Tensor.float:
            return args[0].double()
        wider = {key: _widen(value) for key, value in kwargs.items()}
        return func(*(_widen(value) for value in args), **wider)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def in_double(model: nn.Module) -> nn.Module:
    """A copy of the model in float64; run it under `InDouble`."""
    wide = copy.deepcopy(model).double()
    if getattr(getattr(wide, "config", None), "_experts_implementation", None) is not None:
        # The grouped matrix product knows no float64.
        wide.set_experts_implementation("eager")  # type: ignore[operator]  # a method of transformers' models
    return wide


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with floating tensors in `dtype`."""
    return pytree.tree_map(
        lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value,
        inputs,
    )


def output_of(result: Any) -> Tensor:
    """The tensor a model is judged by: its logits, its last hidden state, or the first floating one it returns."""
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    floating = [
        leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not floating:
        raise ValueError(f"a {type(result).__name__} without a floating tensor came back")
    return floating[0]


Run = Callable[[nn.Module, nn.Module, Inputs], dict[str, Tensor]]
"""Runs a model, with a plain twin of the same weights at hand; returns its output, and gradients if asked for."""


def measured(
    ours: nn.Module,
    original: nn.Module,
    plain: nn.Module,
    inputs: Inputs,
    run: Run,
    dtype: torch.dtype = torch.float32,
    compiled: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Error of ours and of the original over `SEEDS`, the oracle they were measured against, the bound, the verdict.

    Below float32 every run makes the choices of the oracle (choices.py). Where even so the original goes another way,
    or gives an output of another shape, there is nothing to compare.

    `plain` is the model the oracle is made of: itself in float64, and where that does not run, as it is. The original
    `compiled` (or exported) by torch alone is measured where ours is further off than the original as it is.
    """
    wide: nn.Module | None = in_double(plain)
    errors = {"ours": Deviation(), "original": Deviation()}
    references = []
    for seed in SEEDS:
        drawn = redrawn(inputs, seed)
        with noted() as choices:
            reference = _in_double(run, wide, drawn) if wide is not None else None
        if reference is None:
            wide = None
            with noted() as choices:
                reference = _seeded(run, original, plain, drawn)
        references.append((drawn, reference, choices))
        try:
            with _choosing(choices, dtype):
                errors["original"].add(_seeded(run, original, plain, drawn), reference)
        except OtherChoices:
            errors["original"].squares.append(math.inf)
        if errors["original"].relative == math.inf:
            return {"error": None, "incomparable": "the original itself goes another way than its oracle"}
        with _choosing(choices, dtype):
            errors["ours"].add(_seeded(run, ours, plain, drawn), reference)
    error, other = errors["ours"].relative, errors["original"].relative
    verdict = {"error": error, "original": other, "oracle": "original" if wide is None else "fp64"}
    if wide is None:
        bound = AGAINST_ORIGINAL[dtype]
    elif error > MARGIN * other + FLOOR and compiled is not None:
        third, model = Deviation(), compiled()
        for drawn, reference, choices in references:
            with _choosing(choices, dtype):
                third.add(_seeded(run, model, plain, drawn), reference)
        verdict["compiled"] = third.relative
        bound = MARGIN * max(other, third.relative) + FLOOR
    else:
        bound = MARGIN * other + FLOOR
    return verdict | {"bound": bound, "holds": error <= bound}


def _choosing(choices: Choices, dtype: torch.dtype) -> AbstractContextManager[None]:
    return nullcontext() if dtype is torch.float32 else held(choices)


def _seeded(run: Run, model: nn.Module, plain: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    torch.manual_seed(0)
    numpy.random.seed(0)  # what masks of features in training are drawn with
    return run(model, plain, copy.deepcopy(inputs))


def _in_double(run: Run, wide: nn.Module, inputs: Inputs) -> dict[str, Tensor] | None:
    try:
        with InDouble():
            found = _seeded(run, wide, wide, cast(inputs, torch.float64))
    except Exception:  # kernels without float64, casts to float32 that no mode sees
        return None
    return found if found["output"].dtype is torch.float64 else None


@dataclass
class Deviation:
    """Mean over tensors and runs of the relative squared error: a large tensor does not hide a wrong small one."""

    squares: list[float] = field(default_factory=list)

    def add(self, found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
        """Tensors that vanish beside the largest are rounding (the gradient of a bias softmax does not see)."""
        sizes = {name: _mean_square(tensor) for name, tensor in reference.items()}
        largest = max((size for name, size in sizes.items() if name != "output"), default=0.0)
        for name, tensor in reference.items():
            if name != "output" and sizes[name] <= 1e-12 * largest:
                continue
            self.squares.append(_difference(found.get(name), tensor) / max(sizes[name], 1e-300))

    @property
    def relative(self) -> float:
        return math.sqrt(sum(self.squares) / max(len(self.squares), 1))


def live(x: Tensor) -> Tensor:
    """Where a tensor holds numbers; masked logits are infinite, or the lowest number of their type."""
    return x.abs() < MASKED


def _difference(found: Tensor | None, reference: Tensor) -> float:
    """Mean squared difference; what is masked in the reference has to be masked in the other."""
    if found is None or found.shape != reference.shape or not torch.equal(live(found), live(reference)):
        return math.inf
    return _mean_square(torch.where(live(reference), found.double() - reference.double(), 0.0))


def _mean_square(x: Tensor) -> float:
    return torch.where(live(x), x, 0.0).double().square().mean().item() if x.numel() else 0.0
