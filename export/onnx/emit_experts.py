"""Products of groups of rows with a matrix for each group, as mixtures of experts compute them."""

from __future__ import annotations

import onnx_ir as ir

from grape_compile.errors import GrapeError
from grape_compile.export.onnx.builder import INT64, Builder, sizes


def grouped_product(builder: Builder, rows: ir.Value, weights: ir.Value, ends: ir.Value) -> ir.Value:
    """Return [S, N]: rows ends[e-1] ... ends[e] - 1 of [S, K] times weights[e] of [E, K, N] when the last end is S."""
    count, width = sizes(weights)[0], sizes(weights)[2]
    if not isinstance(count, int):
        raise GrapeError("products of groups in ONNX", f"{count} groups", "a known number of them")
    bounds = builder.cast(ends, INT64)
    start = builder.constant([0])
    parts = []
    for expert in range(count):
        stop = builder.gather(bounds, [expert], 0)
        group = builder.op("Slice", rows, start, stop, builder.constant([0]), shape=(None, sizes(rows)[1]))
        matrix = builder.squeeze(builder.gather(weights, [expert], 0), 0)
        parts.append(builder.matmul(group, matrix))
        start = stop
    return builder.op("Concat", *parts, shape=(sizes(rows)[0], width), axis=0)
