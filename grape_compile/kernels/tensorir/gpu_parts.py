"""What the parts of the keys leave behind on a GPU, and how it becomes one softmax."""

from __future__ import annotations

from typing import Any

from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T, workspace
from grape_compile.kernels.tensorir.loops import cast, ceildiv, given, registers
from grape_compile.kernels.tensorir.machines import Gpu
from grape_compile.kernels.tensorir.terms import Place, Slope, nothing, start_softmax


class Parts:
    """For each query and part of its keys: the sum of values by their weights, and what weighs the part.

    Part 0 has the last keys. Numbers of a part are its largest logit, its sum of weights, and for each path the sum of
    its edges: they lie behind the keys of every later part, to whose logits they add slope times that (GRAPE 5.1).
    """

    def __init__(self, attention: Attention, batches: Any, queries: Any, count: int) -> None:
        self.attention, self.count = attention, count
        shape = [batches, attention.heads, queries, count]
        self.sums = workspace("parts", [*shape, attention.value_width], "float32")
        self.numbers = workspace("levels", [*shape, 2 + len(attention.paths)], "float32")

    def keep(self, place: Place, part: Any, thread: Any, best: Any, total: Any, paths: list[Any]) -> None:
        """Store the numbers of a part, which all threads of a block have."""
        with given(thread == 0):
            for at, value in enumerate((best, total, *paths)):
                T.buffer_store(self.numbers, value, [*self._query(place), part, at])

    def keep_sum(self, place: Place, part: Any, column: Any, value: Any) -> None:
        """Store the sum of a coordinate of the values."""
        T.buffer_store(self.sums, value, [*self._query(place), part, column])

    def merge(self, buffers: dict[str, Any], output: Any, place: Place, machine: Gpu) -> None:
        """Store the output of a query: parts are added in their order, each times e^(level - largest level)."""
        attention, at = self.attention, self._query(place)
        best, total, highest = (T.alloc_buffer((1,), "float32", scope="local") for _ in range(3))
        levels = T.alloc_buffer((self.count,), "float32", scope="local")
        start_softmax(attention, buffers, place, best, total)
        T.buffer_store(highest, best[0], [0])
        slopes = [Slope(path.slopes, attention, buffers, place).value for path in attention.paths]
        later = [T.alloc_buffer((1,), "float32", scope="local") for _ in slopes]
        for edges in later:
            T.buffer_store(edges, number(0.0), [0])
        with registers(self.count) as part:
            level = self.numbers[(*at, part, 0)]
            for path, (slope, edges) in enumerate(zip(slopes, later, strict=True)):
                level = T.bind(level + slope * edges[0])
                T.buffer_store(edges, edges[0] + self.numbers[(*at, part, 2 + path)], [0])
            level = T.bind(T.Select(self.numbers[(*at, part, 1)] > number(0.0), level, nothing()))
            T.buffer_store(levels, level, [part])
            T.buffer_store(highest, T.max(highest[0], level), [0])
        T.buffer_store(total, total[0] * machine.exp(best[0] - highest[0]), [0])
        with registers(self.count) as part:
            T.buffer_store(levels, machine.exp(levels[part] - highest[0]), [part])
            T.buffer_store(total, total[0] + levels[part] * self.numbers[(*at, part, 1)], [0])
        share = T.bind(T.Select(total[0] > number(0.0), number(1.0) / total[0], number(0.0)))
        summed = T.alloc_buffer((1,), "float32", scope="local")
        for turn in range(ceildiv(attention.value_width, machine.threads)):
            column = T.bind(machine.thread + turn * machine.threads)
            with given(column < attention.value_width):
                T.buffer_store(summed, number(0.0), [0])
                with registers(self.count) as part:
                    value = levels[part] * self.sums[(*at, part, column)]
                    T.buffer_store(summed, summed[0] + value, [0])
                value = cast(summed[0] * share, "float32", attention.output.dtype)
                T.buffer_store(output, value, [*at, column])

    def _query(self, place: Place) -> list[Any]:
        return [place.batch, place.head, place.first]
