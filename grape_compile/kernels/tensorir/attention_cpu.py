"""Attention on a CPU: the queries of a block are lanes of vectors, so that no sum ever goes across a vector.

Products are tiles of registers: a few keys, or coordinates of the value, times a few vectors of queries. Logits of a
block of keys stay in the cache, transposed; maxima, sums and running sums along a path are one operation per key for
all lanes. Blocks of keys come from the diagonal backwards, as the path of GRAPE-AP needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from grape_compile.encoding import Accumulated
from grape_compile.kernels.tensorir.arithmetic import exp, number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.decoding_cpu import DecodingOnCpu
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.loops import cast, ceildiv, chunks
from grape_compile.kernels.tensorir.machines import Cpu
from grape_compile.kernels.tensorir.operands import Sizes, read
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

#: So many queries are taken one by one: as lanes they would leave most of a block empty.
FEW: Final = 4


class AttentionOnCpu:
    """The statements of one function, while it is being written.

    `lanes` numbers are one vector, `vectors` of them the queries of a block; `keys` and `columns` are the rows of the
    register tiles of both products, `tiles` tiles of keys a block.
    """

    def __init__(self, attention: Attention, point: Point) -> None:
        self.attention = attention
        self.lanes, self.vectors = point["lanes"], point["vectors"]
        self.machine = Cpu(self.lanes)
        self.keys, self.columns = point["keys"], point["columns"]
        self.rows, self.block = self.lanes * self.vectors, self.keys * point["tiles"]
        sizes = Sizes()
        self.buffers = {name: sizes.argument(name, operand) for name, operand in attention.arguments}
        self.output = sizes.argument("output", attention.output)
        self.batches, self.queries = (sizes.of(attention.query.shape[axis]) for axis in (0, 2))
        self.length = sizes.of(attention.key.shape[2])

    def write(self) -> None:
        attention = self.attention
        for bias in attention.additive:
            if isinstance(bias.clock, Accumulated):
                name = sums_name(bias.clock.slot, bias.clock.inclusive)
                if name not in self.buffers:
                    self.buffers[name] = running_sums(
                        self.buffers[bias.clock.slot], bias.clock.inclusive, self.machine
                    )
        edges = [turned_edges(path, attention, self.buffers, self.machine) for path in attention.paths]
        size = attention.query.shape[2]
        if isinstance(size, int):
            self._write_few(edges) if size <= FEW else self._write_many(edges)
            return
        with T.If(self.queries <= FEW):
            with T.Then():
                self._write_few(edges)
            with T.Else():
                self._write_many(edges)

    def _write_few(self, edges: list[Any]) -> None:
        few = DecodingOnCpu(self.attention, self.buffers, self.output, self.lanes, self.block)
        few.write(self.batches, self.queries, self.length, edges)

    def _write_many(self, edges: list[Any]) -> None:
        heads, blocks = self.attention.heads, ceildiv(self.queries, self.rows)
        with T.parallel(0, self.batches * (heads * blocks)) as number_:
            # The last queries see the most keys under a causal mask; they come first.
            place = Place(
                T.bind(number_ // (heads * blocks)),
                T.bind(number_ // blocks % heads),
                T.bind((blocks - 1 - number_ % blocks) * self.rows),
                self.queries,
                self.length,
            )
            self._attend(place, edges)

    def _attend(self, place: Place, edges: list[Any]) -> None:
        attention, rows, block = self.attention, self.rows, self.block
        turned = self._transposed("query", place, attention.width, attention.factor)
        best, total, shrink = (self.machine.make(rows) for _ in range(3))
        gathered = T.alloc_buffer((attention.value_width, rows), "float32", scope="global")
        logits = T.alloc_buffer((block, rows), "float32", scope="global")
        keys, values = (self._converted(name) for name in ("key", "value"))
        self._start(place, best, total)
        with T.serial(0, attention.value_width) as column:
            self._lanes(lambda lane: T.buffer_store(gathered, number(0.0), [column, lane]))
        terms = [
            Additive(bias, attention, self.buffers, place, self.machine, rows) for bias in attention.additive
        ]
        for term in terms:
            term.make_keys(block)
        paths = [
            PathTerm(path, attention, self.buffers, place, self.machine, rows, block, edge)
            for path, edge in zip(attention.paths, edges, strict=True)
        ]
        first, stop = key_range(attention, place, rows)
        # From the block of the last key in sight back to that of the first.
        with T.serial(0, T.max(ceildiv(stop, block) - first // block, 0)) as back:
            start = T.bind((ceildiv(stop, block) - 1 - back) * block)
            count = T.bind(T.min(block, stop - start))
            for term in terms:
                term.read_keys(start, block)
            key_at = self._rows_of("key", keys, place, start, count)
            value_at = self._rows_of("value", values, place, start, count)

            self._products(key_at, turned, attention.width, count, logits)
            for path in paths:

                def edge_at(step: Any, column: Any, path: PathTerm = path, start: Any = start) -> Any:
                    return path.edge(start + step, column)

                self._products(edge_at, path.queries, path.dim, count, path.edges)
            self._finish_logits(place, start, stop, count, terms, paths, logits, best, shrink)
            self._weigh(logits, count, best, total, shrink)
            self._sum_values(value_at, logits, count, shrink, gathered)
        self._finish(place, gathered, total)

    def _start(self, place: Place, best: Any, total: Any) -> None:
        sinks = self.attention.sinks

        def store(lane: Any) -> None:
            if sinks is None:
                T.buffer_store(best, number(LOWEST), [lane])
                T.buffer_store(total, number(0.0), [lane])
                return
            sink = read(self.buffers["sinks"], sinks, [place.batch, place.head], "float32")
            T.buffer_store(best, sink, [lane])
            T.buffer_store(total, number(1.0), [lane])

        self._lanes(store)

    def _products(
        self, row_at: Callable[[Any, Any], Any], columns: Any, width: int, count: Any, target: Any
    ) -> None:
        """Store the product of each row of a block and all lanes, a tile of registers at a time."""
        keys = self.keys
        with T.serial(0, ceildiv(count, keys)) as tile:
            sums = T.alloc_buffer((keys, self.rows), "float32", scope="local")
            self._unrolled(keys, lambda row, lane: T.buffer_store(sums, number(0.0), [row, lane]))
            with T.serial(0, width) as step:
                factors = [T.bind(row_at(T.min(tile * keys + row, count - 1), step)) for row in range(keys)]
                self._unrolled(
                    keys,
                    lambda row, lane: T.buffer_store(
                        sums, sums[row, lane] + factors[row] * columns[step, lane], [row, lane]
                    ),
                )
            self._unrolled(
                keys, lambda row, lane: T.buffer_store(target, sums[row, lane], [tile * keys + row, lane])
            )

    def _finish_logits(
        self,
        place: Place,
        start: Any,
        stop: Any,
        count: Any,
        terms: list[Additive],
        paths: list[PathTerm],
        logits: Any,
        best: Any,
        shrink: Any,
    ) -> None:
        """Add biases and masks to the products, raise the maxima, and say by how much what was summed before shrinks.

        Along a path the sums of a key are those of all later ones (GRAPE 5.1), so keys come from the last to the first.
        """
        with T.serial(0, self.vectors) as vector:
            highest = T.alloc_buffer((self.lanes,), "float32", scope="local")
            sums = [T.alloc_buffer((self.lanes,), "float32", scope="local") for _ in paths]
            with T.vectorized(0, self.lanes) as x:
                T.buffer_store(highest, best[vector * self.lanes + x], [x])
            for path, summed in zip(paths, sums, strict=True):
                with T.vectorized(0, self.lanes) as x:
                    T.buffer_store(summed, path.sums[vector * self.lanes + x], [x])
            with T.serial(0, count) as back, T.vectorized(0, self.lanes) as x:
                step, lane = count - 1 - back, vector * self.lanes + x
                key = start + step
                logit = capped(self.attention, self.machine, logits[step, lane])
                for term in terms:
                    logit = logit + term.value(lane, step, key)
                for path, summed in zip(paths, sums, strict=True):
                    logit = T.bind(logit + path.slope * summed[x])
                    later = T.cast(key - (place.first + place.offset), "int32") > lane
                    link = T.bind(path.link(path.edges[step, lane]))
                    T.buffer_store(summed, summed[x] + T.Select(later, number(0.0), link), [x])
                logit = masked(self.attention, self.buffers, place, lane, key, logit)
                gone = hidden(self.attention, place, lane, key, stop)
                logit = T.bind(T.Select(gone, nothing(), logit))
                T.buffer_store(logits, logit, [step, lane])
                T.buffer_store(highest, T.max(highest[x], logit), [x])
            for path, summed in zip(paths, sums, strict=True):
                with T.vectorized(0, self.lanes) as x:
                    T.buffer_store(path.sums, summed[x], [vector * self.lanes + x])
            with T.vectorized(0, self.lanes) as x:
                lane = vector * self.lanes + x
                T.buffer_store(shrink, exp(best[lane] - highest[x]), [lane])
                T.buffer_store(best, highest[x], [lane])

    def _weigh(self, logits: Any, count: Any, best: Any, total: Any, shrink: Any) -> None:
        """Turn logits into weights, and sum them."""
        with T.serial(0, self.vectors) as vector:
            sums = T.alloc_buffer((self.lanes,), "float32", scope="local")
            with T.vectorized(0, self.lanes) as x:
                T.buffer_store(sums, number(0.0), [x])
            with T.serial(0, count) as step, T.vectorized(0, self.lanes) as x:
                lane = vector * self.lanes + x
                weight = T.bind(exp(logits[step, lane] - best[lane]))
                T.buffer_store(logits, weight, [step, lane])
                T.buffer_store(sums, sums[x] + weight, [x])
            with T.vectorized(0, self.lanes) as x:
                lane = vector * self.lanes + x
                T.buffer_store(total, total[lane] * shrink[lane] + sums[x], [lane])

    def _sum_values(
        self, value_at: Callable[[Any, Any], Any], weights: Any, count: Any, shrink: Any, gathered: Any
    ) -> None:
        full, rest = divmod(self.attention.value_width, self.columns)
        if full:
            with T.serial(0, full) as tile:
                self._sum_columns(
                    tile * self.columns, self.columns, value_at, weights, count, shrink, gathered
                )
        if rest:
            self._sum_columns(full * self.columns, rest, value_at, weights, count, shrink, gathered)

    def _sum_columns(
        self,
        begin: Any,
        columns: int,
        value_at: Callable[[Any, Any], Any],
        weights: Any,
        count: Any,
        shrink: Any,
        gathered: Any,
    ) -> None:
        sums = T.alloc_buffer((columns, self.rows), "float32", scope="local")
        self._unrolled(columns, lambda column, lane: T.buffer_store(sums, number(0.0), [column, lane]))
        with T.serial(0, count) as step:
            factors = [T.bind(value_at(step, begin + column)) for column in range(columns)]
            self._unrolled(
                columns,
                lambda column, lane: T.buffer_store(
                    sums, sums[column, lane] + factors[column] * weights[step, lane], [column, lane]
                ),
            )

        def add(column: int, lane: Any) -> None:
            before = gathered[begin + column, lane] * shrink[lane]
            T.buffer_store(gathered, before + sums[column, lane], [begin + column, lane])

        self._unrolled(columns, add)

    def _finish(self, place: Place, gathered: Any, total: Any) -> None:
        """Store the quotients, zero for a query that has seen no key."""
        share = self.machine.make(self.rows)

        def store(lane: Any) -> None:
            some = total[lane] > number(0.0)
            T.buffer_store(share, T.Select(some, number(1.0) / total[lane], number(0.0)), [lane])

        self._lanes(store)
        width, dtype = self.attention.value_width, self.attention.output.dtype
        with T.serial(0, T.min(self.rows, place.queries - place.first)) as row:
            for begin, size in chunks(width, self.lanes):
                with T.vectorized(0, size) as x:
                    value = gathered[begin + x, row] * share[row]
                    at = [place.batch, place.head, place.first + row, begin + x]
                    T.buffer_store(self.output, cast(value, "float32", dtype), at)

    def _transposed(self, name: str, place: Place, width: int, factor: float) -> Any:
        """Return the queries of a block, one vector lane each, times a factor."""
        operand = self.attention.query
        buffer = T.alloc_buffer((width, self.rows), "float32", scope="global")
        with T.serial(0, self.rows) as row:
            at = [place.batch, place.head, place.query(row)]
            for begin, size in chunks(width, self.lanes):
                with T.vectorized(0, size) as x:
                    value = cast(self.buffers[name][(*at, begin + x)], operand.dtype, "float32")
                    T.buffer_store(buffer, value * number(factor), [begin + x, row])
        return buffer

    def _converted(self, name: str) -> Any:
        """Return room for a block of keys or values in float32, None where they are that."""
        operand = dict(self.attention.arguments)[name]
        if operand.dtype == "float32":
            return None
        return T.alloc_buffer((self.block, operand.shape[3]), "float32", scope="global")

    def _rows_of(
        self, name: str, converted: Any, place: Place, start: Any, count: Any
    ) -> Callable[[Any, Any], Any]:
        """Return how a block of keys or values is read: (number in the block, coordinate) to float32."""
        buffer, operand = self.buffers[name], dict(self.attention.arguments)[name]
        head = T.bind(place.head // (self.attention.heads // self.attention.kv_heads))
        if converted is None:
            return lambda step, column: buffer[place.batch, head, start + step, column]
        width = operand.shape[3]
        assert isinstance(width, int), "checked"
        with T.serial(0, count) as step:
            for begin, size in chunks(width, self.lanes):
                with T.vectorized(0, size) as x:
                    value = T.cast(buffer[place.batch, head, start + step, begin + x], "float32")
                    T.buffer_store(converted, value, [step, begin + x])
        return lambda step, column: converted[step, column]

    def _lanes(self, body: Callable[[Any], Any]) -> None:
        """Write a statement for all queries of the block, a vector at a time."""
        with T.serial(0, self.vectors) as vector, T.vectorized(0, self.lanes) as x:
            body(vector * self.lanes + x)

    def _unrolled(self, count: int, body: Callable[[int, Any], Any]) -> None:
        """Write a statement for each vector of a tile of registers, whose numbers must be known to be registers."""
        for number_ in range(count):
            for vector in range(self.vectors):
                with T.vectorized(0, self.lanes) as x:
                    body(number_, vector * self.lanes + x)


def cpu_fits(registers: int, point: Mapping[str, int]) -> bool:
    """Whether the register tiles of both products stay in registers."""
    tile = max(point["keys"], point["columns"]) * point["vectors"]
    return tile + point["vectors"] + 1 <= registers
