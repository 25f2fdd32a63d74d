"""Which keys a query can see at most, read from the mask as it stands in the graph.

What: comparisons of the number of a key with that of a query, where the mask is true or adds nothing only if they hold;
    seen through conjunctions, negations, choices of a number that hides, sums, and new axes in front.
Leaves alone: masks that are numbers of the file, and comparisons of anything that is not counted.
Ensures: a key that is left out is hidden by the mask itself, whatever its inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from grape_compile.export.onnx.builder import BOOL, INT64, Builder, sizes

#: A number so low removes a key whatever the scores are; in half precision the lowest number does.
NEVER: Final = -1e9
_LOWEST_HALF: Final = -65504.0
#: Which operand of a comparison is the smaller where it holds, and whether both may be equal.
_COMPARISONS: Final = {
    "LessOrEqual": (0, True),
    "Less": (0, False),
    "GreaterOrEqual": (1, True),
    "Greater": (1, False),
}
#: Axes from the end on which keys and queries lie.
_KEYS, _QUERIES = 1, 2


@dataclass(frozen=True)
class Reach:
    """Query i sees no key before i + `first` and none behind i + `last`: [1] each, None where no bound is known."""

    first: ir.Value | None = None
    last: ir.Value | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether there is a bound at all."""
        return self.first is not None or self.last is not None


@dataclass(frozen=True)
class _Count:
    """Numbers that grow by one along one axis (counted from the end): from `start` and the sum of `terms` on."""

    axis: int
    start: int
    terms: tuple[tuple[str, ir.Value], ...]


def reach(builder: Builder, mask: ir.Value) -> Reach:
    """Return the bounds that a mask [.., T_q, T_k] sets."""
    first = last = None
    for node, truth in _comparisons(mask):
        at, equal = _COMPARISONS[node.op_type]
        small, large = (
            (node.inputs[at], node.inputs[1 - at]) if truth else (node.inputs[1 - at], node.inputs[at])
        )
        low, high = _count(small), _count(large)
        if low is None or high is None:
            continue
        step = 0 if equal == truth else 1
        if (low.axis, high.axis) == (_KEYS, _QUERIES) and last is None:
            last = _difference(builder, high, low, -step)
        elif (low.axis, high.axis) == (_QUERIES, _KEYS) and first is None:
            first = _difference(builder, low, high, step)
    return Reach(first, last)


def _comparisons(mask: ir.Value) -> Iterator[tuple[ir.Node, bool]]:
    """Comparisons with the truth they have wherever a key is seen."""
    stack = [(mask, True)]
    while stack:
        value, truth = stack.pop()
        node = value.producer()
        if node is None or node.domain != "":
            continue
        if node.op_type in _COMPARISONS:
            yield node, truth
        stack += [(inner, own) for inner, own in _implied(value, node, truth) if inner is not None]


def _implied(value: ir.Value, node: ir.Node, truth: bool) -> list[tuple[ir.Value | None, bool]]:
    """What holds of operands where a value is `truth`; a number that is added is true where it does not hide."""
    kind, operands = node.op_type, node.inputs
    if (kind == "And" and truth) or (kind == "Or" and not truth):
        return [(operand, truth) for operand in operands]
    if kind == "Not":
        return [(operands[0], not truth)]
    if kind == "Identity" or (kind in ("Expand", "Unsqueeze") and _keeps_the_last_two(value, operands[0])):
        return [(operands[0], truth)]
    if kind == "Cast" and value.dtype == BOOL:
        return _nonzero(operands[0], truth)
    if value.dtype is None or not value.dtype.is_floating_point() or not truth:
        return []
    if kind == "Add":
        return [(operand, True) for operand in operands]
    if kind == "Where":
        for chosen, other in ((1, 2), (2, 1)):
            number = _number(operands[chosen])
            never = _LOWEST_HALF if value.dtype == ir.DataType.FLOAT16 else NEVER
            if number is not None and number <= never:
                return [(operands[0], chosen == 2), (operands[other], True)]
    return []


