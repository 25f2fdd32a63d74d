"""Attention on a GPU: one thread for each query of a block, tiles of both products in its registers.

Queries, keys and logits of a block lie in shared memory, transposed, so that neighbouring threads read neighbouring
numbers; softmax is the work of the thread of the query. Blocks of keys come from the diagonal backwards, as the path of
GRAPE-AP needs them. Products are sums in float32 without tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grape_compile.encoding import Accumulated
from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.loops import cast, ceildiv, given, registers, strided
from grape_compile.kernels.tensorir.machines import Gpu
from grape_compile.kernels.tensorir.operands import Operand, Sizes, read
from grape_compile.kernels.tensorir.path_terms import PathTerm, turned_edges
from grape_compile.kernels.tensorir.scans import running_sums
from grape_compile.kernels.tensorir.space import Point
from grape_compile.kernels.tensorir.terms import (
    LOWEST,
    Additive,
    Place,
    capped,
    hidden,
    key_range,
    masked,
    nothing,
    sums_name,
)


class AttentionOnGpu:
    """The statements of one function, while it is being written.

    A block has `rows` queries and as many threads, and sees `block` keys at a time. A thread holds products of `tile`
    queries, each `tile` apart in number from the next of its group, with every block / tile-th key or coordinate.
    """

    def __init__(self, attention: Attention, point: Point) -> None:
        self.attention = attention
        self.rows, self.block, self.tile = point["rows"], point["block"], point["tile"]
        #: Threads whose queries are neighbours, and how many such groups there are.
        self.groups = self.rows // self.tile
        self.keys = self.block // self.tile
        self.columns = ceildiv(attention.value_width, self.tile)
        sizes = Sizes()
        self.buffers = {name: sizes.argument(name, operand) for name, operand in attention.arguments}
        self.output = sizes.argument("output", attention.output)
        self.batches, self.queries = (sizes.of(attention.query.shape[axis]) for axis in (0, 2))
        self.length = sizes.of(attention.key.shape[2])

    def write(self) -> None:
        attention, before = self.attention, Gpu(128)
        for bias in attention.additive:
            if isinstance(bias.clock, Accumulated):
                name = sums_name(bias.clock.slot, bias.clock.inclusive)
                if name not in self.buffers:
                    rates = self.buffers[bias.clock.slot]
                    self.buffers[name] = running_sums(rates, bias.clock.inclusive, before)
        edges = [turned_edges(path, attention, self.buffers, before) for path in attention.paths]
        blocks = ceildiv(self.queries, self.rows)
        with (
            T.thread_binding(0, blocks, thread="blockIdx.x") as number_,
            T.thread_binding(0, self.batches * attention.heads, thread="blockIdx.y") as head,
            T.thread_binding(0, self.rows, thread="threadIdx.x") as thread,
        ):
            # The last queries see the most keys under a causal mask; they come first.
            place = Place(
                T.bind(head // attention.heads),
                T.bind(head % attention.heads),
                T.bind((blocks - 1 - number_) * self.rows),
                self.queries,
                self.length,
            )
            self._attend(place, thread, Gpu(self.rows, thread), edges)

    def _attend(self, place: Place, thread: Any, machine: Gpu, edges: list[Any]) -> None:
        attention, rows, block, width = self.attention, self.rows, self.block, self.attention.width
        kv_head = T.bind(place.head // (attention.heads // attention.kv_heads))
        queries, products = machine.make(width, rows), machine.make(block, rows)
        shrink = machine.make(rows)
        keys, values = machine.make(self._padded(width)), machine.make(block, attention.value_width)
        gathered = T.alloc_buffer((self.tile, self.columns), "float32", scope="local")
        best, total = (T.alloc_buffer((1,), "float32", scope="local") for _ in range(2))
        machine.fill(
            queries,
            (width, rows),
            lambda column, row: (
                self._element("query", place.batch, place.head, place.query(row), column)
                * number(attention.factor)
            ),
        )
        self._start(place, best, total)
        self._tiles(self.columns, lambda i, j: T.buffer_store(gathered, number(0.0), [i, j]))
        terms = [Additive(bias, attention, self.buffers, place, machine, rows) for bias in attention.additive]
        for term in terms:
            term.make_keys(block)
        paths = [
            PathTerm(path, attention, self.buffers, place, machine, rows, block, edge)
            for path, edge in zip(attention.paths, edges, strict=True)
        ]
        steps = [machine.make(self._padded(path.dim)) for path in paths]
        first, stop = key_range(attention, place, rows)
        with T.serial(0, T.max(ceildiv(stop, block) - first // block, 0)) as back:
            start = T.bind((ceildiv(stop, block) - 1 - back) * block)
            self._fill_padded(
                machine,
                keys,
                width,
                lambda step, column: self._element(
                    "key", place.batch, kv_head, place.key(start + step), column
                ),
            )
            machine.fill(
                values,
                (block, attention.value_width),
                lambda step, column: self._element(
                    "value", place.batch, kv_head, place.key(start + step), column
                ),
            )
            for term in terms:
                term.read_keys(start, block)
            self._products(thread, keys, queries, width, products)
            for path, step_edges in zip(paths, steps, strict=True):
                self._fill_padded(
                    machine,
                    step_edges,
                    path.dim,
                    lambda step, column, path=path: path.edge(place.key(start + step), column),
                )
                self._products(thread, step_edges, path.queries, path.dim, path.edges)
            self._softmax(place, thread, machine, start, stop, terms, paths, products, best, total, shrink)
            self._sum_values(thread, values, products, shrink, gathered)
        self._finish(place, thread, shrink, total, gathered)

    def _padded(self, width: int) -> int:
        """Size of a block of rows, one number apart: threads of different groups read different banks."""
        return self.block * (width + 1)

    def _fill_padded(self, machine: Gpu, buffer: Any, width: int, value: Callable[[Any, Any], Any]) -> None:
        total = self.block * width
        with strided(machine.thread, machine.threads, total) as (place, inside), given(inside):
            step, column = place // width, place % width
            T.buffer_store(buffer, value(step, column), [step * (width + 1) + column])

    def _element(self, name: str, batch: Any, head: Any, token: Any, column: Any) -> Any:
        operand: Operand = dict(self.attention.arguments)[name]
        return cast(self.buffers[name][batch, head, token, column], operand.dtype, "float32")

    def _start(self, place: Place, best: Any, total: Any) -> None:
        sinks = self.attention.sinks
        if sinks is None:
            T.buffer_store(best, number(LOWEST), [0])
            T.buffer_store(total, number(0.0), [0])
            return
        sink = read(self.buffers["sinks"], sinks, [place.batch, place.head], "float32")
        T.buffer_store(best, sink, [0])
        T.buffer_store(total, number(1.0), [0])

    def _products(self, thread: Any, rows: Any, columns: Any, width: int, target: Any) -> None:
        """Store the products of a block's keys, or edges, and all queries."""
        row, group = thread % self.groups, thread // self.groups
        sums = T.alloc_buffer((self.tile, self.keys), "float32", scope="local")
        self._tiles(self.keys, lambda i, j: T.buffer_store(sums, number(0.0), [i, j]))
        with T.serial(0, width) as step:
            ours = [T.bind(columns[step, row + i * self.groups]) for i in range(self.tile)]
            theirs = [T.bind(rows[(group + j * self.tile) * (width + 1) + step]) for j in range(self.keys)]
            self._tiles(
                self.keys, lambda i, j: T.buffer_store(sums, sums[i, j] + ours[i] * theirs[j], [i, j])
            )
        self._tiles(
            self.keys,
            lambda i, j: T.buffer_store(target, sums[i, j], [group + j * self.tile, row + i * self.groups]),
        )

    def _softmax(
        self,
        place: Place,
        row: Any,
        machine: Gpu,
        start: Any,
        stop: Any,
        terms: list[Additive],
        paths: list[PathTerm],
        products: Any,
        best: Any,
        total: Any,
        shrink: Any,
    ) -> None:
        """Turn the products of the thread's query into weights, and merge their sum into that of the blocks before.

        Along a path the sums of a key are those of all later ones (GRAPE 5.1), so keys come from the last to the first.
        """
        attention = self.attention
        # In registers: what the loop over keys reads from shared memory it does not write, or threads would wait.
        logits = T.alloc_buffer((self.block,), "float32", scope="local")
        highest = T.alloc_buffer((1,), "float32", scope="local")
        sums = [T.alloc_buffer((1,), "float32", scope="local") for _ in paths]
        T.buffer_store(highest, best[0], [0])
        for path, summed in zip(paths, sums, strict=True):
            T.buffer_store(summed, path.sums[row], [0])
        with registers(self.block) as back:
            step = self.block - 1 - back
            key = start + step
            logit = capped(attention, machine, products[step, row])
            for term in terms:
                logit = logit + term.value(row, step, key)
            for path, summed in zip(paths, sums, strict=True):
                logit = T.bind(logit + path.slope * summed[0])
                later = T.cast(key - (place.first + place.offset), "int32") > row
                link = T.bind(path.link(path.edges[step, row]))
                T.buffer_store(summed, summed[0] + T.Select(later, number(0.0), link), [0])
            logit = masked(attention, self.buffers, place, row, key, logit)
            gone = hidden(attention, place, row, key, stop)
            logit = T.bind(T.Select(gone, nothing(), logit))
            T.buffer_store(logits, logit, [step])
            T.buffer_store(highest, T.max(highest[0], logit), [0])
        for path, summed in zip(paths, sums, strict=True):
            T.buffer_store(path.sums, summed[0], [row])
        less = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(less, machine.exp(best[0] - highest[0]), [0])
        T.buffer_store(shrink, less[0], [row])
        T.buffer_store(best, highest[0], [0])
        weights = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(weights, number(0.0), [0])
        with registers(self.block) as step:
            weight = T.bind(machine.exp(logits[step] - highest[0]))
            T.buffer_store(products, weight, [step, row])
            T.buffer_store(weights, weights[0] + weight, [0])
        T.buffer_store(total, total[0] * less[0] + weights[0], [0])

    def _sum_values(self, thread: Any, values: Any, weights: Any, shrink: Any, gathered: Any) -> None:
        row, group = thread % self.groups, thread // self.groups
        less = T.alloc_buffer((self.tile,), "float32", scope="local")
        for i in range(self.tile):
            T.buffer_store(less, shrink[row + i * self.groups], [i])
        self._tiles(self.columns, lambda i, j: T.buffer_store(gathered, gathered[i, j] * less[i], [i, j]))
        with T.serial(0, self.block) as step:
            ours = [T.bind(weights[step, row + i * self.groups]) for i in range(self.tile)]
            theirs = [T.bind(values[step, self._column(group, j)]) for j in range(self.columns)]
            self._tiles(
                self.columns,
                lambda i, j: T.buffer_store(gathered, gathered[i, j] + ours[i] * theirs[j], [i, j]),
            )

    def _column(self, group: Any, j: int) -> Any:
        """Coordinate number j of a group, the last one for those behind it."""
        column = group + j * self.tile
        return T.min(column, self.attention.value_width - 1) if self._is_last(j) else column

    def _is_last(self, j: int) -> bool:
        return (j + 1) * self.tile > self.attention.value_width

    def _finish(self, place: Place, thread: Any, share: Any, total: Any, gathered: Any) -> None:
        """Store the quotients, zero for a query that has seen no key."""
        some = total[0] > number(0.0)
        T.buffer_store(share, T.Select(some, number(1.0) / total[0], number(0.0)), [thread])
        row, group = thread % self.groups, thread // self.groups
        dtype, width = self.attention.output.dtype, self.attention.value_width
        for i in range(self.tile):
            query = place.first + row + i * self.groups
            with given(query < place.queries):
                for j in range(self.columns):
                    column = group + j * self.tile
                    with given(column < width if self._is_last(j) else None):
                        value = cast(gathered[i, j] * share[row + i * self.groups], "float32", dtype)
                        T.buffer_store(self.output, value, [place.batch, place.head, query, column])

    def _tiles(self, columns: int, body: Callable[[int, int], Any]) -> None:
        for i in range(self.tile):
            for j in range(columns):
                body(i, j)


def gpu_fits(attention: Attention, limit: int, point: Mapping[str, int]) -> bool:
    """Whether a block's threads share its groups evenly, and its numbers fit into shared memory of `limit` bytes."""
    rows, block, tile = point["rows"], point["block"], point["tile"]
    if rows % (tile * tile) or block % tile:
        return False
    heads = attention.width * rows + block * (attention.width + 1 + attention.value_width)
    numbers = heads + block * rows + rows
    for path in attention.paths:
        numbers += block * rows + path.dim * rows + block * (path.dim + 1) + 2 * rows
    for bias in attention.additive:
        numbers += attention.axes(bias) * (rows + block) + rows
    return 4 * numbers <= limit
