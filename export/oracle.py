"""The model in float64, casts that its code writes out included: what errors are measured against."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from grape_compile.export.capturing import Captured

_NARROW: Final = (torch.float32, torch.float16, torch.bfloat16)
_CASTS: Final = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InDouble(TorchFunctionMode):
    """Turns requests for narrow numbers into ones for float64: a copy leaves the casts that a model writes out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        wide = {name: _widened(value) for name, value in (kwargs or {}).items()}
        if func in (nn.functional.grouped_mm, torch._grouped_mm):
            return _grouped(*args, **wide)
        return func(*map(_widened, args), **wide)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _grouped(rows: Tensor, weights: Tensor, *, offs: Tensor, **rest: Any) -> Tensor:
    """The grouped product by its definition: torch's kernel takes no float64."""
    del rest
    ends = offs.tolist()
    parts = [
        rows[start:end] @ weights[at] for at, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weights.shape[-1])])


class Eager:
    """The model itself on the inputs of a case, or a copy of it in float64."""

    def __init__(self, captured: Captured, *, wide: bool = False) -> None:
        self.model, self.wide = (_in_double(captured.model) if wide else captured.model), wide
        given = captured.program.example_inputs
        assert given is not None
        self.leaves, self.spec = pytree.tree_flatten(given)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the result in order."""
        parts = iter(inputs)
        filled = [next(parts) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        if not self.wide:
            return self._results(filled)
        with InDouble():
            return self._results(
                [
                    leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
                    for leaf in filled
                ]
            )

    def _results(self, filled: list[Any]) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        with torch.no_grad():
            result = self.model(*args, **kwargs)
        return [leaf.detach() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _in_double(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()
    return copied
