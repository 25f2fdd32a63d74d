"""Recognise a clock: a value that counts positions one by one, as opposed to any function of them."""

from __future__ import annotations

import torch
from torch import fx

from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import IDENTITIES, MOVEMENTS, keeps_numbers
from grape_compile.passes.operands import Operand
from grape_compile.passes.replay import Replay

_COUNTING = MOVEMENTS | {
    "aten::__and__", "aten::add", "aten::arange", "aten::bitwise_not", "aten::cumsum",
    "aten::detach", "aten::eq", "aten::full", "aten::gather", "aten::index", "aten::index_select",
    "aten::logical_not", "aten::masked_fill", "aten::ne", "aten::new_ones", "aten::ones", "aten::ones_like",
    "aten::rsub", "aten::scalar_tensor", "aten::sub", "aten::sum", "aten::where", "aten::zeros",
    "aten::zeros_like",
}  # fmt: skip


_ONES = {"aten::ones", "aten::ones_like", "aten::new_ones"}


def is_unit_clock(program: Program, replay: Replay, clock: Operand) -> bool:
    """True for given positions, and for values that count them: shifted, restarted or masked, never squared or binned.

    An integer input of the graph is given positions whatever it holds. A computed clock must be made of counting
    operations only, and move by at most one step a token except where it restarts.
    """
    if program.taints[clock.node] >= Taint.PARAMETER or clock.part != "value":
        return False
    if clock.node.op == "placeholder":
        return program.taints[clock.node] is Taint.POSITION or _is_index(clock.node)
    operations = _operations(clock.node)
    return operations is not None and _steps_by_one(replay, clock, may_rest="aten::cumsum" in operations)


def counts(program: Program, clock: Operand) -> bool:
    """True when a computed clock is made of counting operations only."""
    return _operations(clock.node) is not None


def is_steps(program: Program, replay: Replay, clock: Operand, shape: tuple[int, ...]) -> bool:
    """True when the clock is 0, 1, 2, ... along its one token axis, from the graph's own structure."""
    if (
        program.taints[clock.node] is not Taint.STRUCTURE
        or clock.node.op == "placeholder"
        or len(clock.token_axes) != 1
    ):
        return False
    try:
        values = _along_token(replay, clock)
    except Unreadable:
        return False
    count = shape[clock.token_axes[0]]
    return values.numel() >= count and torch.equal(
        values.flatten()[:count].double(), torch.arange(count).double()
    )


def _is_index(node: fx.Node) -> bool:
    value = fake(node)
    return value is not None and not value.is_floating_point()


def _operations(node: fx.Node) -> set[str] | None:
    """The operations a value is made of, or None when one of them does more than count."""
    seen, stack, names = {node}, [node], set()
    while stack:
        step = stack.pop()
        if step.op == "placeholder" or not isinstance(step.meta.get("val"), torch.Tensor | tuple | list):
            continue
        if step.op != "call_function" or not (op_name(step) in _COUNTING or _masks(step) or _floors(step)):
            return None
        if op_name(step) in ("aten::masked_fill", "aten::where") and not _fills_by_mask(step):
            return None
        names.add(op_name(step))
        for operand in step.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return names


def counted_by(node: fx.Node) -> int | None:
    """The step (1 or -1) of a value that is an `arange` plus a constant at any length; None for anything else."""
    sign = 1
    while node.op == "call_function":
        name = op_name(node)
        operands = [operand for operand in node.all_input_nodes if fake(operand) is not None]
        if name == "aten::arange":
            step = node.args[2] if len(node.args) > 2 else 1
            return sign * step if step in (1, -1) and isinstance(step, int) else None
        if (
            name == "aten::neg"
            or name == "aten::rsub"
            or (name == "aten::sub" and node.args[0] is not operands[0])
        ):
            sign = -sign
        elif name not in (
            "aten::add",
            "aten::sub",
            "aten::to",
            "aten::_to_copy",
            "aten::clone",
            "aten::unsqueeze",
            "aten::detach",
        ):
            return None
        if len(operands) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        node = operands[0]
    return None


