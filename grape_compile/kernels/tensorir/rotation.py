"""Rotation in TensorIR: any planes, by tables or by angles that the function makes itself.

Cosines and sines are a stage of their own, for a tile of tokens, and serve all heads of that tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal

from grape_compile.encoding import (
    Accumulated,
    Encoding,
    Learned,
    Positions,
    Rotation,
    Steps,
    Table,
    Tables,
)
from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.arithmetic import cos_sin, number, quarter_turns
from grape_compile.kernels.tensorir.engine import PrimFunc, T, Target, is_gpu, vector_lanes, writing
from grape_compile.kernels.tensorir.loops import cast, ceildiv, chunks, given, product, strided
from grape_compile.kernels.tensorir.machines import Cpu, Gpu, Machine
from grape_compile.kernels.tensorir.operands import (
    Operand,
    Size,
    Sizes,
    Slots,
    check_floating,
    compute_dtype,
    read,
)
from grape_compile.kernels.tensorir.runs import Kept, Run, kept, runs
from grape_compile.kernels.tensorir.scans import running_sums
from grape_compile.kernels.tensorir.space import Point, Space

CPU_CHOICES: Final = {"tokens": (1, 4, 8, 16, 32, 64, 128), "lanes": (4, 8, 16, 32)}
GPU_CHOICES: Final = {"tokens": (1, 4, 8, 16, 32), "threads": (64, 128, 256, 512), "parts": (1, 2, 4, 8)}


def supports(encoding: Encoding) -> Literal[True] | str:
    """Rotations without a basis."""
    if not isinstance(encoding, Rotation):
        return "not a rotation of commuting planes"
    if encoding.basis is not None:
        return "a basis is a product of matrices before the rotation"
    return True


def rotation(
    encoding: Rotation,
    operand: Operand,
    slots: Slots,
    target: Target,
    point: Point | None = None,
    *,
    name: str = "rotate",
) -> PrimFunc:
    """Return the function (x, one tensor for each slot of `encoding`, y) that turns x [..., D] (GRAPE 3.1).

    Slots broadcast as those of `grape::rotate`, and `Steps` and `Accumulated` run along axis -2. Angles are products in
    float64, whose remainder of a quarter turn is rounded to float32; the tensor turns in float32 (float64 for
    float64) and is rounded once. Sizes that are names may differ from call to call. Raises OperandError for operands
    that do not fit the encoding, EncodingError for a spectrum that depends on the length.
    """
    call = _Call(encoding, operand, dict(slots))
    chosen = _hand(call, target) if point is None else point
    with writing(name) as finished:
        sizes = Sizes()
        x = sizes.argument("x", operand)
        buffers = {slot: sizes.argument(slot, slots[slot]) for slot in encoding.slots}
        body = _Body(call, chosen, x, buffers, sizes.argument("y", operand))
        if is_gpu(target):
            body.write_gpu()
        else:
            body.write_cpu()
    return finished[0]


def rotation_space(
    encoding: Rotation, operand: Operand, slots: Slots, target: Target, *, name: str = "rotate"
) -> Space:
    """Return the schedules of `rotation` for one target."""
    call = _Call(encoding, operand, dict(slots))
    write = partial(rotation, encoding, operand, slots, target, name=name)
    choices = GPU_CHOICES if is_gpu(target) else CPU_CHOICES
    return Space(name, choices, _hand(call, target), write, lambda point: True)


def _hand(call: _Call, target: Target) -> Point:
    if is_gpu(target):
        return {"tokens": 8, "threads": 256, "parts": 1}
    return {"tokens": 16, "lanes": vector_lanes(target)}


@dataclass(frozen=True)
class _Call:
    """A rotation, the tensor it turns and its slots, checked."""

    rotation: Rotation
    operand: Operand
    slots: dict[str, Operand]

    def __post_init__(self) -> None:
        refusal = supports(self.rotation)
        if refusal is not True:
            raise OperandError(
                f"{self.rotation} in TensorIR", refusal, "its decomposition into plain operators"
            )
        check_floating("the tensor", self.operand)
        if not self.operand.shape or self.operand.shape[-1] != self.rotation.head_dim:
            raise OperandError(
                f"{self.rotation} of a tensor",
                f"shape {self.operand.shape}",
                f"a last axis of {self.rotation.head_dim}",
            )
        missing = [slot for slot in self.rotation.slots if slot not in self.slots]
        if missing:
            raise OperandError(
                f"the tensors of {self.rotation}", f"none named {missing[0]}", ", ".join(self.rotation.slots)
            )
        for slot in self.rotation.slots:
            self._check(slot)

    @property
    def dtype(self) -> str:
        return compute_dtype(self.operand)

    @property
    def lead(self) -> tuple[Size, ...]:
        """All axes but the head."""
        return self.operand.shape[:-1]

    @property
    def has_axes(self) -> bool:
        """Whether the first axis of the clock numbers position axes."""
        return self.rotation.planes.axis_count > 1

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The axes of the tensor along which angles differ."""
        clock = self.rotation.clock
        found = set()
        if isinstance(clock, Steps | Accumulated) and len(self.lead) > 0:
            found.add(len(self.lead) - 1)
        for slot in self.rotation.slots:
            shape = self.over(slot)
            found |= {len(self.lead) - len(shape) + axis for axis, size in enumerate(shape) if size != 1}
        return tuple(sorted(found))

    def over(self, slot: str) -> tuple[Size, ...]:
        """The axes of a slot that stand over those of the tensor."""
        shape, clock = self.slots[slot].shape, self.rotation.clock
        if isinstance(clock, Positions | Accumulated) and slot == clock.slot:
            return shape[1:] if self.has_axes else shape
        return shape[:-1]

    def _check(self, slot: str) -> None:
        over = self.over(slot)
        pairs = zip(reversed(over), reversed(self.lead), strict=False)
        if len(over) > len(self.lead) or any(found not in (1, wanted) for found, wanted in pairs):
            raise OperandError(
                f"{slot} of {self.rotation}",
                f"{slot} has shape {self.slots[slot].shape} over a tensor {self.operand.shape}",
                "axes that broadcast to those of the tensor",
            )


