"""Which constants of a file are weights and which are tables of positions, by what is done with them.

A file does not say. A matrix that activations are multiplied with is a weight; so is a table whose rows go on as
activations. A table whose rows are only ever multiplied into activations is one of positions, and everything else is a
number written out in the graph. What is said wrongly here costs a place that is not found, never a wrong one: every
place is verified whatever its tables are.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_MOVEMENTS = {
    "Identity", "Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Slice", "Split", "Concat",
    "Flatten",
}  # fmt: skip
_LOOKUPS = {"Gather", "GatherElements", "GatherND"}
_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulNBits", "Einsum"}
_NORMS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization",
    "InstanceNormalization", "BatchNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip


def is_weight(value: ir.Value) -> bool:
    """Whether a constant is a weight."""
    for user, place, held in _uses(value):
        if user.op_type in _PRODUCTS and _other_is_computed(user, place) and not _is_outer(user, place, held):
            return True
        if user.op_type in _NORMS and place > 0:
            return True
        if user.op_type in _LOOKUPS and place == 0 and not _only_scales(user):
            return True
    return False


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """Who reads a value, at which place, movements passed through."""
    seen, stack = {value}, [value]
    while stack:
        held = stack.pop()
        for user, place in held.uses():
            if user.op_type not in _MOVEMENTS or (place > 0 and user.op_type != "Concat"):
                yield user, place, held
                continue
            for result in user.outputs:
                if result not in seen:
                    seen.add(result)
                    stack.append(result)


def _other_is_computed(user: ir.Node, place: int) -> bool:
    return any(
        operand is not None and operand.const_value is None
        for other, operand in enumerate(user.inputs)
        if other != place
    )


def _is_outer(user: ir.Node, place: int, held: ir.Value) -> bool:
    """A product over one entry: every position with every frequency."""
    if user.op_type != "MatMul" or held.shape is None or len(held.shape) < 2:
        return False
    return held.shape[-1 if place == 0 else -2] == 1


def _only_scales(lookup: ir.Node) -> bool:
    """Whether the rows that are looked up are multiplied with something computed, whatever becomes of them."""
    users = list(_uses(lookup.outputs[0]))
    return bool(users) and all(
        user.op_type == "Mul" and _other_is_computed(user, place) for user, place, _ in users
    )