def never_falls(node: fx.Node, dim: int) -> bool:
    """Whether a value counts what is true along an axis, shifted or cut off: it is no less at any later place."""
    while op_name(node) != "aten::cumsum":
        operands = [each for each in node.all_input_nodes if fake(each) is not None]
        shifted = op_name(node) in ("aten::add", "aten::sub") and node.args[0] in operands
        cut = op_name(node) in ("aten::clamp", "aten::clamp_min", "aten::clamp_max", "aten::relu")
        cast = op_name(node) in ("aten::to", "aten::_to_copy", "aten::clone") and keeps_numbers(node)
        if len(operands) != 1 or not (shifted or cut or cast):
            return False
        (node,) = operands
    if not isinstance(node.args[1], int) or node.args[1] % require_fake(node).dim() != dim:
        return False
    return _is_truth(node.all_input_nodes[0])


def _is_truth(node: fx.Node) -> bool:
    """What is true or not, be it cast."""
    while op_name(node) in IDENTITIES and require_fake(node).dtype is not torch.bool:
        node = node.all_input_nodes[0]
    return require_fake(node).dtype is torch.bool


def _masks(node: fx.Node) -> bool:
    """A product with a boolean or integer mask input (BLOOM: `(cumsum(mask) - 1) * mask`), or with the number one."""
    if op_name(node) != "aten::mul":
        return False
    if any(operand == 1 for operand in node.args):
        return True
    return any(_is_mask(operand) for operand in node.all_input_nodes) and len(set(node.all_input_nodes)) == 2


def _floors(node: fx.Node) -> bool:
    """max(x, n) of no more than zero, which live positions are not below."""
    name, args = op_name(node), node.args[1:]
    given = dict(zip(("min", "max"), args, strict=False)) | node.kwargs
    low = given.get("min")
    known = name in ("aten::clamp", "aten::clamp_min") and given.get("max") is None
    return known and isinstance(low, int | float) and low <= 0


def _fills_by_mask(node: fx.Node) -> bool:
    """Positions overwritten where a mask input says so, not where a position is large."""
    condition = node.args[1] if op_name(node) == "aten::masked_fill" else node.args[0]
    while isinstance(condition, fx.Node) and condition.op == "call_function":
        if op_name(condition) not in MOVEMENTS | {
            "aten::eq",
            "aten::ne",
            "aten::logical_not",
            "aten::bitwise_not",
        }:
            return False
        condition = condition.all_input_nodes[0] if condition.all_input_nodes else None
    return isinstance(condition, fx.Node) and condition.op == "placeholder"


def _is_mask(node: fx.Node) -> bool:
    """A mask that was given, or one of ones, that masks nothing."""
    while op_name(node) in MOVEMENTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return op_name(node) in _ONES or (node.op == "placeholder" and _is_index(node))


def _along_token(replay: Replay, clock: Operand) -> torch.Tensor:
    value = replay.tensor(clock.node)
    for dimension in reversed(range(len(clock.axes))):
        axis = clock.axes[dimension]
        if axis.role == "fixed":
            value = value.select(dimension, axis.offset)
        else:
            value = value.narrow(dimension, axis.offset, value.shape[dimension] - axis.offset)[
                (slice(None),) * dimension + (slice(None, None, axis.stride),)
            ]
    return value


def _steps_by_one(replay: Replay, clock: Operand, may_rest: bool) -> bool:
    """One step a token; a restart goes to 0 or 1; a count of a mask (`may_rest`) stands still on masked tokens."""
    try:
        values = _along_token(replay, clock).double()
    except Unreadable:
        return False
    if values.dim() == 0 or values.shape[-1] < 2:
        return True
    rises = values[..., 1:] - values[..., :-1]
    fine = (rises == 1) | (values[..., 1:] <= 1)
    if may_rest:
        fine = fine | (rises == 0)
    return bool(fine.all()) and (bool((rises == 1).any()) or values.shape[-1] == 2)


def is_given(node: fx.Node) -> bool:
    """True for positions that are an input of the graph."""
    return node.op == "placeholder" and _is_index(node)


_LOOK = 8
"""Operations to look back for positions, for the sake of a sentence."""


def is_positional(node: fx.Node, look: int = _LOOK) -> bool:
    """Whether a value is made of positions or of a running sum, at most `look` operations back."""
    seen, stack = {node}, [(node, 0)]
    while stack:
        step, depth = stack.pop()
        if op_name(step) in ("aten::cumsum", "aten::arange") or is_given(step):
            return True
        if depth < look:
            new = [each for each in step.all_input_nodes if each not in seen]
            seen.update(new)
            stack += [(each, depth + 1) for each in new]
    return False
