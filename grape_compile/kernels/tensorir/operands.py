"""What a function of TensorIR takes: names, shapes with named dimensions, and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.engine import T

#: A size that is known, or the name of one that each call brings along.
Size = int | str
FLOATING: Final = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Operand:
    """The shape and dtype of one tensor; dimensions of the same name have the same size."""

    shape: tuple[Size, ...]
    dtype: str = "float32"


Slots = Mapping[str, Operand]


def compute_dtype(operand: Operand) -> str:
    """Return the dtype that an operand is computed in: float64 for float64, else float32."""
    return "float64" if operand.dtype == "float64" else "float32"


class Sizes:
    """The variables of the named dimensions of one function."""

    def __init__(self) -> None:
        self._named: dict[str, Any] = {}

    def of(self, size: Size) -> Any:
        """Return the variable of a name; a number is itself."""
        if isinstance(size, int):
            return size
        if size not in self._named:
            self._named[size] = T.int64()
        return self._named[size]

    def argument(self, name: str, operand: Operand) -> Any:
        """Return the buffer of one more argument of the function."""
        shape = [self.of(size) for size in operand.shape]
        return T.arg(name.replace(".", "_"), T.buffer(shape, operand.dtype))


def read(buffer: Any, operand: Operand, at: Sequence[Any], dtype: str) -> Any:
    """Return an element of a tensor that broadcasts: `at` are indices of a larger shape, aligned at its end."""
    lead = len(at) - len(operand.shape)
    indices = [0 if size == 1 else at[lead + axis] for axis, size in enumerate(operand.shape)]
    value = buffer[tuple(indices)] if indices else buffer[()]
    return value if operand.dtype == dtype else T.cast(value, dtype)


def check_floating(name: str, operand: Operand) -> None:
    """Raise OperandError unless an operand holds real floating numbers."""
    if operand.dtype not in FLOATING:
        raise OperandError(
            f"{name} as real floating numbers", f"{name} is {operand.dtype}", ", ".join(FLOATING)
        )


def check_over(name: str, operand: Operand, shape: Sequence[Size]) -> None:
    """Raise OperandError unless an operand broadcasts to `shape` without making it larger."""
    pairs = zip(reversed(operand.shape), reversed(shape), strict=False)
    if len(operand.shape) > len(shape) or any(found not in (1, wanted) for found, wanted in pairs):
        raise OperandError(
            f"{name} over {tuple(shape)}",
            f"{name} of shape {operand.shape}",
            f"a shape that broadcasts to {tuple(shape)}",
        )
