"""One query at a time on a GPU: a thread for each key of a piece, then for each coordinate of the value.

Keys pass through shared memory, so that they are read in the order in which they lie; maxima and sums over a piece are
made by every thread for itself, from numbers that all read at once. Pieces come from the last key backwards. Where
queries are too few to fill a GPU their keys are split among blocks, and a second kernel merges what each has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.gpu_parts import Parts
from grape_compile.kernels.tensorir.loops import cast, ceildiv, given, strided
from grape_compile.kernels.tensorir.machines import Gpu
from grape_compile.kernels.tensorir.path_terms import PathTerm
from grape_compile.kernels.tensorir.terms import (
    LOWEST,
    Additive,
    Place,
    capped,
    hidden,
    key_range,
    masked,
    nothing,
    start_softmax,
)


class DecodingOnGpu:
    """The statements for a few queries, into a function whose buffers are there; `threads` keys are one piece.

    The pieces of a query are dealt out to `splits` blocks.
    """

    def __init__(
        self, attention: Attention, buffers: dict[str, Any], output: Any, threads: int, splits: int
    ) -> None:
        self.attention, self.buffers, self.output = attention, buffers, output
        self.threads, self.splits = threads, splits
        self.columns = ceildiv(attention.value_width, threads)

    def write(self, batches: Any, queries: Any, keys: Any, edges: list[Any]) -> None:
        parts = Parts(self.attention, batches, queries, self.splits) if self.splits > 1 else None
        with self._blocks(batches, queries, keys, self.splits) as (place, part, machine):
            self._attend(place, machine, edges, part, parts)
        if parts is not None:
            with self._blocks(batches, queries, keys, 1) as (place, _, machine):
                parts.merge(self.buffers, self.output, place, machine)

    @contextmanager
    def _blocks(self, batches: Any, queries: Any, keys: Any, parts: int) -> Iterator[tuple[Place, Any, Gpu]]:
        """Launch a block for each query of each head and part of its keys."""
        heads = self.attention.heads
        with (
            T.thread_binding(0, batches * (heads * queries * parts), thread="blockIdx.x") as block,
            T.thread_binding(0, self.threads, thread="threadIdx.x") as thread,
        ):
            query = T.bind(block // parts)
            batch, head = T.bind(query // (heads * queries)), T.bind(query // queries % heads)
            place = Place(batch, head, T.bind(query % queries), queries, keys)
            yield place, block % parts, Gpu(self.threads, thread)

    def _attend(self, place: Place, machine: Gpu, edges: list[Any], part: Any, parts: Parts | None) -> None:
        attention, threads, thread, width = self.attention, self.threads, machine.thread, self.attention.width
        kv_head = T.bind(place.head // (attention.heads // attention.kv_heads))
        query, keys = machine.make(width), machine.make(threads * (width + 1))
        logits, weights = machine.make(threads), machine.make(threads)
        best, total, less, own = (T.alloc_buffer((1,), "float32", scope="local") for _ in range(4))
        sums = T.alloc_buffer((self.columns,), "float32", scope="local")
        machine.fill(query, (width,), lambda column: self._query(place, column))
        if parts is None:
            start_softmax(attention, self.buffers, place, best, total)
        else:
            T.buffer_store(best, number(LOWEST), [0])
            T.buffer_store(total, number(0.0), [0])
        for column in range(self.columns):
            T.buffer_store(sums, number(0.0), [column])
        terms = [Additive(bias, attention, self.buffers, place, machine, 1) for bias in attention.additive]
        for term in terms:
            term.make_keys(threads)
        paths = [
            PathTerm(path, attention, self.buffers, place, machine, 1, threads, edge)
            for path, edge in zip(attention.paths, edges, strict=True)
        ]
        later = [T.alloc_buffer((2,), "float32", scope="local") for _ in paths]
        for carried in later:
            T.buffer_store(carried, number(0.0), [0])
        first, stop = key_range(attention, place, 1)
        pieces = T.bind(T.max(ceildiv(stop, threads) - first // threads, 0))
        each = T.bind(ceildiv(pieces, self.splits))
        with T.serial(0, T.max(T.min(each, pieces - part * each), 0)) as back:
            start = T.bind((ceildiv(stop, threads) - 1 - part * each - back) * threads)
            self._read_keys(place, machine, kv_head, start, keys)
            for term in terms:
                term.read_keys(start, threads)
            T.buffer_store(own, number(0.0), [0])
            with T.serial(0, width) as column:
                T.buffer_store(own, own[0] + query[column] * keys[thread * (width + 1) + column], [0])
            for path, carried in zip(paths, later, strict=True):
                self._sum_path(path, place, thread, start, carried)
            self._finish_logit(place, machine, start, stop, terms, paths, later, own)
            T.buffer_store(logits, own[0], [thread])
            self._merge(machine, logits, weights, best, total, less, own)
            for column in range(self.columns):
                self._sum_values(place, kv_head, start, weights, less, sums, thread, column)
        if parts is not None:
            parts.keep(place, part, thread, best[0], total[0], [carried[0] for carried in later])
        for column in range(self.columns):
            at = thread + column * threads
            with given(at < attention.value_width):
                if parts is not None:
                    parts.keep_sum(place, part, at, sums[column])
                    continue
                share = T.Select(total[0] > number(0.0), number(1.0) / total[0], number(0.0))
                value = cast(sums[column] * share, "float32", attention.output.dtype)
                T.buffer_store(self.output, value, [place.batch, place.head, place.first, at])

    def _query(self, place: Place, column: Any) -> Any:
        value = self.buffers["query"][place.batch, place.head, place.first, column]
        return cast(value, self.attention.query.dtype, "float32") * number(self.attention.factor)

    def _read_keys(self, place: Place, machine: Gpu, kv_head: Any, start: Any, keys: Any) -> None:
        width, dtype = self.attention.width, self.attention.key.dtype
        with (
            strided(machine.thread, self.threads, self.threads * width) as (number_, inside),
            given(inside),
        ):
            step, column = number_ // width, number_ % width
            value = self.buffers["key"][place.batch, kv_head, place.key(start + step), column]
            T.buffer_store(keys, cast(value, dtype, "float32"), [step * (width + 1) + column])

    def _sum_path(self, path: PathTerm, place: Place, thread: Any, start: Any, carried: Any) -> None:
        """Sum the edges behind each key into carried[1], and those of the piece to carried[0] (GRAPE 5.1)."""
        product = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(product, number(0.0), [0])
        with T.serial(0, path.dim) as column:
            component = path.edge(place.key(start + thread), column)
            T.buffer_store(product, product[0] + component * path.queries[column, 0], [0])
        behind = T.cast(start + thread - (place.first + place.offset), "int32") > 0
        T.buffer_store(path.edges, T.Select(behind, number(0.0), path.link(product[0])), [thread, 0])
        piece = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(piece, number(0.0), [0])
        T.buffer_store(carried, carried[0], [1])
        with T.serial(0, self.threads) as back:
            step = self.threads - 1 - back
            edge = T.bind(path.edges[step, 0])
            T.buffer_store(carried, carried[1] + T.Select(step > thread, edge, number(0.0)), [1])
            T.buffer_store(piece, piece[0] + edge, [0])
        T.buffer_store(carried, carried[0] + piece[0], [0])

    def _finish_logit(
        self,
        place: Place,
        machine: Gpu,
        start: Any,
        stop: Any,
        terms: list[Additive],
        paths: list[PathTerm],
        later: list[Any],
        own: Any,
    ) -> None:
        """Add biases and mask to the product of the thread's key."""
        thread, attention = machine.thread, self.attention
        logit = capped(attention, machine, own[0])
        for term in terms:
            logit = logit + term.value(0, thread, start + thread)
        for path, carried in zip(paths, later, strict=True):
            logit = logit + path.slope * carried[1]
        T.buffer_store(own, logit, [0])
        logit = masked(attention, self.buffers, place, 0, start + thread, own[0])
        gone = hidden(attention, place, 0, start + thread, stop)
        T.buffer_store(own, T.Select(gone, nothing(), logit), [0])

    def _merge(
        self, machine: Gpu, logits: Any, weights: Any, best: Any, total: Any, less: Any, own: Any
    ) -> None:
        """Turn the logits of a piece into weights, and merge their sum into that of the pieces before."""
        highest, piece = (T.alloc_buffer((1,), "float32", scope="local") for _ in range(2))
        T.buffer_store(highest, best[0], [0])
        with T.serial(0, self.threads) as step:
            T.buffer_store(highest, T.max(highest[0], logits[step]), [0])
        T.buffer_store(less, machine.exp(best[0] - highest[0]), [0])
        T.buffer_store(best, highest[0], [0])
        T.buffer_store(weights, machine.exp(own[0] - highest[0]), [machine.thread])
        T.buffer_store(piece, number(0.0), [0])
        with T.serial(0, self.threads) as step:
            T.buffer_store(piece, piece[0] + weights[step], [0])
        T.buffer_store(total, total[0] * less[0] + piece[0], [0])

    def _sum_values(
        self,
        place: Place,
        kv_head: Any,
        start: Any,
        weights: Any,
        less: Any,
        sums: Any,
        thread: Any,
        column: int,
    ) -> None:
        # Threads behind the last coordinate do it again: all of a block wait together.
        at = T.min(thread + column * self.threads, self.attention.value_width - 1)
        piece = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(piece, number(0.0), [0])
        with T.serial(0, self.threads) as step:
            value = self.buffers["value"][place.batch, kv_head, place.key(start + step), at]
            value = cast(value, self.attention.value.dtype, "float32")
            T.buffer_store(piece, piece[0] + weights[step] * value, [0])
        T.buffer_store(sums, sums[column] * less[0] + piece[0], [column])


def decoding_numbers(attention: Attention, threads: int) -> int:
    """Return how many numbers a block shares."""
    numbers = attention.width + threads * (attention.width + 1) + 2 * threads
    for path in attention.paths:
        numbers += threads + path.dim + 2
    for bias in attention.additive:
        numbers += attention.axes(bias) * (threads + 1) + 1
    return numbers
