"""Loops and conditions that bodies are written with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from grape_compile.kernels.tensorir.engine import T


def cast(value: Any, own: str, dtype: str) -> Any:
    """Return a value of dtype `own` as `dtype`."""
    return value if own == dtype else T.cast(value, dtype)


def chunks(count: int, size: int) -> list[tuple[int, int]]:
    """Return (begin, length) of pieces of at most `size`.

    >>> chunks(5, 2)
    [(0, 2), (2, 2), (4, 1)]
    """
    return [(begin, min(size, count - begin)) for begin in range(0, count, size)]


def product(sizes: Sequence[Any]) -> Any:
    """Return the product of sizes, whole numbers or variables."""
    total: Any = 1
    for size in sizes:
        total = size * total
    return total


def ceildiv(size: Any, by: int) -> Any:
    """Return how many pieces of `by` hold `size`."""
    return (size + (by - 1)) // by


def registers(count: int) -> Any:
    """Loop over numbers in registers of a GPU: it is the compiler of the GPU that writes it out."""
    return T.unroll(0, count, annotations={"pragma_unroll_explicit": 0})


@contextmanager
def given(*conditions: Any) -> Iterator[None]:
    """Write what follows under all conditions that are not None."""
    with ExitStack() as stack:
        for condition in conditions:
            if condition is not None:
                stack.enter_context(T.If(condition))
                stack.enter_context(T.Then())
        yield


@contextmanager
def strided(thread: Any, threads: int, total: int) -> Iterator[tuple[Any, Any]]:
    """Deal `total` numbers out to the threads of a block: (number, whether it is one, None where all are).

    Where there are more threads, those behind the last number get that one too.
    """
    if total < threads:
        yield T.min(thread, total - 1), None
        return
    with T.serial(0, ceildiv(total, threads)) as turn:
        number = turn * threads + thread
        yield number, None if total % threads == 0 else number < total
