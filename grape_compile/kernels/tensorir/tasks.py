"""The names under which functions of TensorIR are tuned and recorded."""

from __future__ import annotations

from collections.abc import Iterable

from grape_compile.encoding import Rotation
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


def _sizes(inputs: Iterable[tuple[str, Operand]]) -> str:
    return " ".join(f"{name}[{','.join(map(str, each.shape))}]:{each.dtype}" for name, each in inputs)
