"""A choice between two ways to compute one tensor, made when the file runs."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from grape_compile.export.onnx.builder import FLOAT, Builder, Size, dtype_of
from grape_compile.export.onnx.emit_rotation import Emitted

#: What puts the nodes of one way into its graph.
Make = Callable[[Builder], Emitted]


def either(
    builder: Builder, condition: ir.Value, then: Make, otherwise: Make, shape: tuple[Size, ...]
) -> tuple[ir.Value, str, str]:
    """Return what `then` makes where the condition [1] holds, else what `otherwise` makes; both tell by what.

    Only the branch that is chosen is computed.
    """
    (first, how), (second, other) = (_branch(builder, make, shape) for make in (then, otherwise))
    result = builder.op(
        "If",
        builder.squeeze(condition, 0),
        dtype=dtype_of(first.outputs[0]),
        shape=shape,
        then_branch=first,
        else_branch=second,
    )
    return result, how, other


def _branch(outer: Builder, make: Make, shape: tuple[Size, ...]) -> tuple[ir.Graph, str]:
    """Return the graph of one branch, and what computes it."""
    result = outer.given("chosen", FLOAT, shape)
    last = ir.Node("", "Identity", [None], outputs=[result])
    body = ir.Graph([], [result], nodes=[last], name=f"{result.name}_branch")
    emitted = make(Builder(body, last, outer.root))
    last.replace_input_with(0, emitted.values[0])
    result.type = emitted.values[0].type
    for node in body:
        for each in node.outputs:
            each.shape = None  # the outer graph names its sizes later
    return body, emitted.how
