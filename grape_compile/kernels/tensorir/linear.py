"""Products with the weights of a layer on a CPU: sums are lanes of vectors, so that weights are read as they lie."""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import Any, Final

from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.arithmetic import number
from grape_compile.kernels.tensorir.engine import (
    PrimFunc,
    T,
    Target,
    is_gpu,
    vector_lanes,
    vector_registers,
    writing,
)
from grape_compile.kernels.tensorir.loops import cast, ceildiv, chunks
from grape_compile.kernels.tensorir.operands import Operand, Sizes
from grape_compile.kernels.tensorir.space import Point, Space

#: Bytes of the rows of x that are kept near while all columns pass by.
_NEAR: Final = 1 << 18


def linear(
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    target: Target,
    point: Point | None = None,
    *,
    name: str = "linear",
) -> PrimFunc:
    """Return the function (x [M, K], weight [N, K], bias [N], y [M, N]) of y = x weight^T + bias.

    Products are summed in float32, by as many running sums as a vector has lanes, which are added pairwise at the end:
    the error grows with K over that. M may differ from call to call. Raises OperandError for other shapes, for float64
    and for a GPU.
    """
    chosen = _hand(target) if point is None else point
    _check(x, weight, bias, target)
    with writing(name) as finished:
        _Body(x, weight, bias, chosen).write()
    return finished[0]


def linear_space(
    x: Operand, weight: Operand, bias: Operand | None, target: Target, *, name: str = "linear"
) -> Space:
    """Return the schedules of `linear` for one target."""
    _check(x, weight, bias, target)
    registers = vector_registers(target)
    choices = {"lanes": (vector_lanes(target),), "rows": (1, 2, 3, 4, 5, 6), "columns": (2, 3, 4, 5, 6, 8)}

    def fits(point: Point) -> bool:
        return point["rows"] * point["columns"] + point["rows"] + 1 <= registers

    return Space(name, choices, _hand(target), partial(linear, x, weight, bias, target, name=name), fits)


def _hand(target: Target) -> Point:
    many = vector_registers(target) >= 32
    return {"lanes": vector_lanes(target), "rows": 2, "columns": 8 if many else 4}


def _check(x: Operand, weight: Operand, bias: Operand | None, target: Target) -> None:
    sizes = (*x.shape[1:], *weight.shape)
    fits = len(x.shape) == len(weight.shape) == 2 and all(isinstance(size, int) for size in sizes)
    dtypes = {x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype}
    if is_gpu(target) or not fits or sizes[0] != sizes[-1] or len(dtypes) != 1 or x.dtype == "float64":
        raise OperandError(
            f"a layer's product on {target.kind.name}",
            f"{x.dtype}{x.shape} and {weight.dtype}{weight.shape}",
            "x [M, K] and weight [N, K] of one dtype up to float32 on a CPU, N and K known",
        )


