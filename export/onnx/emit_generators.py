"""Rotations by generators as ONNX nodes: y = x + M(x F) F^T (GRAPE 2.3, App. D)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from grape_compile.encoding import Multiplicative, NonCommuting, Rank2
from grape_compile.errors import GrapeError
from grape_compile.export.onnx.builder import (
    DOUBLE,
    INT64,
    Builder,
    broadcast,
    compute_dtype,
    dtype_of,
    sizes,
)
from grape_compile.export.onnx.emit_tables import Slots, clock_values, frequencies
from grape_compile.operators.non_commuting import schur_planes, spectral_form

#: With z^2 below this, sin(z)/z and (1 - cos z)/z^2 are their first two terms to the rounding of a double.
_NEAR = 1e-8

Update = tuple[ir.Value, tuple[ir.Value, ir.Value, ir.Value, ir.Value]]


def generated(builder: Builder, tensor: ir.Value, encoding: Multiplicative, slots: Slots) -> ir.Value:
    """Return the tensor turned by a `Rank2` or a `NonCommuting`; the angles are double."""
    assert isinstance(encoding, Rank2 | NonCommuting)
    time = clock_values(builder, encoding.clock, (0,), slots, tensor, DOUBLE)
    if encoding.orientation < 0:
        time = builder.same("Neg", time)
    frame, entries = (
        _plane(builder, encoding, slots, time)
        if isinstance(encoding, Rank2)
        else _planes(builder, encoding, slots, time)
    )
    dtype = compute_dtype(tensor)
    frame = builder.cast(frame, dtype)
    m00, m01, m10, m11 = (builder.cast(entry, dtype) for entry in entries)
    wide = builder.cast(tensor, dtype)
    inner = builder.matmul(wide, frame)
    count = sizes(frame)[-1]
    assert isinstance(count, int)
    first, second = builder.slice(inner, 0, count // 2), builder.slice(inner, count // 2, count)
    moved = builder.concat(
        [_mixed(builder, m00, first, m01, second), _mixed(builder, m10, first, m11, second)]
    )
    back = builder.transpose(
        frame, *range(len(sizes(frame)) - 2), len(sizes(frame)) - 1, len(sizes(frame)) - 2
    )
    return builder.cast(builder.binary("Add", wide, builder.matmul(moved, back)), dtype_of(tensor))


def _mixed(builder: Builder, a: ir.Value, first: ir.Value, b: ir.Value, second: ir.Value) -> ir.Value:
    return builder.binary("Add", builder.binary("Mul", a, first), builder.binary("Mul", b, second))


def _plane(builder: Builder, encoding: Rank2, slots: Slots, time: ir.Value) -> Update:
    """f1 L + f2 L^2 in the frame (a, b), as `grape::rotate` has it."""
    a, b = (_column(builder, slots[name]) for name in (encoding.a, encoding.b))
    alpha, beta = (_dot(builder, vector, vector) for vector in (a, b))
    gamma = _dot(builder, a, b)
    time = builder.binary("Mul", time, frequencies(builder, encoding.spectrum, 1, slots, DOUBLE))
    square = builder.binary("Mul", time, time)
    area = builder.binary("Sub", builder.binary("Mul", alpha, beta), builder.binary("Mul", gamma, gamma))
    sine, cosine = _quotients(builder, builder.binary("Mul", square, area))
    f1, f2 = builder.binary("Mul", time, sine), builder.binary("Mul", square, cosine)
    crossed = builder.binary("Mul", f2, gamma)
    entries = (
        builder.same("Neg", builder.binary("Mul", f2, beta)),
        builder.binary("Add", crossed, f1),
        builder.binary("Sub", crossed, f1),
        builder.same("Neg", builder.binary("Mul", f2, alpha)),
    )
    return builder.concat([_as_large(builder, a, b), _as_large(builder, b, a)], -1), entries


def _as_large(builder: Builder, vector: ir.Value, other: ir.Value) -> ir.Value:
    """Return a vector broadcast to the heads of another."""
    shape = broadcast(sizes(vector), sizes(other))
    if shape == sizes(vector):
        return vector
    return builder.op(
        "Expand", vector, builder.op("Shape", other, dtype=INT64, shape=(len(shape),)), shape=shape
    )


def _column(builder: Builder, vector: ir.Value) -> ir.Value:
    """Return a vector [d] or [..., 1, d] as [..., d, 1], double."""
    wide = builder.cast(vector, DOUBLE)
    if len(sizes(wide)) == 1:
        return builder.unsqueeze(wide, 1)
    rank = len(sizes(wide))
    return builder.transpose(wide, *range(rank - 2), rank - 1, rank - 2)


def _dot(builder: Builder, left: ir.Value, right: ir.Value) -> ir.Value:
    product = builder.binary("Mul", left, right)
    axes = builder.constant([len(sizes(product)) - 2])
    return builder.op("ReduceSum", product, axes, shape=(*sizes(product)[:-2], 1, 1), keepdims=1)


def _quotients(builder: Builder, u: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return sin(z)/z and (1 - cos z)/z^2 for u = z^2, by two terms of their series where u is small."""
    wide = builder.op("Greater", u, builder.constant(_NEAR, DOUBLE), dtype=ir.DataType.BOOL, shape=sizes(u))
    far = builder.op("Where", wide, u, builder.constant(1.0, DOUBLE), dtype=DOUBLE, shape=sizes(u))
    z = builder.same("Sqrt", far)
    half = builder.same("Sin", builder.binary("Mul", z, 0.5))
    quotients = (
        (builder.binary("Div", builder.same("Sin", z), z), 1.0, 6.0),
        (
            builder.binary("Div", builder.binary("Mul", builder.binary("Mul", half, half), 2.0), far),
            0.5,
            24.0,
        ),
    )
    found = []
    for quotient, lead, divisor in quotients:
        near = builder.op(
            "Sub", builder.constant(lead, DOUBLE), builder.binary("Div", u, divisor), shape=sizes(u)
        )
        found.append(builder.op("Where", wide, quotient, near, dtype=DOUBLE, shape=sizes(u)))
    return found[0], found[1]


def _planes(builder: Builder, encoding: NonCommuting, slots: Slots, time: ir.Value) -> Update:
    """The planes of the real Schur form of the generator, computed now: ONNX has no eigenvalues."""
    basis, generator = (_numbers(encoding, slots[name]) for name in (encoding.basis, encoding.generator))
    theta, planes = schur_planes(*spectral_form(torch.from_numpy(generator)))
    frame = builder.constant((torch.from_numpy(basis) @ planes).numpy(), DOUBLE)
    phase = builder.binary("Mul", time, builder.constant(theta.unsqueeze(-2).numpy(), DOUBLE))
    half = builder.same("Sin", builder.binary("Mul", phase, 0.5))
    # cos - 1, without its cancellation.
    cos = builder.binary("Mul", builder.binary("Mul", half, half), -2.0)
    sin = builder.same("Sin", phase)
    return frame, (cos, builder.same("Neg", sin), sin, cos)


def _numbers(encoding: NonCommuting, value: ir.Value) -> npt.NDArray[np.float64]:
    if value.const_value is None:
        raise GrapeError(
            f"{encoding} in an ONNX file",
            f"{value.name} is computed while the model runs, and ONNX has no eigenvalues",
            "a generator and a basis that are parameters or buffers",
        )
    numbers: npt.NDArray[np.float64] = value.const_value.numpy().astype(np.float64)
    return numbers
