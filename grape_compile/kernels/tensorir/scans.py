"""Running sums along the tokens, in float64, made before anything reads them."""

from __future__ import annotations

from typing import Any

from grape_compile.kernels.tensorir.engine import T, workspace
from grape_compile.kernels.tensorir.loops import product
from grape_compile.kernels.tensorir.machines import Machine


def running_sums(rates: Any, inclusive: bool, machine: Machine) -> Any:
    """Return the buffer of the sums of `rates` [..., T] up to each token, its own included or not (GRAPE 3).

    Each row is summed by one thread.
    """
    shape = [*rates.shape]
    sums = workspace("sums", shape, "float64")
    with machine.deal(product(shape[:-1])) as row:
        at: list[Any] = []
        for size in reversed(shape[:-1]):
            at, row = [row % size, *at], row // size
        total = T.alloc_buffer((1,), "float64", scope="local")
        T.buffer_store(total, T.float64(0.0), [0])
        with T.serial(0, shape[-1]) as token:
            rate = T.cast(rates[(*at, token)], "float64")
            if not inclusive:
                T.buffer_store(sums, total[0], [*at, token])
            T.buffer_store(total, total[0] + rate, [0])
            if inclusive:
                T.buffer_store(sums, total[0], [*at, token])
    return sums