class _Body:
    """The statements of one function, while it is being written."""

    def __init__(self, x: Operand, weight: Operand, bias: Operand | None, point: Point) -> None:
        self.lanes, self.rows, self.columns = point["lanes"], point["rows"], point["columns"]
        self.dtype = x.dtype
        self.inner, self.outer = int(x.shape[1]), int(weight.shape[0])
        sizes = Sizes()
        self.x, self.weight = sizes.argument("x", x), sizes.argument("weight", weight)
        self.bias = None if bias is None else sizes.argument("bias", bias)
        self.y = sizes.argument("y", Operand((x.shape[0], weight.shape[0]), x.dtype))
        self.count = sizes.of(x.shape[0])

    def write(self) -> None:
        block = max(_NEAR // (4 * self.inner) // self.rows, 1) * self.rows
        whole, rest = divmod(self.outer, self.columns)
        tiles = whole + (1 if rest else 0)
        with T.parallel(0, ceildiv(self.count, block) * tiles) as task:
            first = T.bind(task // tiles * block)
            tile = T.bind(task % tiles)
            rows = T.bind(T.min(block, self.count - first))
            if not rest:
                self._columns(first, rows, tile * self.columns, self.columns)
            elif not whole:
                self._columns(first, rows, 0, rest)
            else:
                with T.If(tile < whole):
                    with T.Then():
                        self._columns(first, rows, tile * self.columns, self.columns)
                    with T.Else():
                        self._columns(first, rows, whole * self.columns, rest)

    def _columns(self, first: Any, rows: Any, column: Any, columns: int) -> None:
        """Write a tile of columns for all rows of a block: several rows at a time, then those that are left."""
        with T.serial(0, rows // self.rows) as tile:
            self._tile(first + tile * self.rows, self.rows, column, columns, 1)
        if self.rows > 1:
            with T.serial(0, rows % self.rows) as left:
                self._tile(first + rows // self.rows * self.rows + left, 1, column, columns, self.rows)

    def _tile(self, row: Any, rows: int, column: Any, columns: int, depth: int) -> None:
        """Sum rows x columns products, `depth` vectors of each at a time."""
        places = [(r, c, d) for r in range(rows) for c in range(columns) for d in range(depth)]
        sums = T.alloc_buffer((len(places), self.lanes), "float32", scope="local")
        for at in range(len(places)):
            with T.vectorized(0, self.lanes) as x:
                T.buffer_store(sums, number(0.0), [at, x])
        step = self.lanes * depth
        whole = self.inner // step
        if whole:
            with T.serial(0, whole) as turn:
                for at, (r, c, d) in enumerate(places):
                    with T.vectorized(0, self.lanes) as x:
                        k = turn * step + d * self.lanes + x
                        T.buffer_store(sums, sums[at, x] + self._product(row + r, column + c, k), [at, x])
        for begin in range(whole * step, self.inner, self.lanes):
            size = min(self.lanes, self.inner - begin)
            for at, (r, c, d) in enumerate(places):
                if d == (begin - whole * step) // self.lanes:
                    with T.vectorized(0, size) as x:
                        T.buffer_store(
                            sums, sums[at, x] + self._product(row + r, column + c, begin + x), [at, x]
                        )
        self._store(sums, row, rows, column, columns, depth)

    def _product(self, row: Any, column: Any, k: Any) -> Any:
        return cast(self.x[row, k], self.dtype, "float32") * cast(
            self.weight[column, k], self.dtype, "float32"
        )

    def _store(self, sums: Any, row: Any, rows: int, column: Any, columns: int, depth: int) -> None:
        """Add up the lanes of each sum, and the bias."""
        lanes = T.ramp(0, 1, self.lanes)
        totals = []
        for at in range(rows * columns):
            parts = [sums[at * depth + d, lanes] for d in range(depth)]
            totals.append(T.bind(reduce(add, parts)))
        folded = T.alloc_buffer((-(-len(totals) // self.lanes), self.lanes), "float32", scope="global")
        for group, (begin, size) in enumerate(chunks(len(totals), self.lanes)):
            vectors = totals[begin : begin + size]
            T.buffer_store(folded, _summed(vectors + vectors[-1:] * (self.lanes - size)), [group, lanes])
        for r in range(rows):
            with T.vectorized(0, columns) as c:
                at = r * columns + c
                total = folded[at // self.lanes, at % self.lanes]
                if self.bias is not None:
                    total = total + cast(self.bias[column + c], self.dtype, "float32")
                T.buffer_store(self.y, cast(total, "float32", self.dtype), [row + r, column + c])


def _summed(vectors: list[Any]) -> Any:
    """Return the vector of the sums of the lanes of as many vectors as each has lanes, a power of two.

    Half of them at a time: a vector that holds partial sums of a, where bit h of the lane is 0, and of b is
    (a_i or b_(i ^ h)) + (a_(i ^ h) or b_i).
    """
    count = len(vectors)
    half = count // 2
    while half:
        pairs = zip(vectors[:half], vectors[half : 2 * half], strict=True)
        lower = [i + (count - half if i & half else 0) for i in range(count)]
        upper = [i + (count if i & half else half) for i in range(count)]
        vectors = [T.bind(T.Shuffle([a, b], lower) + T.Shuffle([a, b], upper)) for a, b in pairs]
        half //= 2
    return vectors[0]