def _nonzero(value: ir.Value | None, truth: bool) -> list[tuple[ir.Value | None, bool]]:
    """What holds where a choice of two numbers is, or is not, zero."""
    node = None if value is None else value.producer()
    if value is None or value.dtype == BOOL or node is None or node.op_type != "Where":
        return [(value, truth)] if value is not None and value.dtype == BOOL else []
    numbers = [_number(each) for each in node.inputs[1:]]
    if None in numbers or (numbers[0] == 0) == (numbers[1] == 0):
        return []
    return [(node.inputs[0], truth if numbers[1] == 0 else not truth)]


def _keeps_the_last_two(value: ir.Value, inner: ir.Value | None) -> bool:
    if inner is None or inner.shape is None or value.shape is None or len(inner.shape) < 2:
        return False
    own = sizes(inner)[-2:]
    return None not in own and own == sizes(value)[-2:]


def _count(value: ir.Value | None) -> _Count | None:
    """Read a value as numbers counted along one axis."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain != "" or not _is_whole(value):
        return None
    inner = node.inputs[0]
    if node.op_type == "Range":
        start, step = _number(inner), _number(node.inputs[2])
        if step != 1 or inner is None:
            return None
        return _Count(1, 0, (("Add", inner),)) if start is None else _Count(1, int(start), ())
    if node.op_type in ("Identity", "Cast", "Expand"):
        found = _count(inner)
        return found if found is None or _same_size(value, inner, found.axis) else None
    if node.op_type == "Unsqueeze":
        return _widened(value, inner, node.inputs[1])
    if node.op_type in ("Add", "Sub"):
        return _shifted(node)
    return None


def _shifted(node: ir.Node) -> _Count | None:
    """Numbers and one number more, or less."""
    pairs = [tuple(node.inputs)] + ([tuple(reversed(node.inputs))] if node.op_type == "Add" else [])
    for counted, single in pairs:
        found = _count(counted)
        if (
            found is None
            or single is None
            or single.shape is None
            or any(size != 1 for size in sizes(single))
        ):
            continue
        if not _is_whole(single):
            continue
        number = _number(single)
        if number is None:
            return _Count(found.axis, found.start, (*found.terms, (node.op_type, single)))
        return _Count(
            found.axis, found.start + int(number) * (1 if node.op_type == "Add" else -1), found.terms
        )
    return None


def _widened(value: ir.Value, inner: ir.Value | None, axes: ir.Value | None) -> _Count | None:
    """Numbers with axes of size one among theirs."""
    found, told = _count(inner), None if axes is None else ir.convenience.get_const_tensor(axes)
    if found is None or told is None or inner is None or inner.shape is None:
        return None
    rank = len(inner.shape) + told.size
    new = {int(axis) % rank for axis in np.asarray(told.numpy()).reshape(-1)}
    kept = [axis for axis in range(rank) if axis not in new]
    return _Count(rank - kept[len(inner.shape) - found.axis], found.start, found.terms)


def _same_size(value: ir.Value, inner: ir.Value | None, axis: int) -> bool:
    """Whether the counted axis is as long in both, so that nothing was repeated along it."""
    if inner is None or inner.shape is None or value.shape is None:
        return False
    size = sizes(inner)[-axis]
    return size is not None and size != 1 and size == sizes(value)[-axis]


def _is_whole(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _number(value: ir.Value | None) -> float | None:
    """The one number of a constant."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    if constant is None or constant.size != 1:
        return None
    return float(np.asarray(constant.numpy()).reshape(()))


def _difference(builder: Builder, high: _Count, low: _Count, more: int) -> ir.Value:
    """Return where one count starts less where another does, and a number more: [1]."""
    total = builder.constant([high.start - low.start + more])
    opposite = {"Add": "Sub", "Sub": "Add"}
    terms = [*high.terms, *((opposite[kind], value) for kind, value in low.terms)]
    for kind, value in terms:
        number = builder.reshape(builder.cast(value, INT64), (1,), (1,))
        total = builder.op(kind, total, number, shape=(1,))
    return total
