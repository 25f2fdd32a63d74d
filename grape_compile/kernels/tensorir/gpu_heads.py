"""Both products of attention on a GPU, by tiles of registers: queries times keys, and weights times values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.loops import cast, ceildiv, given, strided
from grape_compile.kernels.tensorir.machines import Gpu
from grape_compile.kernels.tensorir.terms import Place


class Heads(ABC):
    """The queries, keys, values and sums of one block; `products` [keys, queries] is for the threads of the queries."""

    products: Any

    def __init__(self, attention: Attention, buffers: dict[str, Any], place: Place, machine: Gpu) -> None:
        self.attention, self.buffers = attention, buffers
        self.place, self.machine = place, machine
        self.width, self.value_width = attention.width, attention.value_width
        self.kv_head = T.bind(place.head // (attention.heads // attention.kv_heads))

    @abstractmethod
    def read_block(self, start: Any) -> None:
        """Bring the keys and values from number `start` on into shared memory."""

    @abstractmethod
    def multiply(self) -> None:
        """Store the products of the keys and queries."""

    @abstractmethod
    def product(self, step: Any, row: Any) -> Any:
        """Return a scaled product in float32."""

    @abstractmethod
    def keep(self, step: Any, row: Any, weight: Any) -> None:
        """Store a weight."""

    @abstractmethod
    def sum_values(self, shrink: Any) -> None:
        """Add the values times their weights to the sums, which first shrink by a factor for each query."""

    @abstractmethod
    def finish(self, output: Any, share: Any) -> None:
        """Store the sums times a factor for each query."""

    def query(self, row: Any, column: Any) -> Any:
        place = self.place
        return self.buffers["query"][place.batch, place.head, place.query(row), column]

    def element(self, name: str, key: Any, column: Any) -> Any:
        return self.buffers[name][self.place.batch, self.kv_head, self.place.key(key), column]


class Tiles:
    """Products of a block of keys and all queries, `tile` times a few of them in the registers of a thread.

    A thread's queries are `groups` apart, so that neighbouring threads read neighbouring numbers; rows of keys lie one
    number apart, so that threads of different groups read different banks.
    """

    def __init__(self, machine: Gpu, block: int, tile: int) -> None:
        self.machine, self.block, self.tile = machine, block, tile
        self.groups = machine.threads // tile
        self.row, self.group = machine.thread % self.groups, machine.thread // self.groups

    def make(self, width: int) -> Any:
        return self.machine.make(self.block * (width + 1))

    def fill(self, buffer: Any, width: int, value: Callable[[Any, Any], Any]) -> None:
        total = self.block * width
        with strided(self.machine.thread, self.machine.threads, total) as (place, inside), given(inside):
            step, column = place // width, place % width
            T.buffer_store(buffer, value(step, column), [step * (width + 1) + column])

    def multiply(self, rows: Any, columns: Any, width: int, target: Any) -> None:
        """Store sum_c rows[key, c] columns[c, query] for all of a block."""
        keys = self.block // self.tile
        sums = T.alloc_buffer((self.tile, keys), "float32", scope="local")
        self.each(keys, lambda i, j: T.buffer_store(sums, number(0.0), [i, j]))
        with T.serial(0, width) as step:
            ours = [T.bind(columns[step, self.row + i * self.groups]) for i in range(self.tile)]
            theirs = [T.bind(rows[(self.group + j * self.tile) * (width + 1) + step]) for j in range(keys)]
            self.each(keys, lambda i, j: T.buffer_store(sums, sums[i, j] + ours[i] * theirs[j], [i, j]))
        self.each(
            keys,
            lambda i, j: T.buffer_store(
                target, sums[i, j], [self.group + j * self.tile, self.row + i * self.groups]
            ),
        )

    def each(self, columns: int, body: Callable[[int, int], Any]) -> None:
        for i in range(self.tile):
            for j in range(columns):
                body(i, j)


class HeadsInRegisters(Heads):
    """Products in float32, whatever the dtype: each thread has the sums of every tile-th coordinate of its queries."""

    def __init__(
        self,
        attention: Attention,
        buffers: dict[str, Any],
        place: Place,
        machine: Gpu,
        tiles: Tiles,
    ) -> None:
        super().__init__(attention, buffers, place, machine)
        self.tiles, self.block = tiles, tiles.block
        rows = machine.threads
        self.columns = ceildiv(self.value_width, tiles.tile)
        self.queries, self.products = machine.make(self.width, rows), machine.make(self.block, rows)
        self.keys, self.values = tiles.make(self.width), machine.make(self.block, self.value_width)
        self.sums = T.alloc_buffer((tiles.tile, self.columns), "float32", scope="local")
        machine.fill(
            self.queries,
            (self.width, rows),
            lambda column, row: (
                cast(self.query(row, column), attention.query.dtype, "float32") * number(attention.factor)
            ),
        )
        tiles.each(self.columns, lambda i, j: T.buffer_store(self.sums, number(0.0), [i, j]))

    def read_block(self, start: Any) -> None:
        key, value = self.attention.key.dtype, self.attention.value.dtype
        self.tiles.fill(
            self.keys,
            self.width,
            lambda step, column: cast(self.element("key", start + step, column), key, "float32"),
        )
        self.machine.fill(
            self.values,
            (self.block, self.value_width),
            lambda step, column: cast(self.element("value", start + step, column), value, "float32"),
        )

    def multiply(self) -> None:
        self.tiles.multiply(self.keys, self.queries, self.width, self.products)

    def product(self, step: Any, row: Any) -> Any:
        return self.products[step, row]

    def keep(self, step: Any, row: Any, weight: Any) -> None:
        T.buffer_store(self.products, weight, [step, row])

    def sum_values(self, shrink: Any) -> None:
        tiles, sums = self.tiles, self.sums
        less = T.alloc_buffer((tiles.tile,), "float32", scope="local")
        for i in range(tiles.tile):
            T.buffer_store(less, shrink[tiles.row + i * tiles.groups], [i])
        tiles.each(self.columns, lambda i, j: T.buffer_store(sums, sums[i, j] * less[i], [i, j]))
        with T.serial(0, self.block) as step:
            ours = [T.bind(self.products[step, tiles.row + i * tiles.groups]) for i in range(tiles.tile)]
            theirs = [T.bind(self.values[step, self._column(j)]) for j in range(self.columns)]
            tiles.each(
                self.columns, lambda i, j: T.buffer_store(sums, sums[i, j] + ours[i] * theirs[j], [i, j])
            )

    def finish(self, output: Any, share: Any) -> None:
        tiles, place, dtype = self.tiles, self.place, self.attention.output.dtype
        for i in range(tiles.tile):
            row = tiles.row + i * tiles.groups
            query = place.first + row
            with given(query < place.queries):
                for j in range(self.columns):
                    column = tiles.group + j * tiles.tile
                    with given(column < self.value_width if self._is_last(j) else None):
                        value = cast(self.sums[i, j] * share[row], "float32", dtype)
                        T.buffer_store(output, value, [place.batch, place.head, query, column])

    def _column(self, j: int) -> Any:
        """Coordinate number j of a group, the last one for those behind it."""
        column = self.tiles.group + j * self.tiles.tile
        return T.min(column, self.value_width - 1) if self._is_last(j) else column

    def _is_last(self, j: int) -> bool:
        return (j + 1) * self.tiles.tile > self.value_width
