"""Cut an operator's operand out of an earlier value: fitted from the elements that were read, emitted as view nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.errors import GrapeError
from grape_compile.passes.graph import Program, Unreadable, frozen, layout, require_fake
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Index

aten = torch.ops.aten
_FUNCTIONS = {"reciprocal": aten.reciprocal.default, "cos": aten.cos.default, "sin": aten.sin.default}


@dataclass(frozen=True)
class Axis:
    """Where a dimension of the value goes: `role` is "fixed" (element `offset`), "plane", or a target axis number.

    Along an axis the element read for position `i` is `offset + stride * i`, or the `i`-th of the `runs`, each an
    offset and a length. Two dimensions side by side may be one axis (heads in groups): of `i` the first reads
    `i // inner`, and the second, which is `within` the first, `i % within`.
    """

    role: str | int
    offset: int = 0
    stride: int = 1
    runs: tuple[tuple[int, int], ...] = ()
    inner: int = 1
    within: int = 0

    @property
    def is_part(self) -> bool:
        """Whether this is one of two dimensions that are one axis."""
        return self.inner > 1 or self.within > 0

    def at(self, position: Tensor) -> Tensor:
        """The elements read for positions."""
        if self.within:
            return position % self.within
        return position // self.inner if self.inner > 1 else self.offset + self.stride * position


@dataclass(frozen=True)
class Operand:
    """A value seen through `axes`, one of its parts, times a number.

    `detach` cuts its gradient as the model did; `planes` asks for a trailing plane axis.
    """

    node: fx.Node
    axes: tuple[Axis, ...]
    part: str = "value"
    scale: float = 1.0
    detach: bool = False
    planes: bool = False

    @property
    def has_planes(self) -> bool:
        return any(axis.role == "plane" for axis in self.axes)

    @property
    def token_axes(self) -> tuple[int, ...]:
        return tuple(axis.role for axis in self.axes if isinstance(axis.role, int))


def fit(
    program: Program,
    node: fx.Node,
    index: Index,
    lead: Index,
    plane: Tensor,
    sizes: Sizes,
    counts: Sequence[int],
    *,
    runs: bool = False,
    groups: bool = False,
) -> tuple[Axis, ...] | None:
    """Express every dimension of the read elements through the target's axes or the plane number, or give up.

    `lead` and `plane` say, row by row, for which target position and plane the element `index` was read; `counts` are
    the sizes of the target's axes followed by the number of planes. With `runs` the planes may be channels in a few
    runs; with `groups` two dimensions may be one axis. Planes may take two axes: a diagonal of matrices.
    """
    axes: list[Axis] = []
    used: set[str | int] = set()
    targets: list[tuple[str | int, Tensor, int]] = [
        (number, axis, counts[number]) for number, axis in enumerate(lead)
    ]
    targets.append(("plane", plane, counts[-1]))
    shape, dimension = sizes.shape(node), 0
    while dimension < len(shape):
        axis = _fit_dimension(index[dimension], shape[dimension], targets, used)
        if axis is None and runs and "plane" not in used:
            axis = _fit_runs(index[dimension], plane)
        found: tuple[Axis, ...] = (axis,) if axis is not None else ()
        if groups and not found:
            found = _fit_groups(
                index[dimension : dimension + 2], shape[dimension : dimension + 2], targets, used
            )
        if not found:
            return None
        used.add(found[0].role)
        axes += found
        dimension += len(found)
    return tuple(axes)


def _fit_dimension(
    values: Tensor, size: int, targets: list[tuple[str | int, Tensor, int]], used: set[str | int]
) -> Axis | None:
    if not values.numel() or bool((values == values[0]).all()):
        return Axis("fixed", int(values[0]) if values.numel() else 0)
    for role, positions, count in targets:
        if (role in used and role != "plane") or count < 2:
            continue
        low, high = int(positions.min()), int(positions.max())
        if low == high:
            continue
        rise = int(values[positions == high][0]) - int(values[positions == low][0])
        if rise % (high - low):
            continue
        stride = rise // (high - low)
        offset = int(values[positions == low][0]) - stride * low
        if stride > 0 and bool((offset + stride * positions == values).all()):
            return Axis(role, offset, stride)
    return None


def _fit_groups(
    index: Index, shape: Sequence[int], targets: list[tuple[str | int, Tensor, int]], used: set[str | int]
) -> tuple[Axis, ...]:
    """Two dimensions that are all of one axis, a size for each entry of the first; empty where they are not."""
    if len(index) < 2:
        return ()
    inner = shape[1]
    axis = _fit_dimension(index[0] * inner + index[1], shape[0] * inner, targets, used)
    if axis is None or not isinstance(axis.role, int) or (axis.offset, axis.stride) != (0, 1):
        return ()
    whole = any(role == axis.role and count == shape[0] * inner for role, _, count in targets)
    return (Axis(axis.role, inner=inner), Axis(axis.role, within=inner)) if whole else ()


_END = 2**63 - 1
_MOST_RUNS = 8


def _fit_runs(values: Tensor, plane: Tensor) -> Axis | None:
    """Channels of a table that rise in a few runs: tables of several axes one behind the other."""
    channels = torch.zeros(int(plane.max()) + 1, dtype=torch.int64)
    channels[plane] = values
    if not torch.equal(channels[plane], values) or bool((channels.diff() <= 0).any()):
        return None
    starts = [0, *(place + 1 for place, step in enumerate(channels.diff().tolist()) if step != 1)]
    if len(starts) > _MOST_RUNS:
        return None
    ends = [*starts[1:], len(channels)]
    runs = tuple((int(channels[start]), end - start) for start, end in zip(starts, ends, strict=True))
    return Axis("plane", runs=runs)


@dataclass
class Emitter:
    """Adds nodes to a program's graph, each distinct operand once, with fake values and the origin's metadata."""

    program: Program
    sizes: Sizes
    cache: dict[Any, fx.Node] = field(default_factory=dict)
    ranks: dict[fx.Node, float] = field(default_factory=dict)
    fakes: dict[object, Any] = field(default_factory=dict)

    def call(
        self, after: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A new pure node right after `after` and the operands."""
        key = (target, _key(args), _key(tuple((kwargs or {}).items())))
        if key in self.cache:
            return self.cache[key]
        graph = self.program.graph
        if any(each in self.program.outside for each in _nodes((args, kwargs or {}))):
            raise Unreadable("what it is made of was computed in another graph, before a graph break")
        place = max([after, *_nodes(args)], key=self.position)
        while place.next.op == "placeholder" or place.next in self.ranks:
            place = place.next
        with graph.inserting_after(place):
            node = graph.call_function(target, args, kwargs or {})
        try:
            self.annotate(node, after)
        except GrapeError as failure:
            graph.erase_node(node)
            raise Unreadable(
                f"the operator does not take what was read: {failure.asked}, {failure.found}"
            ) from failure
        self.ranks[node] = self.position(place) + (len(self.ranks) + 1) * 1e-9
        self.cache[key] = node
        return node

    def last(self, nodes: Sequence[fx.Node | None]) -> fx.Node:
        """The node that stands last in the graph: an operator stands behind its operands, in its result's region."""
        return max((node for node in nodes if node is not None), key=self.position)

    def position(self, node: fx.Node) -> float:
        """Where a node stands in the graph, new nodes included."""
        known = self.program.order.get(node)
        return float(known) if known is not None else self.ranks[node]

    def annotate(self, node: fx.Node, origin: fx.Node) -> None:
        """Fake value and provenance of a new node."""
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            if name in origin.meta:
                node.meta[name] = origin.meta[name]
        node.meta["val"] = self._fake(node)

    def _fake(self, node: fx.Node) -> Any:
        """The fake value of a node, found once for all nodes that differ in the values of their operands alone."""
        try:
            key = (node.target, frozen((node.args, node.kwargs), _layout))
            if key not in self.fakes:
                self.fakes[key] = fake_value(node)
            return self.fakes[key]
        except (Unreadable, TypeError):
            return fake_value(node)

    def rotated(self, operand: Operand, target: fx.Node, planes: int) -> fx.Node:
        """The operand shaped to broadcast against `target.shape[:-1]`, with a plane axis where it asks for one."""
        counts: dict[str | int, Any] = dict(enumerate(require_fake(target).shape[:-1]))
        wanted = [*counts, *(["plane"] if operand.planes else [])]
        return self.operand(operand, wanted, {**counts, "plane": planes})

    def operand(
        self, operand: Operand, wanted: Sequence[str | int], counts: Mapping[str | int, Any]
    ) -> fx.Node:
        """The operand with its axes in the order `wanted`, size 1 where it has none, leading ones left away."""
        node = self._part(operand)
        if operand.detach and require_fake(node).is_floating_point():
            node = self.call(node, aten.detach.default, (node,))
        names: list[str | int] = []
        for axis in operand.axes:
            dimension = len(names)
            if axis.within:  # seen with the dimension before
                node = self.call(node, aten.flatten.using_ints, (node, dimension - 1, dimension))
                continue
            if axis.role == "fixed":
                node = self.call(node, aten.select.int, (node, dimension, axis.offset))
                continue
            if axis.inner == 1:
                node = self._slice(node, axis, dimension, counts[axis.role])
            if axis.role in names:
                first = names.index(axis.role)
                diagonal = self.call(node, aten.diagonal.default, (node, 0, first, dimension))
                node = self.call(diagonal, aten.movedim.int, (diagonal, -1, first))
                continue
            names.append(axis.role)
        order = sorted(range(len(names)), key=lambda dimension: wanted.index(names[dimension]))
        if order != list(range(len(order))):
            node = self.call(node, aten.permute.default, (node, order))
        present = [names[dimension] for dimension in order]
        first = wanted.index(present[0]) if present else len(wanted) - 1
        for dimension, name in enumerate(wanted[first:]):
            if name not in present:
                node = self.call(node, aten.unsqueeze.default, (node, dimension))
        if operand.scale != 1.0:
            node = self.call(node, aten.mul.Tensor, (node, operand.scale))
        return node

    def _part(self, operand: Operand) -> fx.Node:
        node = operand.node
        if operand.part in _FUNCTIONS:
            return self.call(node, _FUNCTIONS[operand.part], (node,))
        if operand.part in ("real", "imag"):
            pairs = self.call(node, aten.view_as_real.default, (node,))
            return self.call(node, aten.select.int, (pairs, -1, 0 if operand.part == "real" else 1))
        return node

    def _slice(self, node: fx.Node, axis: Axis, dimension: int, count: Any) -> fx.Node:
        if axis.runs:
            parts = [
                self.call(node, aten.slice.Tensor, (node, dimension, offset, offset + length))
                for offset, length in axis.runs
            ]
            return self.call(node, aten.cat.default, (parts, dimension))
        have = require_fake(node).shape[dimension]
        if axis.offset == 0 and axis.stride == 1 and _same(have, count):
            return node
        if axis.stride == 1 and isinstance(have, torch.SymInt) and _same(have - axis.offset, count):
            return self.call(node, aten.slice.Tensor, (node, dimension, axis.offset, _END))
        if isinstance(count, torch.SymInt):
            raise Unreadable("a table cut to a symbolic length")
        stop = axis.offset + axis.stride * (count - 1) + 1
        return self.call(node, aten.slice.Tensor, (node, dimension, axis.offset, stop, axis.stride))


def _layout(value: Any) -> object:
    """What a fake result depends on: sizes, strides and types of tensors, expressions of symbols."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, Tensor):
        return layout(value)
    return value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def fake_value(node: fx.Node) -> Any:
    """What a node's operator gives for fake operands."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, dict(node.kwargs)), lambda item: item.meta["val"] if isinstance(item, fx.Node) else item
    )
    mode = torch._guards.detect_fake_mode([operand.meta.get("val") for operand in node.all_input_nodes])
    assert callable(node.target)
    if mode is None:
        return node.target(*args, **kwargs)
    with mode:
        return node.target(*args, **kwargs)


def _same(first: Any, second: Any) -> bool:
    """Equal sizes, symbols that were found to have one value among them."""
    one, other = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (first, second))
    return bool(one == other)


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []

    def keep(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(args, keep)
    return found


def _key(value: Any) -> Any:
    return tuple(_key(item) for item in value) if isinstance(value, list | tuple) else value
