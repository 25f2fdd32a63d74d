"""The path of GRAPE-AP: its edges, made before attention, and what one block of queries keeps of them."""

from __future__ import annotations

from typing import Any

from grape_compile.encoding import LogSigmoid, NegativeExp, PathBias
from grape_compile.kernels.tensorir.arithmetic import log_sigmoid, number
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T, workspace
from grape_compile.kernels.tensorir.loops import product
from grape_compile.kernels.tensorir.machines import Machine
from grape_compile.kernels.tensorir.operands import Operand, read
from grape_compile.kernels.tensorir.rotation import turn
from grape_compile.kernels.tensorir.terms import Place, Slope


def turned_edges(path: PathBias, attention: Attention, buffers: dict[str, Any], machine: Machine) -> Any:
    """Write the edges of all keys, by their root mean square where asked, and turned; return their buffer."""
    operand = attention.slots[path.key]
    shape = [*buffers[path.key].shape]
    edges = workspace("edges", shape, "float32")
    with machine.deal(product(shape[:-1])) as row:
        at: list[Any] = []
        for size in reversed(shape[:-1]):
            at, row = [row % size, *at], row // size

        def component(column: Any) -> Any:
            return read(buffers[path.key], operand, [*at, column], "float32")

        factor = T.bind(by_size(component, path.dim) if path.normalised != "none" else number(1.0))
        with T.serial(0, path.dim) as column:
            T.buffer_store(edges, component(column) * factor, [*at, column])
    if path.turn is None:
        return edges
    turned = workspace("turned", shape, "float32")
    slots = {slot: attention.slots[slot] for slot in path.turn.slots}
    turn(path.turn, Operand(operand.shape), slots, edges, buffers, turned, machine)
    return turned


class PathTerm:
    """What a path adds to the logits of one block of queries (GRAPE 5.1-5.2)."""

    def __init__(
        self,
        path: PathBias,
        attention: Attention,
        buffers: dict[str, Any],
        place: Place,
        machine: Machine,
        rows: int,
        block: int,
        edges: Any,
    ) -> None:
        self.path, self.place, self.machine, self.dim, self._edges = path, place, machine, path.dim, edges
        self._operand = Operand(attention.slots[path.key].shape)
        self.slope = Slope(path.slopes, attention, buffers, place).value
        self.sums = machine.make(rows)
        machine.fill(self.sums, (rows,), lambda row: number(0.0))
        self.edges = machine.make(block, rows)
        self.queries = self._read_queries(attention, buffers, rows)

    def _read_queries(self, attention: Attention, buffers: dict[str, Any], rows: int) -> Any:
        """Return the queries of the path, transposed and over `dim`."""
        path, place = self.path, self.place
        operand = attention.slots[path.query]
        queries = self.machine.make(path.dim, rows)
        sizes = self.machine.make(rows)

        def component(row: Any, column: Any) -> Any:
            at = [place.batch, place.head, place.query(row), column]
            return read(buffers[path.query], operand, at, "float32")

        def factor(row: Any) -> Any:
            over = number(1.0 / path.dim)
            if path.normalised != "both":
                return over
            return by_size(lambda column: component(row, column), path.dim) * over

        self.machine.fill(sizes, (rows,), factor)
        self.machine.fill(queries, (path.dim, rows), lambda column, row: component(row, column) * sizes[row])
        return queries

    def edge(self, key: Any, column: Any) -> Any:
        """Return a component of the edge of a key."""
        return read(self._edges, self._operand, [self.place.batch, self.place.head, key, column], "float32")

    def link(self, x: Any) -> Any:
        """Return g(x) (GRAPE 5.1)."""
        match self.path.link:
            case LogSigmoid():
                return log_sigmoid(x, self.machine.exp)
            case NegativeExp():
                return -self.machine.exp(x)
            case _:
                return x


def by_size(component: Any, dim: int) -> Any:
    """Return 1 / sqrt(mean(x^2) + 1e-6)."""
    total = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(total, number(0.0), [0])
    with T.serial(0, dim) as column:
        T.buffer_store(total, total[0] + component(column) * component(column), [0])
    return number(1.0) / T.sqrt(total[0] * number(1.0 / dim) + number(1e-6))
