"""One node of an ONNX graph about to be read as ATen operators: its attributes, its operands, the table of readers.

A value is a tensor, or a small array of numbers: sizes and what is computed from them, axes, scalars. Numbers are numpy
arrays, of Python integers and symbols where a size is among them, so that what a graph does with its sizes is done
while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

Numbers: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Value: TypeAlias = "Tensor | Numbers"


class Untranslated(Exception):
    """An operator, or a form of one, that has no reader: detection goes on around it."""


@dataclass(frozen=True)
class Call:
    """A node and what its attributes say."""

    node: ir.Node

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        held = self.node.attributes.get(name)
        return default if held is None else held.as_int()

    def real(self, name: str, default: float) -> float:
        """A real attribute."""
        held = self.node.attributes.get(name)
        return default if held is None else held.as_float()

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        held = self.node.attributes.get(name)
        return default if held is None else held.as_string()

    def integers(self, name: str) -> list[int] | None:
        """A list attribute; None where it is not given."""
        held = self.node.attributes.get(name)
        return None if held is None else list(held.as_ints())

    @property
    def results(self) -> int:
        """How many results are read: the last of them that somebody uses, counted from one."""
        used = [
            place
            for place, value in enumerate(self.node.outputs)
            if value.name and (value.uses() or value.is_graph_output())
        ]
        return max(used, default=0) + 1


Reader: TypeAlias = Callable[..., "Value | Sequence[Value]"]
READERS: dict[tuple[str, str], Reader] = {}
"""The reader of every operator, by domain and name."""


def reads(*names: str, domain: str = "") -> Callable[[Reader], Reader]:
    """Register a reader: a function of the call and its operands, None for those left out, to the results."""

    def register(reader: Reader) -> Reader:
        READERS.update(((domain, name), reader) for name in names)
        return reader

    return register


def is_numbers(*values: Value | None) -> bool:
    """Whether none of the operands is a tensor of the graph."""
    return all(isinstance(value, np.ndarray | None) for value in values)


def is_symbolic(numbers: Numbers) -> bool:
    """Whether a size that may change is among the numbers."""
    return numbers.dtype == object and not all(isinstance(item, int | float) for item in numbers.flat)


def settled(numbers: Numbers) -> Numbers:
    """Integers without a symbol as integers again."""
    return numbers if numbers.dtype != object or is_symbolic(numbers) else numbers.astype(np.int64)


def tensor(value: Value) -> Tensor:
    """The value as a tensor of the graph."""
    if isinstance(value, Tensor):
        return value
    value = settled(value)
    if value.dtype != object:
        kind = torch.from_numpy(np.zeros(0, value.dtype)).dtype
        if value.size == 1:
            return torch.full(value.shape, value.item(), dtype=kind)
        return torch.tensor(value.tolist(), dtype=kind)
    parts = [torch.full((), item, dtype=torch.int64) for item in value.flat]
    return torch.stack(parts).reshape(value.shape) if value.ndim else parts[0]


def beside(value: Value, other: Tensor) -> Any:
    """An operand of an element-wise operator: a plain number where that gives a result of the same shape."""
    if isinstance(value, Tensor):
        return value
    if value.size == 1 and value.ndim <= other.dim():
        return settled(value).reshape(()).item()
    return tensor(value)


def integers_of(value: Value | None) -> list[Any]:
    """Integers and symbols that say where, how many or how large."""
    if value is None or isinstance(value, Tensor):
        raise Untranslated("sizes that are computed from values")
    return [int(item) if isinstance(item, np.integer) else item for item in value.reshape(-1).tolist()]


def integer_of(value: Value | None) -> Any:
    """One such integer."""
    (only,) = integers_of(value)
    return only
