"""The names under which functions of TensorIR are tuned and recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from grape_compile.encoding import Rotation, nope
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.operands import Operand, Slots
from grape_compile.records import Task


def rotation_task(encoding: Rotation, operand: Operand, slots: Slots) -> Task:
    """Return the task of one rotated tensor."""
    inputs = [("x", operand), *((name, slots[name]) for name in encoding.slots)]
    return Task("rotate", str(encoding), _sizes(inputs), operand.dtype)


def attention_task(attention: Attention) -> Task:
    """Return the task of one attention."""
    options = [
        "causal" if attention.is_causal else "",
        f"scale={attention.factor:.9g}",
        "" if attention.window is None else f"window={attention.window}",
        "" if attention.cap is None else f"cap={attention.cap:.9g}",
    ]
    sizes = f"{_sizes(attention.arguments)} {' '.join(filter(None, options))}"
    return Task("attend", str(attention.encoding), sizes, attention.query.dtype)


def linear_task(x: Operand, weight: Operand, bias: Operand | None) -> Task:
    """Return the task of one product with weights, which has no encoding."""
    inputs = [("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)])]
    return Task("linear", str(nope()), _sizes(inputs), x.dtype)


def sized(operand: Operand, sizes: Mapping[str, int]) -> Operand:
    """Return an operand whose named sizes are known.

    >>> sized(Operand((1, "s0", 64)), {"s0": 8}).shape
    (1, 8, 64)
    """
    return replace(
        operand,
        shape=tuple(sizes.get(each, each) if isinstance(each, str) else each for each in operand.shape),
    )


def _sizes(inputs: Iterable[tuple[str, Operand]]) -> str:
    return " ".join(f"{name}[{_shape(each)}]:{each.dtype}" for name, each in inputs)


def _shape(operand: Operand) -> str:
    return ",".join(str(size).replace(" ", "") for size in operand.shape)
