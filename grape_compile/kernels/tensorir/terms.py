"""What biases and masks add to the logit of a query and a key, element by element.

Times count from the first query of a block: differences of large numbers are made in float64, and close to the
diagonal, where they matter, the rest is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from grape_compile.encoding import (
    Accumulated,
    AlibiSlopes,
    Bias,
    Constant,
    Learned,
    Signed,
    Slopes,
    Steps,
    Table,
    Uniform,
)
from grape_compile.kernels.tensorir.arithmetic import number, tanh
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import T
from grape_compile.kernels.tensorir.machines import Machine
from grape_compile.kernels.tensorir.operands import Operand, read

#: The lowest finite number: a maximum over no keys, and what numbers of a mask may at most take away.
LOWEST: Final = -3.4028234663852886e38


@dataclass(frozen=True)
class Place:
    """Where a block of queries stands: its batch, head, first query, and the number of queries and keys."""

    batch: Any
    head: Any
    first: Any
    queries: Any
    keys: Any

    @property
    def offset(self) -> Any:
        """Key number of query 0."""
        return self.keys - self.queries

    def query(self, row: Any) -> Any:
        """Number of a query of the block, the last one for rows behind it."""
        return T.min(self.first + row, self.queries - 1)

    def key(self, number: Any) -> Any:
        """Number of a key, within those that are there."""
        return T.max(T.min(number, self.keys - 1), 0)


class Slope:
    """The slope of the head at hand."""

    def __init__(self, slopes: Slopes, attention: Attention, buffers: dict[str, Any], place: Place) -> None:
        self.value = T.bind(_slope(slopes, attention, buffers, place))


def _slope(slopes: Slopes, attention: Attention, buffers: dict[str, Any], place: Place) -> Any:
    match slopes:
        case Learned(slot) | Table(slot):
            return read(buffers[slot], attention.slots[slot], [place.batch, place.head], "float32")
        case Uniform(slope):
            return number(slope)
        case AlibiSlopes() | Constant():
            found = number(slopes.values()[-1])
            for head, slope in reversed(list(enumerate(slopes.values()[:-1]))):
                found = T.Select(place.head == head, number(slope), found)
            return found
    raise AssertionError(f"{slopes} are neither closed nor in a tensor")


class Additive:
    """One additive bias in one block of queries (GRAPE 4.2, 4.6, App. C, App. G)."""

    def __init__(
        self,
        bias: Bias,
        attention: Attention,
        buffers: dict[str, Any],
        place: Place,
        machine: Machine,
        rows: int,
    ) -> None:
        self.bias, self.attention, self.buffers = bias, attention, buffers
        self.place, self.machine, self.rows = place, machine, rows
        self.slope = Slope(bias.slopes, attention, buffers, place).value
        self.steps = isinstance(bias.clock, Steps)
        self.bases: list[Any] = []
        self.query_times: list[Any] = []
        self.key_times: list[Any] = []
        if not self.steps:
            self._read_queries()
        self.query_gate = self._gate_of_queries()

    def _read_queries(self) -> None:
        place = self.place
        for axis in range(self.attention.axes(self.bias)):
            base = T.bind(self._time(axis, place.key(place.first + place.offset)))
            times = self.machine.make(self.rows)

            def apart(row: Any, axis: int = axis, base: Any = base) -> Any:
                at = place.key(place.query(row) + place.offset)
                return T.cast(self._time(axis, at) - base, "float32")

            self.machine.fill(times, (self.rows,), apart)
            self.bases.append(base)
            self.query_times.append(times)

    def _gate_of_queries(self) -> Any:
        gate = self.bias.gate
        if gate is None or gate.query is None:
            return None
        name, place = gate.query, self.place
        numbers = self.machine.make(self.rows)

        def one(row: Any) -> Any:
            at = [place.batch, place.head, place.query(row)]
            return read(self.buffers[name], self.attention.slots[name], at, "float32")

        self.machine.fill(numbers, (self.rows,), one)
        return numbers

    def make_keys(self, block: int) -> None:
        """Make room for the times of a block of keys."""
        self.key_times = [self.machine.make(block) for _ in self.bases]

    def read_keys(self, start: Any, block: int) -> None:
        """Read the times of the keys from number `start` on."""
        for axis, (base, times) in enumerate(zip(self.bases, self.key_times, strict=True)):

            def apart(row: Any, axis: int = axis, base: Any = base) -> Any:
                return T.cast(self._time(axis, self.place.key(start + row)) - base, "float32")

            self.machine.fill(times, (block,), apart)

    def value(self, row: Any, step: Any, key: Any) -> Any:
        """Return the bias of a row of the block and key number `key`, the block's number `step`."""
        apart = [self._apart(axis, row, step, key) for axis in range(max(len(self.bases), 1))]
        if isinstance(self.bias.distance, Signed):
            distance = apart[0]
        elif len(apart) == 1:
            distance = -_size(apart[0])
        else:
            squares = [T.bind(each) for each in apart]
            distance = -T.sqrt(sum(each * each for each in squares[1:]) + squares[0] * squares[0])
        return (
            self.slope * distance if self.bias.gate is None else self.slope * self._gate(row, key) * distance
        )

    def _apart(self, axis: int, row: Any, step: Any, key: Any) -> Any:
        if self.steps:
            ahead = T.cast(key - (self.place.first + self.place.offset), "float32")
            return ahead - T.cast(row, "float32")
        return self.key_times[axis][step] - self.query_times[axis][row]

    def _gate(self, row: Any, key: Any) -> Any:
        gate = self.bias.gate
        assert gate is not None, "asked for one"
        found = [] if self.query_gate is None else [self.query_gate[row]]
        if gate.key is not None:
            at = [self.place.batch, self.place.head, self.place.key(key)]
            found.append(read(self.buffers[gate.key], self.attention.slots[gate.key], at, "float32"))
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _time(self, axis: int, key: Any) -> Any:
        """Return the time of a key in float64."""
        (slot,) = self.bias.clock.slots
        operand = self.attention.slots[slot]
        buffer = self.buffers[slot]
        if isinstance(self.bias.clock, Accumulated):
            buffer, operand = (
                self.buffers[sums_name(slot, self.bias.clock.inclusive)],
                Operand(operand.shape, "float64"),
            )
        lead = [axis] if self.attention.has_axes(self.bias) else []
        rank = len(operand.shape) - len(lead)
        at = [key] if rank == 1 else [self.place.batch, key] if rank == 2 else None
        return read(buffer, operand, [*lead, *(at or [self.place.batch, self.place.head, key])], "float64")