def turn(
    rotation: Rotation,
    operand: Operand,
    slots: Slots,
    x: Any,
    buffers: Mapping[str, Any],
    y: Any,
    machine: Machine,
) -> None:
    """Write the rotation of a buffer into another, as a part of a larger function."""
    call = _Call(rotation, operand, dict(slots))
    if isinstance(machine, Cpu):
        _Body(call, {"tokens": 16, "lanes": machine.lanes}, x, buffers, y).write_cpu()
    else:
        _Body(call, {"tokens": 8, "threads": 128, "parts": 1}, x, buffers, y).write_gpu()


class _Body:
    """The statements of one function, while it is being written."""

    def __init__(self, call: _Call, point: Point, x: Any, buffers: Mapping[str, Any], y: Any) -> None:
        self.call, self.point = call, point
        self.rotation = call.rotation
        self.x, self.slots, self.y = x, buffers, y
        self.extents = [*x.shape][:-1]
        self.sums: Any = None
        self.tile = call.own[-1] if call.own else None
        self.shared = [axis for axis in range(len(call.lead)) if axis not in call.own]

    def write_cpu(self) -> None:
        tokens, lanes = self.point["tokens"], self.point["lanes"]
        if isinstance(self.rotation.clock, Accumulated):
            self._accumulate(Cpu(lanes))
        tokens = self._tokens(tokens)
        planes = self.rotation.planes.count
        with T.parallel(0, self._tiles(tokens)) as tile:
            at, start, count = self._place(tile, tokens)
            cos, sin = (T.alloc_buffer((tokens, planes), self.call.dtype, scope="global") for _ in range(2))
            theta = self._constants(T.alloc_buffer((planes,), "float64", scope="global"), None)
            with T.serial(0, count) as row:
                for run in runs(self.rotation):
                    for begin, size in chunks(run.count, lanes):
                        with T.vectorized(0, size) as step:
                            plane = run.first + begin + step
                            self._angle(self._row(at, start, row), row, plane, run.axis, theta, cos, sin)
            with ExitStack() as loops:
                for axis in self.shared:
                    at[axis] = loops.enter_context(T.serial(0, self.extents[axis]))
                row = loops.enter_context(T.serial(0, count))
                here = self._row(at, start, row)
                for run in runs(self.rotation):
                    for begin, size in chunks(run.count, lanes):
                        with T.vectorized(0, size) as step:
                            self._turn(here, row, run, begin + step, cos, sin)
                for piece in kept(self.rotation):
                    for begin, size in chunks(piece.count, lanes):
                        with T.vectorized(0, size) as step:
                            self._keep(here, piece, begin + step)

    def write_gpu(self) -> None:
        threads, parts = self.point["threads"], self.point["parts"]
        if isinstance(self.rotation.clock, Accumulated):
            self._accumulate(Gpu(threads))
        tokens, planes = self._tokens(self.point["tokens"]), self.rotation.planes.count
        others = product([self.extents[axis] for axis in self.shared])
        with ExitStack() as loops:
            tile = loops.enter_context(T.thread_binding(0, self._tiles(tokens), thread="blockIdx.x"))
            part = loops.enter_context(T.thread_binding(0, parts, thread="blockIdx.y"))
            thread = loops.enter_context(T.thread_binding(0, threads, thread="threadIdx.x"))
            at, start, count = self._place(tile, tokens)
            cos, sin = (T.alloc_buffer((tokens, planes), self.call.dtype, scope="shared") for _ in range(2))
            theta = self._constants(T.alloc_buffer((planes,), "float64", scope="shared"), thread)
            for run in runs(self.rotation):
                with strided(thread, threads, tokens * run.count) as (number, inside):
                    row, step = number // run.count, number % run.count
                    with given(inside, row < count):
                        here = self._row(at, start, row)
                        self._angle(here, row, run.first + step, run.axis, theta, cos, sin)
            with T.serial(0, ceildiv(others, parts)) as turn, given(T.likely(turn * parts + part < others)):
                self._split(at, turn * parts + part)
                for run in runs(self.rotation):
                    with strided(thread, threads, tokens * run.count) as (number, inside):
                        row, step = number // run.count, number % run.count
                        with given(inside, row < count):
                            self._turn(self._row(at, start, row), row, run, step, cos, sin)
                for piece in kept(self.rotation):
                    with strided(thread, threads, tokens * piece.count) as (number, inside):
                        row, step = number // piece.count, number % piece.count
                        with given(inside, row < count):
                            self._keep(self._row(at, start, row), piece, step)

    def _tokens(self, tokens: int) -> int:
        """The tokens of a tile: no more than there are."""
        if self.tile is None:
            return 1
        size = self.call.lead[self.tile]
        return min(tokens, size) if isinstance(size, int) else tokens

    def _tiles(self, tokens: int) -> Any:
        """Number of tiles: the axes along which angles differ, the last of them in pieces."""
        if self.tile is None:
            return 1
        others = product([self.extents[axis] for axis in self.call.own[:-1]])
        return others * ceildiv(self.extents[self.tile], tokens)

    def _place(self, tile: Any, tokens: int) -> tuple[list[Any], Any, Any]:
        """Return the indices of a tile, its first token and how many it has."""
        at: list[Any] = [0] * len(self.extents)
        if self.tile is None:
            return at, 0, 1
        pieces = ceildiv(self.extents[self.tile], tokens)
        start, rest = tile % pieces * tokens, tile // pieces
        for axis in reversed(self.call.own[:-1]):
            at[axis], rest = rest % self.extents[axis], rest // self.extents[axis]
        return at, start, T.min(tokens, self.extents[self.tile] - start)

    def _split(self, at: list[Any], number: Any) -> None:
        """Take the indices of the shared axes from their number."""
        for axis in reversed(self.shared):
            at[axis], number = number % self.extents[axis], number // self.extents[axis]

    def _row(self, at: Sequence[Any], start: Any, row: Any) -> list[Any]:
        return [start + row if axis == self.tile else index for axis, index in enumerate(at)]

    def _constants(self, buffer: Any, thread: Any) -> Any:
        """Fill a buffer with the frequencies that are known now."""
        spectrum = self.rotation.spectrum
        if spectrum is None or isinstance(spectrum, Learned | Table):
            return buffer
        with given(*([] if thread is None else [thread == 0])):
            for plane, theta in enumerate(spectrum.frequencies(self.rotation.planes.count)):
                T.buffer_store(buffer, T.float64(theta), [plane])
        return buffer

    def _angle(self, at: list[Any], row: Any, plane: Any, axis: int, theta: Any, cos: Any, sin: Any) -> None:
        """Store what one plane of one token turns by, times orientation and scale."""
        rotation, dtype = self.rotation, self.call.dtype
        if isinstance(rotation.clock, Tables):
            cosine, sine = (
                read(self.slots[slot], self.call.slots[slot], [*at, plane], dtype)
                for slot in (rotation.clock.cos, rotation.clock.sin)
            )
        else:
            angle = self._time(at, axis) * self._frequency(at, plane, theta)
            if dtype == "float64":
                cosine, sine = T.cos(angle), T.sin(angle)
            else:
                cosine, sine = cos_sin(*quarter_turns(angle))
        T.buffer_store(cos, cosine * number(rotation.scale, dtype), [row, plane])
        T.buffer_store(sin, sine * number(rotation.orientation * rotation.scale, dtype), [row, plane])

    def _time(self, at: list[Any], axis: int) -> Any:
        clock = self.rotation.clock
        if isinstance(clock, Positions):
            return read(self.slots[clock.slot], self._clock(clock.slot), self._over(axis, at), "float64")
        if isinstance(clock, Accumulated):
            return read(
                self.sums, Operand(self._clock(clock.slot).shape, "float64"), self._over(axis, at), "float64"
            )
        return T.cast(at[-1], "float64")

    def _clock(self, slot: str) -> Operand:
        return self.call.slots[slot]

    def _over(self, axis: int, at: list[Any]) -> list[Any]:
        """Indices of a clock: those of the tensor, and in front the number of its axis."""
        if not self.call.has_axes:
            return at
        slot = self.rotation.clock.slots[0]
        rank = len(self.call.slots[slot].shape) - 1
        return [axis, *at[len(at) - rank :]]

    def _frequency(self, at: list[Any], plane: Any, theta: Any) -> Any:
        spectrum = self.rotation.spectrum
        if isinstance(spectrum, Learned | Table):
            return read(self.slots[spectrum.slot], self.call.slots[spectrum.slot], [*at, plane], "float64")
        return theta[plane]

    def _turn(self, at: list[Any], row: Any, run: Run, step: Any, cos: Any, sin: Any) -> None:
        first, second, low, high = (
            start + stride * step for start, stride in zip(run.starts, run.strides, strict=True)
        )
        dtype, own = self.call.dtype, self.call.operand.dtype
        a, b = (cast(self.x[(*at, column)], own, dtype) for column in (first, second))
        c, s = (table[row, run.first + step] for table in (cos, sin))
        T.buffer_store(self.y, cast(c * a - s * b, dtype, own), [*at, low])
        T.buffer_store(self.y, cast(s * a + c * b, dtype, own), [*at, high])

    def _keep(self, at: list[Any], piece: Kept, step: Any) -> None:
        T.buffer_store(self.y, self.x[(*at, piece.source + step)], [*at, piece.target + step])

    def _accumulate(self, machine: Machine) -> None:
        clock = self.rotation.clock
        assert isinstance(clock, Accumulated), "another clock has nothing to sum"
        self.sums = running_sums(self.slots[clock.slot], clock.inclusive, machine)
