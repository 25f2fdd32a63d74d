"""Clocks and spectra as ONNX nodes: positions, angles, cosines and sines (GRAPE 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from grape_compile.encoding import Accumulated, Clock, Learned, Positions, Rotation, Spectrum, Table, Tables
from grape_compile.export.onnx.builder import (
    DOUBLE,
    Builder,
    Size,
    broadcast,
    compute_dtype,
    dtype_of,
    sizes,
)

Slots = Mapping[str, ir.Value]


@dataclass(frozen=True)
class Turn:
    """Cosine and sine of orientation * clock * theta, times scale, broadcastable to [*shape[:-1], planes]."""

    cos: ir.Value
    sin: ir.Value

    @property
    def shape(self) -> tuple[Size, ...]:
        """What both broadcast to."""
        return broadcast(sizes(self.cos), sizes(self.sin))


def turn(builder: Builder, rotation: Rotation, slots: Slots, tensor: ir.Value) -> Turn:
    """Return the cosines and sines that turn `tensor`, in its compute dtype; the norm factor is part of them."""
    dtype = compute_dtype(tensor)
    if isinstance(rotation.clock, Tables):
        cos, sin = (builder.cast(slots[name], dtype) for name in (rotation.clock.cos, rotation.clock.sin))
    else:
        assert rotation.spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
        wide = _is_wide(rotation.clock, slots)
        angle_dtype = DOUBLE if wide else dtype
        times = clock_values(builder, rotation.clock, rotation.planes.axes(), slots, tensor, angle_dtype)
        theta = frequencies(builder, rotation.spectrum, rotation.planes.count, slots, angle_dtype)
        angle = builder.binary("Mul", times, theta)
        cos, sin = (builder.cast(builder.same(kind, angle), dtype) for kind in ("Cos", "Sin"))
    if rotation.orientation < 0:
        sin = builder.same("Neg", sin)
    if rotation.scale != 1.0:
        cos, sin = (builder.binary("Mul", table, rotation.scale) for table in (cos, sin))
    return Turn(cos, sin)


def frequencies(
    builder: Builder, spectrum: Spectrum, count: int, slots: Slots, dtype: ir.DataType
) -> ir.Value:
    """Return theta in radians per position: [planes], or the shape of its slot."""
    if isinstance(spectrum, Learned | Table):
        return builder.cast(slots[spectrum.slot], dtype)
    return builder.constant(spectrum.frequencies(count), dtype)


def clock_values(
    builder: Builder,
    clock: Clock,
    axes: tuple[int, ...],
    slots: Slots,
    tensor: ir.Value,
    dtype: ir.DataType,
) -> ir.Value:
    """Return the time of every token, [..., 1], or of every token and plane, [..., planes], by several axes."""
    if not isinstance(clock, Positions | Accumulated):
        steps = builder.ladder(0, builder.size(tensor, -2))
        return builder.unsqueeze(builder.cast(steps, dtype), -1)
    times = builder.cast(accumulated(builder, clock, slots[clock.slot]), dtype)
    if not any(axes):
        return builder.unsqueeze(times, -1)
    by_plane = builder.gather(times, axes, 0)
    return builder.transpose(by_plane, *range(1, len(sizes(by_plane))), 0)


def accumulated(builder: Builder, clock: Clock, rates: ir.Value) -> ir.Value:
    """Return the running sum of the rates over their last axis, in double, for `Accumulated`; else the rates."""
    if not isinstance(clock, Accumulated):
        return rates
    wide, axis = builder.cast(rates, DOUBLE), builder.constant(len(sizes(rates)) - 1)
    return builder.op("CumSum", wide, axis, shape=sizes(rates), exclusive=None if clock.inclusive else 1)


def _is_wide(clock: Clock, slots: Slots) -> bool:
    """Whether angles stay double until cosine and sine: sums over tokens, and double positions."""
    given = isinstance(clock, Positions) and dtype_of(slots[clock.slot]) == DOUBLE
    return given or isinstance(clock, Accumulated)
