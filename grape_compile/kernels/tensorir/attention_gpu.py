"""Attention on a GPU: one thread for each query of a block; products by tensor cores, or tiles of registers.

Queries, keys and logits of a block lie in shared memory, transposed, so that neighbouring threads read neighbouring
numbers; softmax is the work of the thread of the query. Blocks of keys come from the diagonal backwards, as the path of
GRAPE-AP needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from grape_compile.encoding import Accumulated
from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.decoding_gpu import DecodingOnGpu, decoding_numbers
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.gpu_cores import APART, HeadsOnCores, cores_take
from grape_compile.kernels.tensorir.gpu_heads import Heads, HeadsInRegisters, Tiles
from grape_compile.kernels.tensorir.loops import ceildiv, registers
from grape_compile.kernels.tensorir.machines import Gpu
from grape_compile.kernels.tensorir.operands import Sizes
from grape_compile.kernels.tensorir.path_terms import PathTerm, turned_edges
from grape_compile.kernels.tensorir.scans import running_sums
from grape_compile.kernels.tensorir.space import Point
from grape_compile.kernels.tensorir.terms import (
    Additive,
    Place,
    capped,
    hidden,
    key_range,
    masked,
    nothing,
    start_softmax,
    sums_name,
)

#: So many queries are taken one by one: they would leave most threads of a block without work.
FEW: Final = 4
#: Parts that the keys of a query may be taken in, and blocks that fill a large GPU.
SPLITS: Final = (1, 2, 4, 8, 16, 32)
FULL: Final = 256


class AttentionOnGpu:
    """The statements of one function, while it is being written.

    A block has `rows` queries and as many threads, and sees `block` keys at a time. `tile` is one edge of a tile of
    registers; with `cores` tensor cores take the products of the heads. The keys of few queries are split in `splits`.
    """

    def __init__(self, attention: Attention, point: Point) -> None:
        self.attention = attention
        self.rows, self.block, self.tile = point["rows"], point["block"], point["tile"]
        self.cores, self.splits = bool(point["cores"]), point["splits"]
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
        if are_few(attention):
            few = DecodingOnGpu(attention, self.buffers, self.output, self.rows, self.splits)
            few.write(self.batches, self.queries, self.length, edges)
        else:
            self._write_many(edges)

    def _write_many(self, edges: list[Any]) -> None:
        heads, blocks = self.attention.heads, ceildiv(self.queries, self.rows)
        with (
            T.thread_binding(0, blocks, thread="blockIdx.x") as number_,
            T.thread_binding(0, self.batches * heads, thread="blockIdx.y") as head,
            T.thread_binding(0, self.rows, thread="threadIdx.x") as thread,
        ):
            # The last queries see the most keys under a causal mask; they come first.
            place = Place(
                T.bind(head // heads),
                T.bind(head % heads),
                T.bind((blocks - 1 - number_) * self.rows),
                self.queries,
                self.length,
            )
            self._attend(place, Gpu(self.rows, thread), edges)

    def _attend(self, place: Place, machine: Gpu, edges: list[Any]) -> None:
        attention, rows, block = self.attention, self.rows, self.block
        tiles = Tiles(machine, block, self.tile)
        heads: Heads
        if self.cores:
            heads = HeadsOnCores(attention, self.buffers, place, machine, block)
        else:
            heads = HeadsInRegisters(attention, self.buffers, place, machine, tiles)
        shrink = machine.make(rows)
        best, total = (T.alloc_buffer((1,), "float32", scope="local") for _ in range(2))
        start_softmax(self.attention, self.buffers, place, best, total)
        terms = [Additive(bias, attention, self.buffers, place, machine, rows) for bias in attention.additive]
        for term in terms:
            term.make_keys(block)
        paths = [
            PathTerm(path, attention, self.buffers, place, machine, rows, block, edge)
            for path, edge in zip(attention.paths, edges, strict=True)
        ]
        steps = [tiles.make(path.dim) for path in paths]
        first, stop = key_range(attention, place, rows)
        with T.serial(0, T.max(ceildiv(stop, block) - first // block, 0)) as back:
            start = T.bind((ceildiv(stop, block) - 1 - back) * block)
            heads.read_block(start)
            for term in terms:
                term.read_keys(start, block)
            heads.multiply()
            for path, step_edges in zip(paths, steps, strict=True):

                def edge(step: Any, column: Any, path: PathTerm = path, start: Any = start) -> Any:
                    return path.edge(place.key(start + step), column)

                tiles.fill(step_edges, path.dim, edge)
                tiles.multiply(step_edges, path.queries, path.dim, path.edges)
            self._softmax(place, machine, start, stop, terms, paths, heads, best, total, shrink)
            heads.sum_values(shrink)
        # A query that has seen no key gets zero.
        share = T.Select(total[0] > number(0.0), number(1.0) / total[0], number(0.0))
        T.buffer_store(shrink, share, [machine.thread])
        heads.finish(self.output, shrink)

    def _softmax(
        self,
        place: Place,
        machine: Gpu,
        start: Any,
        stop: Any,
        terms: list[Additive],
        paths: list[PathTerm],
        heads: Heads,
        best: Any,
        total: Any,
        shrink: Any,
    ) -> None:
        """Turn the products of the thread's query into weights, and merge their sum into that of the blocks before.

        Along a path the sums of a key are those of all later ones (GRAPE 5.1), so keys come from the last to the first.
        """
        attention, row = self.attention, machine.thread
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
            logit = capped(attention, machine, heads.product(step, row))
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
            heads.keep(step, row, weight)
            T.buffer_store(weights, weights[0] + weight, [0])
        T.buffer_store(total, total[0] * less[0] + weights[0], [0])


def are_few(attention: Attention) -> bool:
    """Whether it is known now that there are few queries: a condition around a launch is not to be had."""
    queries = attention.query.shape[2]
    return isinstance(queries, int) and queries <= FEW


def splits_of(attention: Attention, threads: int) -> int:
    """Return in how many parts the keys of a query are taken where nothing has been measured: 1 for many queries.

    So many that blocks of `threads` fill a large GPU twice over, and none is without a key of its own.
    """
    if not are_few(attention):
        return 1
    batches, heads, queries, _ = (size if isinstance(size, int) else 1 for size in attention.query.shape)
    keys = attention.key.shape[2]
    most = min(max(FULL // (batches * heads * queries), 1), SPLITS[-1])
    if isinstance(keys, int):
        most = min(most, max(keys // threads, 1))
    return max(each for each in SPLITS if each <= most)


def gpu_fits(attention: Attention, architecture: str, limit: int, point: Mapping[str, int]) -> bool:
    """Whether a block's threads share its groups evenly, and its numbers fit into shared memory of `limit` bytes."""
    rows, block, tile = point["rows"], point["block"], point["tile"]
    if rows % (tile * tile) or block % tile:
        return False
    if are_few(attention):
        smallest = (block, tile, point["cores"]) == (32, 4, 0)
        return smallest and 4 * decoding_numbers(attention, rows) <= limit
    if point["splits"] > 1:
        return False
    width, value_width = attention.width, attention.value_width
    numbers = block * rows + rows
    if point["cores"]:
        if not cores_take(attention, architecture):
            return False
        halves = width * rows + block * (width + APART + value_width + rows)
        numbers += halves // 2 + value_width * rows
    else:
        numbers += width * rows + block * (width + 1 + value_width)
    for path in attention.paths:
        numbers += block * rows + path.dim * rows + block * (path.dim + 1) + 2 * rows
    for bias in attention.additive:
        numbers += attention.axes(bias) * (rows + block) + rows
    return 4 * numbers <= limit
