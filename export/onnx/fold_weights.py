"""Let the weights of a projection do what a linear map would do to its result: reorder coordinates, apply a basis.

What: a map of the last axis of a value, taken back through views, cuts and biases to the matrix that the value is a
    product with.
Leaves alone: values that something reads whose coordinates would be others, matrices that are computed, norms between.
Ensures: a new matrix; who else reads the old one keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir

from grape_compile.export.onnx.builder import Builder, sizes

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Map:
    """A linear map of a last axis: what it does to numbers [.., n], and which of the n it leaves as they are."""

    apply: Callable[[Numbers], Numbers]
    kept: tuple[bool, ...]

    @staticmethod
    def order(order: Sequence[int]) -> Map:
        """Return the map to coordinates in another order."""
        return Map(
            lambda numbers: numbers[..., list(order)], tuple(at == own for at, own in enumerate(order))
        )

    @staticmethod
    def basis(matrix: Numbers) -> Map:
        """Return the product with a matrix [n, n] from the right, summed in float64."""
        wide = matrix.astype(np.float64)
        return Map(
            lambda numbers: (numbers.astype(np.float64) @ wide).astype(numbers.dtype),
            (False,) * matrix.shape[-1],
        )

    def repeated(self, count: int) -> Map:
        """Return the map of every one of `count` heads that lie behind each other."""

        def apply(numbers: Numbers) -> Numbers:
            return self.apply(numbers.reshape(*numbers.shape[:-1], count, -1)).reshape(numbers.shape)

        return Map(apply, self.kept * count)

    def within(self, size: int, start: int) -> Map:
        """Return the map of a longer axis that acts from coordinate `start` on and leaves the others."""
        stop = start + len(self.kept)

        def apply(numbers: Numbers) -> Numbers:
            found = numbers.copy()
            found[..., start:stop] = self.apply(numbers[..., start:stop])
            return found

        return Map(apply, (*(True,) * start, *self.kept, *(True,) * (size - stop)))


def fold(builder: Builder, value: ir.Value, wanted: Map) -> bool:
    """Let the weights behind a value, which `builder`'s anchor reads, apply a map to it; whether they could."""
    reader, changes = builder.anchor, list[tuple[ir.Node, int, Map]]()
    while True:
        node = value.producer()
        if node is None or node.domain != "" or not _unseen(value, reader, wanted):
            return False
        if node.op_type == "MatMul" and _matrix(node.inputs[1], 2):
            changes.append((node, 1, wanted))
            break
        if node.op_type == "Add":
            place = next((at for at in (0, 1) if _matrix(node.inputs[at], 1)), None)
            if place is None or sizes(node.inputs[place])[-1] != len(wanted.kept):  # type: ignore[arg-type]  # there
                return False
            changes.append((node, place, wanted))
            step: tuple[ir.Value | None, Map] | None = (node.inputs[1 - place], wanted)
        else:
            step = _before(node, value, wanted)
        if step is None or step[0] is None or step[0].shape is None:
            return False
        reader, (value, wanted) = node, (step[0], step[1])
    for node, place, change in changes:
        _replace(builder, node, place, change)
    return True


def _unseen(value: ir.Value, reader: ir.Node, wanted: Map) -> bool:
    """Whether all that read a value, but for one, read coordinates that stay as they are."""
    if value.is_graph_output():
        return False
    return all(_reads_kept(user, wanted) for user, _ in value.uses() if user is not reader)


def _reads_kept(user: ir.Node, wanted: Map) -> bool:
    if user.op_type == "Shape" and user.domain == "":
        return True
    cuts = [cut for output in user.outputs for cut in _cuts(user, output)]
    if len(cuts) != len(user.outputs):
        return False
    return all(all(wanted.kept[start:stop]) for start, stop in cuts)


def _before(node: ir.Node, value: ir.Value, wanted: Map) -> tuple[ir.Value | None, Map] | None:
    """Return what a view or a cut is made of, and the map of that; None for anything else."""
    inner, count = node.inputs[0], len(wanted.kept)
    if inner is None or inner.shape is None or value.shape is None:
        return None
    size, rank = sizes(inner)[-1], len(inner.shape)
    if not isinstance(size, int):
        return None
    for start, stop in _cuts(node, value):
        return (inner, wanted.within(size, start)) if stop - start == count else None
    if node.op_type == "Reshape" and size % count == 0 and sizes(value)[-1] == count:
        return inner, wanted.repeated(size // count)
    keeps = (
        (node.op_type == "Transpose" and node.attributes.get_ints("perm", (0,))[-1] == rank - 1)
        or (node.op_type == "Gather" and node.attributes.get_int("axis", 0) % rank != rank - 1)
        or (node.op_type == "Unsqueeze" and sizes(value)[-1] == size != 1)
        or (node.op_type == "Squeeze" and sizes(value)[-1] == size != 1)
    )
    return (inner, wanted) if keeps and size == count else None


def _cuts(node: ir.Node, output: ir.Value) -> Iterator[tuple[int, int]]:
    """The first coordinate and the one behind the last that a cut along the last axis takes, if that is what it is."""
    inner = node.inputs[0]
    if node.domain != "" or inner is None or inner.shape is None or not isinstance(sizes(inner)[-1], int):
        return
    rank, size = len(inner.shape), int(str(sizes(inner)[-1]))
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        told = [_whole(each) for each in node.inputs[1:]]
        if any(each is None or len(each) != 1 for each in told):
            return
        (start,), (stop,), (axis,), *step = [list(each) for each in told if each is not None]
        if axis % rank == rank - 1 and (not step or step[0] == [1]):
            yield (range(size)[start:stop].start, range(size)[start:stop].stop)
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) % rank == rank - 1:
        parts = _whole(node.inputs[1] if len(node.inputs) > 1 else None)
        lengths = list(parts) if parts is not None else [size // len(node.outputs)] * len(node.outputs)
        ends = list(accumulate(lengths))
        at = list(node.outputs).index(output)
        if ends[-1] == size:
            yield ends[at] - lengths[at], ends[at]


def _whole(value: ir.Value | None) -> list[int] | None:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else [int(each) for each in np.asarray(constant.numpy()).reshape(-1)]


def _matrix(value: ir.Value | None, rank: int) -> bool:
    """Whether a value is numbers of the file with so many axes."""
    return value is not None and value.const_value is not None and len(value.const_value.shape) == rank


def _replace(builder: Builder, node: ir.Node, place: int, change: Map) -> None:
    """Give a node numbers of its own, under a name that tells whose they were."""
    old, root = node.inputs[place], builder.root
    assert old is not None
    assert old.const_value is not None
    name = f"{old.name}.folded"
    while name in root.initializers:
        name += "_"
    held = ir.tensor(change.apply(old.const_value.numpy()), dtype=old.const_value.dtype, name=name)
    new = ir.Value(name=name, shape=old.shape, type=old.type, const_value=held)
    root.register_initializer(new)
    node.replace_input_with(place, new)
