"""Example inputs for a file that comes with none: sizes for its named axes, numbers for its inputs.

An axis is a number, a name, or a sum of names ("past_sequence_length + sequence_length"). Names that depend on each
other without saying so (a mask as long as past and sequence together) are found by running the file.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from grape_compile.errors import GrapeError

Feeds = dict[str, "np.ndarray[Any, np.dtype[Any]]"]

_SIZES = (2, 12, 5, 7, 9, 11, 14, 15, 17, 19, 21, 22, 23, 25, 26, 27)
"""Sizes of the names in their order: all different, so that equal sizes in the graph mean equal names."""

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def inputs_of(graph: ir.Graph) -> list[ir.Value]:
    """Inputs that a caller gives: an initializer among them has its own value."""
    return [value for value in graph.inputs if not value.is_initializer()]


def _whole(graph: ir.Graph) -> list[ir.Value]:
    """Inputs of integers."""
    return [
        value for value in inputs_of(graph) if value.dtype is not None and not value.dtype.is_floating_point()
    ]


def axes_of(value: ir.Value) -> list[int | str]:
    """The sizes of an input: numbers, names, and a name of its own for an axis without one."""
    if value.shape is None:
        raise GrapeError(
            "run an ONNX file on an example", f"the input {value.name} has no shape", "inputs of known rank"
        )
    return [
        size if isinstance(size, int) else size.value or f"{value.name}.{axis}"
        for axis, size in enumerate(value.shape)
    ]


def size_of(axis: int | str, sizes: Mapping[str, Any]) -> Any:
    """An axis with sizes in place of names."""
    if isinstance(axis, int):
        return axis
    return sizes[axis] if axis in sizes else _evaluated(_parsed(axis), sizes)


def _parsed(text: str) -> ast.expr | None:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    allowed = (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.expr_context)
    return tree if all(isinstance(part, allowed) for part in ast.walk(tree)) else None


def _evaluated(tree: ast.expr | None, sizes: Mapping[str, Any]) -> Any:
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](_evaluated(tree.left, sizes), _evaluated(tree.right, sizes))
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    assert isinstance(tree, ast.Constant)
    return tree.value


def names_of(graph: ir.Graph) -> list[str]:
    """The names that the inputs' sizes are made of."""
    found: dict[str, None] = {}
    for value in inputs_of(graph):
        for axis in axes_of(value):
            if isinstance(axis, int):
                continue
            tree = _parsed(axis)
            parts = (
                [axis] if tree is None else [part.id for part in ast.walk(tree) if isinstance(part, ast.Name)]
            )
            found.update(dict.fromkeys(parts))
    return list(found)


@dataclass(frozen=True)
class Example:
    """Sizes of the names, and the names that are sums of others."""

    sizes: Mapping[str, int]
    relations: Mapping[str, str] = field(default_factory=dict)

    def size(self, axis: int | str) -> int:
        """The size of an axis."""
        return int(size_of(axis, self.all()))

    def all(self) -> dict[str, Any]:
        """Sizes of all names."""
        return {**self.sizes, **{name: size_of(held, self.sizes) for name, held in self.relations.items()}}

    def resized(
        self, graph: ir.Graph, rows: int, longer: int = 0, *, one: bool = False, past: bool = True
    ) -> Example:
        """Other sizes: `rows` along the first axis, the others longer; `one` token, no `past`.

        Tokens are counted by names that integers have, a past by those that only activations have; in a file without
        integers nothing is known to be a past.
        """
        tokens = {axis for value in _whole(graph) for axis in axes_of(value)}
        first = {axes_of(value)[0] for value in inputs_of(graph) if axes_of(value)}
        sizes = {}
        for name, size in self.sizes.items():
            counts = name in tokens or not tokens
            sizes[name] = max(2, size + longer) if past or counts else 0
            sizes[name] = rows if name in first else 1 if one and counts else sizes[name]
        return Example(sizes, self.relations)

    def feeds(self, graph: ir.Graph, padded: bool = False) -> Feeds:
        """Numbers for every input; with `padded` the masks leave out the first tokens of all rows but the first."""
        generator = np.random.default_rng(0)
        feeds: Feeds = {}
        for value in inputs_of(graph):
            assert value.name is not None
            shape = tuple(self.size(axis) for axis in axes_of(value))
            feeds[value.name] = _numbers(value, shape, generator, padded)
        return feeds


def _numbers(value: ir.Value, shape: tuple[int, ...], generator: np.random.Generator, padded: bool) -> Any:
    kind = value.dtype
    if kind is None or kind in (ir.DataType.STRING, ir.DataType.BFLOAT16):
        raise GrapeError("run an ONNX file on an example", f"an input {value.name} of type {kind}", "numbers")
    if kind.is_floating_point():
        return generator.standard_normal(shape).astype(kind.numpy())
    if "mask" in str(value.name):  # by convention: a file does not say what its integers mean
        mask = np.ones(shape, kind.numpy())
        if padded and mask.ndim == 2:
            for row in range(1, shape[0]):
                mask[row, : min(row, shape[1] - 1)] = 0
        return mask
    if kind is ir.DataType.BOOL or not shape:
        return np.ones(shape, kind.numpy())
    rows = min(_rows(value), default=0)
    if rows > shape[-1] and "position" not in str(value.name):
        return generator.integers(0, rows, shape).astype(kind.numpy())
    steps = np.arange(shape[-1]) % rows if rows else np.arange(shape[-1])
    return np.broadcast_to(steps, shape).astype(kind.numpy())


_HANDED_ON = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand"}


def _rows(value: ir.Value) -> Iterator[int]:
    """How many rows the constant tables have that an input picks from."""
    for user, place in value.uses():
        if user.op_type in _HANDED_ON and place == 0:
            yield from _rows(user.outputs[0])
        table = user.inputs[0]
        if user.op_type == "Gather" and place == 1 and table is not None and table.shape is not None:
            axis = user.attributes["axis"].as_int() if "axis" in user.attributes else 0
            if isinstance(rows := table.shape[axis], int):
                yield rows


def first_example(graph: ir.Graph, runs: Callable[[Feeds], str | None]) -> Example:
    """Sizes that the file takes, and the relations between names that it needs; `runs` says what fails, or nothing."""
    names = names_of(graph)
    if len(names) > len(_SIZES):
        raise GrapeError(
            "run an ONNX file on an example", f"{len(names)} names of sizes", f"at most {len(_SIZES)}"
        )
    sizes = dict(zip(names, _SIZES, strict=False))
    failure = None
    for relations in _relations(names):
        example = Example({name: size for name, size in sizes.items() if name not in relations}, relations)
        # Some files run on one row only: they are read for any number of rows all the same.
        refused = [runs(each.feeds(graph)) for each in (example, example.resized(graph, rows=1))]
        if None in refused:
            return example
        failure = failure or refused[0]
    raise GrapeError(
        "run an ONNX file on an example",
        f"sizes {sizes} are not what it takes: {failure}",
        "inputs whose sizes are numbers, names, or sums of names",
    )


def _relations(names: list[str]) -> Iterator[dict[str, str]]:
    """No name depends on another, or one does: it is the sum of two others, or the same as one."""
    yield {}
    for name in reversed(names):
        others = [other for other in names if other != name]
        for place, one in enumerate(others):
            for other in others[place + 1 :]:
                yield {name: f"{one} + {other}"} if one.isidentifier() and other.isidentifier() else {}
        yield from ({name: other} for other in others)
