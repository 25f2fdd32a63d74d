"""Both products of attention on the tensor cores of a GPU, in half precision with sums in float32.

Fragments are those of CUDA's wmma, 16 x 16 x 16, whose layout nobody needs to know. A warp works for its own 32
queries.
"""

from __future__ import annotations

from typing import Any, Final

from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.gpu_heads import Heads
from grape_compile.kernels.tensorir.loops import given, registers, strided
from grape_compile.kernels.tensorir.machines import Gpu
from grape_compile.kernels.tensorir.terms import Place

#: Rows, columns and depth of a fragment.
EDGE: Final = 16
WARP: Final = 32
#: Numbers between rows of keys beside their width: whole vectors, in other banks.
APART: Final = 8


class HeadsOnCores(Heads):
    """Keys and values as they come, weights rounded to half precision; a thread has all sums of its query."""

    def __init__(
        self, attention: Attention, buffers: dict[str, Any], place: Place, machine: Gpu, block: int
    ) -> None:
        super().__init__(attention, buffers, place, machine)
        self.block, self.rows, self.stride = block, machine.threads, self.width + APART
        self.queries, self.keys = self._halves(self.width * self.rows), self._halves(block * self.stride)
        self.values, self.weights = self._halves(block * self.value_width), self._halves(block * self.rows)
        self.products = machine.make(block * self.rows)
        self.partial = machine.make(self.value_width * self.rows)
        self.sums = T.alloc_buffer((self.value_width,), "float32", scope="local")
        self._copy(
            self.queries, self.width, self.rows, self.rows, lambda column, row: self.query(row, column)
        )
        with registers(self.value_width) as column:
            T.buffer_store(self.sums, number(0.0), [column])

    def read_block(self, start: Any) -> None:
        self._copy(
            self.keys,
            self.block,
            self.width,
            self.stride,
            lambda step, column: self.element("key", start + step, column),
        )
        self._copy(
            self.values,
            self.block,
            self.value_width,
            self.value_width,
            lambda step, column: self.element("value", start + step, column),
        )

    def multiply(self) -> None:
        self._multiply(
            self.keys, self.stride, "row_major", self.queries, self.width, self.block, self.products
        )

    def product(self, step: Any, row: Any) -> Any:
        return self.products[step * self.rows + row] * number(self.attention.factor)

    def keep(self, step: Any, row: Any, weight: Any) -> None:
        T.buffer_store(self.weights, T.cast(weight, "float16"), [step * self.rows + row])

    def sum_values(self, shrink: Any) -> None:
        self._multiply(
            self.values,
            self.value_width,
            "col_major",
            self.weights,
            self.block,
            self.value_width,
            self.partial,
        )
        thread = self.machine.thread
        with registers(self.value_width) as column:
            before = self.sums[column] * shrink[thread]
            T.buffer_store(self.sums, before + self.partial[column * self.rows + thread], [column])

    def finish(self, output: Any, share: Any) -> None:
        place, thread = self.place, self.machine.thread
        query = place.first + thread
        with given(query < place.queries), registers(self.value_width) as column:
            value = T.cast(self.sums[column] * share[thread], "float16")
            T.buffer_store(output, value, [place.batch, place.head, query, column])

    def _multiply(
        self, left: Any, stride: int, order: str, right: Any, depth: int, height: int, target: Any
    ) -> None:
        """Store left right, [height, rows]: left in rows, or in columns, `stride` apart; right [depth, rows]."""
        first = self.machine.thread // WARP * WARP
        a = T.alloc_buffer((EDGE * EDGE,), "float16", scope="wmma.matrix_a")
        sides = range(0, WARP, EDGE)
        bs = [T.alloc_buffer((EDGE * EDGE,), "float16", scope="wmma.matrix_b") for _ in sides]
        cs = [T.alloc_buffer((EDGE * EDGE,), "float32", scope="wmma.accumulator") for _ in sides]
        shape = (EDGE, EDGE, EDGE)
        with T.serial(0, height // EDGE) as down:
            for c in cs:
                T.evaluate(T.tvm_fill_fragment(c.data, *shape, 0, T.float32(0.0)))
            with T.serial(0, depth // EDGE) as along:
                across = (down, along) if order == "row_major" else (along, down)
                at = across[0] * (EDGE * stride) + across[1] * EDGE
                ours = self._pointer(left, "float16", at, EDGE * stride, "r")
                T.evaluate(T.tvm_load_matrix_sync(a.data, *shape, 0, ours, stride, order))
                for side, b, c in zip(sides, bs, cs, strict=True):
                    begin = along * (EDGE * self.rows) + first + side
                    theirs = self._pointer(right, "float16", begin, EDGE * self.rows, "r")
                    T.evaluate(T.tvm_load_matrix_sync(b.data, *shape, 0, theirs, self.rows, "row_major"))
                    T.evaluate(T.tvm_mma_sync(c.data, 0, a.data, 0, b.data, 0, c.data, 0))
            for side, c in zip(sides, cs, strict=True):
                begin = down * (EDGE * self.rows) + first + side
                there = self._pointer(target, "float32", begin, EDGE * self.rows, "w")
                T.evaluate(T.tvm_store_matrix_sync(c.data, *shape, 0, there, self.rows, "row_major"))

    def _pointer(self, buffer: Any, dtype: str, offset: Any, extent: int, access: str) -> Any:
        mask = {"r": 1, "w": 2}[access]
        return T.tvm_access_ptr(T.type_annotation(dtype), buffer.data, offset, extent, mask)

    def _halves(self, size: int) -> Any:
        return T.alloc_buffer((size,), "float16", scope="shared.dyn")

    def _copy(self, buffer: Any, height: int, width: int, stride: int, value: Any) -> None:
        with (
            strided(self.machine.thread, self.machine.threads, height * width) as (place, inside),
            given(inside),
        ):
            row, column = place // width, place % width
            T.buffer_store(buffer, value(row, column), [row * stride + column])


def cores_take(attention: Attention, architecture: str) -> bool:
    """Whether the tensor cores of a GPU take heads of this dtype and size."""
    operands = (attention.query, attention.key, attention.value)
    number_ = "".join(each for each in architecture if each.isdigit())
    return (
        all(operand.dtype == "float16" for operand in operands)
        and attention.width % EDGE == 0
        and attention.value_width % EDGE == 0
        and bool(number_)
        and int(number_) >= 70
    )
