"""One query at a time on a CPU: each key and value is read once, for all heads that share it.

Coordinates are lanes of the products, keys are lanes of the softmax.
"""

from __future__ import annotations

from typing import Any

from grape_compile.kernels.tensorir.arithmetic import exp, number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.loops import cast, ceildiv, chunks
from grape_compile.kernels.tensorir.machines import Cpu
from grape_compile.kernels.tensorir.operands import read
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
)


class DecodingOnCpu:
    """The statements for a few queries, into a function whose buffers are there; `block` keys are one piece."""

    def __init__(
        self, attention: Attention, buffers: dict[str, Any], output: Any, lanes: int, block: int
    ) -> None:
        self.attention, self.buffers, self.output = attention, buffers, output
        self.lanes, self.machine = lanes, Cpu(lanes)
        self.block = -(-block // lanes) * lanes
        self.groups = attention.heads // attention.kv_heads

    def write(self, batches: Any, queries: Any, keys: Any, edges: list[Any]) -> None:
        kv_heads = self.attention.kv_heads
        with T.parallel(0, batches * (kv_heads * queries)) as number_:
            batch = T.bind(number_ // (kv_heads * queries))
            kv_head = T.bind(number_ // queries % kv_heads)
            row = T.bind(number_ % queries)
            self._attend(batch, kv_head, row, queries, keys, edges)

    def _attend(self, batch: Any, kv_head: Any, row: Any, queries: Any, keys: Any, edges: list[Any]) -> None:
        attention, groups = self.attention, self.groups
        turned = self._queries(batch, kv_head, row)
        best, total = (T.alloc_buffer((groups,), "float32", scope="global") for _ in range(2))
        gathered = T.alloc_buffer((groups, attention.value_width), "float32", scope="global")
        suffix = [T.alloc_buffer((groups,), "float32", scope="global") for _ in attention.paths]
        with T.serial(0, groups) as group:
            self._start(batch, kv_head * groups + group, group, best, total)
            for sums in suffix:
                T.buffer_store(sums, number(0.0), [group])
            with T.serial(0, attention.value_width) as column:
                T.buffer_store(gathered, number(0.0), [group, column])
        logits = self.machine.make(self.block)
        first, stop = key_range(attention, Place(batch, kv_head, row, queries, keys), 1)
        block = self.block
        with T.serial(0, T.max(ceildiv(stop, block) - first // block, 0)) as back:
            start = T.bind((ceildiv(stop, block) - 1 - back) * block)
            count = T.bind(T.min(block, stop - start))
            with T.serial(0, groups) as group:
                place = Place(batch, T.bind(kv_head * groups + group), row, queries, keys)
                self._products(turned, batch, kv_head, group, start, count, logits)
                self._bias(place, group, start, stop, count, logits, edges, suffix)
                self._merge(batch, kv_head, group, start, count, logits, best, total, gathered)
        with T.serial(0, groups) as group:
            some = total[group] > number(0.0)
            share = T.bind(T.Select(some, number(1.0) / total[group], number(0.0)))
            at = [batch, kv_head * groups + group, row]
            for begin, size in chunks(attention.value_width, self.lanes):
                with T.vectorized(0, size) as x:
                    value = gathered[group, begin + x] * share
                    T.buffer_store(
                        self.output, cast(value, "float32", attention.output.dtype), [*at, begin + x]
                    )

    def _queries(self, batch: Any, kv_head: Any, row: Any) -> Any:
        attention = self.attention
        turned = T.alloc_buffer((self.groups, attention.width), "float32", scope="global")
        with T.serial(0, self.groups) as group:
            at = [batch, kv_head * self.groups + group, row]
            for begin, size in chunks(attention.width, self.lanes):
                with T.vectorized(0, size) as x:
                    value = cast(self.buffers["query"][(*at, begin + x)], attention.query.dtype, "float32")
                    T.buffer_store(turned, value * number(attention.factor), [group, begin + x])
        return turned

    def _start(self, batch: Any, head: Any, group: Any, best: Any, total: Any) -> None:
        sinks = self.attention.sinks
        if sinks is None:
            T.buffer_store(best, number(LOWEST), [group])
            T.buffer_store(total, number(0.0), [group])
            return
        T.buffer_store(best, read(self.buffers["sinks"], sinks, [batch, head], "float32"), [group])
        T.buffer_store(total, number(1.0), [group])

    def _products(
        self, turned: Any, batch: Any, kv_head: Any, group: Any, start: Any, count: Any, logits: Any
    ) -> None:
        """Store the products of one query and the keys of a piece."""
        attention, key = self.attention, self.buffers["key"]
        pieces = chunks(attention.width, self.lanes)
        with T.serial(0, count) as step:
            sums = T.alloc_buffer((self.lanes,), "float32", scope="local")
            with T.vectorized(0, self.lanes) as x:
                T.buffer_store(sums, number(0.0), [x])
            for begin, size in pieces:
                with T.vectorized(0, size) as x:
                    value = cast(key[batch, kv_head, start + step, begin + x], attention.key.dtype, "float32")
                    T.buffer_store(sums, sums[x] + turned[group, begin + x] * value, [x])
            T.buffer_store(logits, self._total(sums), [step])

    def _total(self, sums: Any) -> Any:
        """Return the sum over the lanes of a vector, by halves."""
        size = self.lanes
        while size > 1:
            size //= 2
            with T.vectorized(0, size) as x:
                T.buffer_store(sums, sums[x] + sums[size + x], [x])
        return sums[0]

    def _bias(
        self,
        place: Place,
        group: Any,
        start: Any,
        stop: Any,
        count: Any,
        logits: Any,
        edges: list[Any],
        suffix: list[Any],
    ) -> None:
        """Add biases and masks to the products of a piece; keys behind `count` become minus infinity."""
        attention, block = self.attention, self.block
        terms = [
            Additive(bias, attention, self.buffers, place, self.machine, 1) for bias in attention.additive
        ]
        for term in terms:
            term.make_keys(block)
            term.read_keys(start, block)
        paths = [
            self._path(number_, place, group, start, count, edges, suffix) for number_ in range(len(edges))
        ]
        with T.serial(0, block // self.lanes) as vector, T.vectorized(0, self.lanes) as x:
            step = vector * self.lanes + x
            key = start + step
            logit = capped(attention, self.machine, logits[step])
            for term in terms:
                logit = logit + term.value(0, step, key)
            for slope, sums in paths:
                logit = logit + slope * sums[step]
            logit = masked(attention, self.buffers, place, 0, key, logit)
            gone = hidden(attention, place, 0, key, stop)
            T.buffer_store(logits, T.Select(gone, nothing(), logit), [step])

    def _path(
        self,
        number_: int,
        place: Place,
        group: Any,
        start: Any,
        count: Any,
        edges: list[Any],
        suffix: list[Any],
    ) -> tuple[Any, Any]:
        """Return slope and sums along the path of the keys of a piece, from its last key to its first (GRAPE 5.1)."""
        path = PathTerm(
            self.attention.paths[number_],
            self.attention,
            self.buffers,
            place,
            self.machine,
            1,
            self.block,
            edges[number_],
        )
        with T.serial(0, self.block) as step:
            product = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(product, number(0.0), [0])
            with T.serial(0, path.dim) as column:
                component = path.edge(place.key(start + step), column)
                T.buffer_store(product, product[0] + component * path.queries[column, 0], [0])
            T.buffer_store(path.edges, product[0], [step, 0])
        with T.serial(0, self.block // self.lanes) as vector, T.vectorized(0, self.lanes) as x:
            step = vector * self.lanes + x
            later = T.cast(start + step - (place.first + place.offset), "int32") > 0
            link = T.bind(path.link(path.edges[step, 0]))
            T.buffer_store(path.edges, T.Select(later, number(0.0), link), [step, 0])
        sums = self.machine.make(self.block)
        with T.serial(0, count) as back:
            step = count - 1 - back
            T.buffer_store(sums, suffix[number_][group], [step])
            T.buffer_store(suffix[number_], suffix[number_][group] + path.edges[step, 0], [group])
        return path.slope, sums

    def _merge(
        self,
        batch: Any,
        kv_head: Any,
        group: Any,
        start: Any,
        count: Any,
        logits: Any,
        best: Any,
        total: Any,
        gathered: Any,
    ) -> None:
        """Merge the softmax of a piece into that of the pieces before."""
        vectors = self.block // self.lanes
        high, sums = (T.alloc_buffer((self.lanes,), "float32", scope="local") for _ in range(2))
        with T.vectorized(0, self.lanes) as x:
            T.buffer_store(high, best[group], [x])
        with T.serial(0, vectors) as vector, T.vectorized(0, self.lanes) as x:
            T.buffer_store(high, T.max(high[x], logits[vector * self.lanes + x]), [x])
        size = self.lanes
        while size > 1:
            size //= 2
            with T.vectorized(0, size) as x:
                T.buffer_store(high, T.max(high[x], high[size + x]), [x])
        highest = T.bind(high[0])
        shrink = T.bind(exp(best[group] - highest))
        with T.vectorized(0, self.lanes) as x:
            T.buffer_store(sums, number(0.0), [x])
        with T.serial(0, vectors) as vector, T.vectorized(0, self.lanes) as x:
            step = vector * self.lanes + x
            weight = T.bind(exp(logits[step] - highest))
            T.buffer_store(logits, weight, [step])
            T.buffer_store(sums, sums[x] + weight, [x])
        T.buffer_store(total, total[group] * shrink + self._total(sums), [group])
        T.buffer_store(best, highest, [group])
        self._sum_values(batch, kv_head, group, start, count, logits, shrink, gathered)

    def _sum_values(
        self,
        batch: Any,
        kv_head: Any,
        group: Any,
        start: Any,
        count: Any,
        weights: Any,
        shrink: Any,
        gathered: Any,
    ) -> None:
        attention, value = self.attention, self.buffers["value"]
        pieces = chunks(attention.value_width, self.lanes)
        sums = [T.alloc_buffer((size,), "float32", scope="local") for _, size in pieces]
        for buffer, (_, size) in zip(sums, pieces, strict=True):
            with T.vectorized(0, size) as x:
                T.buffer_store(buffer, number(0.0), [x])
        with T.serial(0, count) as step:
            for buffer, (begin, size) in zip(sums, pieces, strict=True):
                with T.vectorized(0, size) as x:
                    one = cast(
                        value[batch, kv_head, start + step, begin + x], attention.value.dtype, "float32"
                    )
                    T.buffer_store(buffer, buffer[x] + weights[step] * one, [x])
        for buffer, (begin, size) in zip(sums, pieces, strict=True):
            with T.vectorized(0, size) as x:
                before = gathered[group, begin + x] * shrink
                T.buffer_store(gathered, before + buffer[x], [group, begin + x])