def sums_name(slot: str, inclusive: bool) -> str:
    """Return the name of the running sums of a slot."""
    return f"{slot}, summed" if inclusive else f"{slot}, summed before"


def capped(attention: Attention, machine: Machine, product: Any) -> Any:
    """Return cap tanh(x / cap) of a scaled product x, itself without a cap."""
    if attention.cap is None:
        return product
    return number(attention.cap) * tanh(product * number(1.0 / attention.cap), machine.exp)


def key_range(attention: Attention, place: Place, rows: int) -> tuple[Any, Any]:
    """Return the first key that some query of a block of `rows` may see, and the number behind the last."""
    first: Any = T.int32(0)
    stop = place.keys
    if attention.is_causal:
        stop = T.max(T.min(place.first + rows + place.offset, place.keys), 0)
    if attention.window is not None:
        first = T.max(place.first + place.offset - (attention.window - 1), 0)
    return T.bind(first), T.bind(stop)


def hidden(attention: Attention, place: Place, row: Any, key: Any, stop: Any) -> Any:
    """Return whether a key of at least `stop`, or by causality or window, is not seen by a row of the block."""
    # Small numbers: the rows of a block are lanes of a vector.
    ahead = T.cast(key - (place.first + place.offset), "int32")
    found = key >= stop
    if attention.is_causal:
        found = T.Or(found, ahead > row)
    if attention.window is not None:
        found = T.Or(found, ahead <= row - attention.window)
    return found


def masked(
    attention: Attention, buffers: dict[str, Any], place: Place, row: Any, key: Any, logit: Any
) -> Any:
    """Return a logit under the mask, minus infinity where that hides the key."""
    if attention.mask is None:
        return logit
    at = [place.batch, place.head, place.query(row), place.key(key)]
    if attention.mask.dtype == "bool":
        seen = read(buffers["mask"], attention.mask, at, "bool")
        return T.Select(seen, logit, nothing())
    added = T.bind(read(buffers["mask"], attention.mask, at, "float32"))
    sum_ = T.max(logit + added, number(LOWEST))
    return T.Select(added < number(LOWEST), nothing(), sum_)


def start_softmax(attention: Attention, buffers: dict[str, Any], place: Place, best: Any, total: Any) -> None:
    """Write the largest logit and the sum of weights before the first key: those of the sink, where there is one."""
    if attention.sinks is None:
        T.buffer_store(best, number(LOWEST), [0])
        T.buffer_store(total, number(0.0), [0])
        return
    sink = read(buffers["sinks"], attention.sinks, [place.batch, place.head], "float32")
    T.buffer_store(best, sink, [0])
    T.buffer_store(total, number(1.0), [0])


def nothing() -> Any:
    """Return minus infinity."""
    return T.float32(float("-inf"))


def _size(x: Any) -> Any:
    given = T.bind(x)
    return T.max(given, -given)
