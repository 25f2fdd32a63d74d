"""Take out operators that do nothing: what they hand on is, element by element, what they were given.

What: movement that ends where it began (an axis added and dropped, axes exchanged twice, a flip or a roll undone, one
    of several equal parts joined), products with one, sums with zero, padding by none, a sign turned twice, casts to
    the own type, a dropout that is off, what is copied over another value. Those who read the result read the operand
    instead. Of two equal views of one value the first stands for both.
Why: detection reads layers by their form around the softmax; a detour would hide it.
Leaves alone: results of the graph; what stands for an input, and its operands outside of the graph; copies where the
    graph writes into values; what stands under `no_grad` and reads from outside of it, since it stops the gradient.
Cost: one pass over the graph, a few steps back from each node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, Unreadable, fake, frozen, is_pure, op_name
from grape_compile.passes.memory import CERTAIN_VIEWS
from grape_compile.passes.movement import (
    EXPANDS,
    JOINS,
    PERMUTES,
    RESHAPES,
    SPLITS,
    ints,
    is_symbolic,
    join_dim,
    join_parts,
    operand_of,
    permutation,
)
from grape_compile.passes.pieces import PADS

_STEPS = 8
_CASTS = {"aten::to", "aten::_to_copy", "aten::type_as"}
_VIEWS = RESHAPES | EXPANDS | PERMUTES | {"aten::select"}


@dataclass(frozen=True)
class _Axis:
    """Where an axis comes from: axis `source` of the value it all began with (None: an added one), flipped, rolled."""

    source: int | None = None
    flipped: bool = False
    rolled: int = 0


@dataclass(frozen=True)
class DropNothing(Pass):
    """Users of an operator that does nothing take its operand."""

    def run(self, program: Program) -> Outcome:
        copies = not program.mutations
        views: dict[object, fx.Node] = {}
        for node in list(program.graph.nodes):
            source = _origin(node, copies) or _equal_view(program, node, views)
            if source is None or (node in program.no_grad and source not in program.no_grad):
                continue
            if node in program.stands or (source in program.outside and node not in program.outside):
                continue
            node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")
            _erase_unused(program.graph, node)
        return Outcome()


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a pure value that nothing reads any more, and then what it alone has read."""
    stack = [node]
    while stack:
        unused = stack.pop()
        if not unused.users and unused.op == "call_function" and is_pure(unused):
            stack += unused.all_input_nodes
            graph.erase_node(unused)


def _equal_view(program: Program, node: fx.Node, views: dict[object, fx.Node]) -> fx.Node | None:
    """The earlier view of the same memory, taken in the same way in the same region; `views` are those met so far."""
    name = op_name(node)
    if name not in CERTAIN_VIEWS | SPLITS | {"getitem"} or node in program.stale:
        return None
    try:
        key = (node.target, frozen((node.args, node.kwargs), _itself), program.marks[node])
        earlier = views.get(key)
    except TypeError:
        return None
    # One that was left without a reader is gone.
    if earlier is None or earlier._erased:
        views[key] = node
        return None
    return earlier


def _itself(item: object) -> object:
    return item


def _origin(node: fx.Node, copies: bool) -> fx.Node | None:
    """The earliest value a node is equal to; None where it is none but its own."""
    if node.op != "call_function" or fake(node) is None or not is_pure(node):
        return None
    try:
        return (_unchanged(node) if copies else None) or _moved_back(node, copies)
    except (Unreadable, IndexError, TypeError):
        return None


