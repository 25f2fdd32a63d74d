"""What a body is written for: a thread of a CPU with its vectors, or a block of threads of a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from grape_compile.kernels.tensorir import arithmetic
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.loops import ceildiv, given, strided


class Machine(ABC):
    """How a block of queries keeps numbers, and how it computes an exponential."""

    @abstractmethod
    def make(self, *shape: int) -> Any:
        """Return a buffer of float32 numbers that all of a block sees."""

    @abstractmethod
    def fill(self, buffer: Any, shape: tuple[int, ...], value: Callable[..., Any]) -> None:
        """Store numbers in a buffer, each given by its place."""

    @abstractmethod
    def exp(self, x: Any) -> Any:
        """Return e^x of a float32 number."""

    @abstractmethod
    def deal(self, total: Any) -> AbstractContextManager[Any]:
        """Loop over rows that do not depend on each other, before any block."""


@dataclass(frozen=True)
class Cpu(Machine):
    """One thread works on a block; vectors have `lanes` numbers."""

    lanes: int

    def make(self, *shape: int) -> Any:
        return T.alloc_buffer(shape, "float32", scope="global")

    def fill(self, buffer: Any, shape: tuple[int, ...], value: Callable[..., Any]) -> None:
        with ExitStack() as loops:
            at = [loops.enter_context(T.serial(0, size)) for size in shape]
            T.buffer_store(buffer, value(*at), at)

    def exp(self, x: Any) -> Any:
        return arithmetic.exp(x)

    @contextmanager
    def deal(self, total: Any) -> Iterator[Any]:
        with T.parallel(0, total) as row:
            yield row


@dataclass(frozen=True)
class Gpu(Machine):
    """`threads` threads work on a block and share memory; `thread` is the number of one of them."""

    threads: int
    thread: Any = None

    def make(self, *shape: int) -> Any:
        # A single number is each thread's own.
        return T.alloc_buffer(shape, "float32", scope="local" if prod(shape) == 1 else "shared.dyn")

    def fill(self, buffer: Any, shape: tuple[int, ...], value: Callable[..., Any]) -> None:
        with strided(self.thread, self.threads, prod(shape)) as (number, inside), given(inside):
            at: list[Any] = []
            for size in reversed(shape):
                at, number = [number % size, *at], number // size
            T.buffer_store(buffer, value(*at), at)

    def exp(self, x: Any) -> Any:
        return T.exp(x)

    @contextmanager
    def deal(self, total: Any) -> Iterator[Any]:
        with (
            T.thread_binding(0, ceildiv(total, self.threads), thread="blockIdx.x") as block,
            T.thread_binding(0, self.threads, thread="threadIdx.x") as thread,
        ):
            row = block * self.threads + thread
            with given(row < total):
                yield row