def _same(one: fx.Node, other: fx.Node) -> bool:
    """Equal in type and, at every size, in shape."""
    first, second = fake(one), fake(other)
    if first is None or second is None or first.dtype != second.dtype:
        return False
    return list(map(str, first.shape)) == list(map(str, second.shape))


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The operand of arithmetic that leaves every number, and of a cast that keeps the type."""
    name, args = op_name(node), node.args
    operands = [arg for arg in args[:2] if isinstance(arg, fx.Node)]
    if name == "aten::copy" and _same(node, operands[1]):  # into memory that nothing else is left of
        return operands[1] if _same_device(node, operands[1]) else None
    if not operands or not _same(node, operands[0]) or (node.kwargs and name not in _CASTS):
        return None
    if name == "aten::dropout":
        return operands[0]
    if name in PADS:
        amounts = args[1]
        return (
            operands[0]
            if isinstance(amounts, list | tuple)
            and all(isinstance(each, int) and each == 0 for each in amounts)
            else None
        )
    number = next((arg for arg in args[:2] if isinstance(arg, int | float)), None)
    if name in _CASTS:
        return operands[0] if fake(node) is not None and _same_device(node, operands[0]) else None
    if name == "aten::neg" and op_name(operands[0]) == "aten::neg":
        return operand_of(operands[0], 0)
    if len(operands) != 1 or number is None or len(args) > 2:
        return None
    if name == "aten::mul" and number == 1:
        return operands[0]
    if name == "aten::div" and number == 1 and args[0] is operands[0]:
        return operands[0]
    return (
        operands[0] if name in ("aten::add", "aten::sub") and number == 0 and args[0] is operands[0] else None
    )


def _same_device(one: fx.Node, other: fx.Node) -> bool:
    first, second = fake(one), fake(other)
    return first is not None and second is not None and first.device == second.device


def _moved_back(node: fx.Node, copies: bool) -> fx.Node | None:
    """The value that a chain of movements from it to this node gives back unchanged."""
    value = fake(node)
    assert value is not None
    axes: list[_Axis] = [_Axis(axis) for axis in range(value.dim())]
    step, found = node, None
    for _ in range(_STEPS):
        back = _back(step, axes, copies)
        if back is None:
            break
        step, axes = back
        if _same(step, node) and _in_place(axes, value):
            found = step
    return found


def _in_place(axes: list[_Axis], value: torch.Tensor) -> bool:
    """Every axis of more than one entry is where it was."""
    return all(axes[place] == _Axis(place) for place, size in enumerate(value.shape) if str(size) != "1")


def _back(node: fx.Node, axes: list[_Axis], copies: bool) -> tuple[fx.Node, list[_Axis]] | None:
    """The operand of one movement, and for each of its axes the axis of the last value it became.

    An axis that became none (dropped, of equal entries) has no source.
    """
    name = op_name(node)
    if name == "getitem":
        split = operand_of(node, 0)
        if op_name(split) != "aten::unbind":
            return None
        dim = ints(split.args[1])[0] if len(split.args) > 1 else 0
        operand = operand_of(split, 0)
        return operand, _inserted(axes, dim, operand)
    if name in JOINS:
        parts = join_parts(node)
        if not copies or any(part is not parts[0] for part in parts):
            return None
        if name == "aten::stack":
            dim = join_dim(node)
            return (parts[0], axes[:dim] + axes[dim + 1 :]) if axes[dim].source is None else None
        return (parts[0], axes) if len(parts) == 1 else None
    if name not in _VIEWS and not (copies and name in ("aten::flip", "aten::roll")):
        return None
    operand = operand_of(node, 0)
    before, after = fake(operand), fake(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    rank = before.dim()
    if name in PERMUTES:
        moved = [_Axis()] * rank
        for position, dim in enumerate(permutation(node, name, rank)):
            moved[dim] = axes[position]
        return operand, moved
    if name == "aten::select":
        return operand, _inserted(axes, ints(node.args[1])[0], operand)
    if name in ("aten::flip", "aten::roll"):
        return operand, _turned(node, name, axes, rank)
    return _reshaped(operand, before, after, axes)


def _inserted(axes: list[_Axis], dim: int, operand: fx.Node) -> list[_Axis]:
    value = fake(operand)
    assert value is not None
    dim %= value.dim()
    return [*axes[:dim], _Axis(), *axes[dim:]]


def _turned(node: fx.Node, name: str, axes: list[_Axis], rank: int) -> list[_Axis]:
    turned = list(axes)
    if name == "aten::flip":
        for dim in ints(node.args[1]):
            held = turned[dim % rank]
            turned[dim % rank] = _Axis(held.source, not held.flipped, -held.rolled)
        return turned
    if len(node.args) < 3 or not node.args[2] or any(map(is_symbolic, ints(node.args[1]))):
        raise Unreadable("a roll of the flattened tensor")
    for shift, dim in zip(ints(node.args[1]), ints(node.args[2]), strict=True):
        held = turned[dim % rank]
        turned[dim % rank] = _Axis(
            held.source, held.flipped, held.rolled + (-shift if held.flipped else shift)
        )
    return turned


def _reshaped(
    operand: fx.Node, before: torch.Tensor, after: torch.Tensor, axes: list[_Axis]
) -> tuple[fx.Node, list[_Axis]] | None:
    """Axes of one entry come and go; all others stay as they are."""
    old, new = list(map(str, before.shape)), list(map(str, after.shape))
    kept = [axis for axis, size in zip(axes, new, strict=True) if size != "1"]
    if old == new:
        return operand, axes
    if [size for size in old if size != "1"] == [size for size in new if size != "1"]:
        rest = iter(kept)
        return operand, [_Axis() if size == "1" else next(rest) for size in old]
    wider = len(old) == len(new) and all(a in ("1", b) for a, b in zip(old, new, strict=True))
    if not wider:
        return None
    return operand, [_Axis() if a != b else axis for a, b, axis in zip(old, new, axes, strict=True)]
