"""See through the guard that the fused attention is decomposed into: weights of a row without a live key are zero.

    where(not any(not (scores == -inf), last axis), 0, softmax(scores))

which is what `grape::attend` gives for such a row.
"""

from __future__ import annotations

import math

from torch import fx

from grape_compile.passes.graph import op_name
from grape_compile.passes.score_terms import constant

_ZEROS = {"aten::full_like", "aten::zeros_like"}


def guarded(softmax: fx.Node, scores: fx.Node) -> fx.Node:
    """The weights behind the guard around this softmax of scores; the softmax itself where there is none."""
    users = [user for user in softmax.users if op_name(user) != "aten::_assert_tensor_metadata"]
    guards = [user for user in users if op_name(user) not in _ZEROS]
    if len(guards) != 1 or op_name(guards[0]) != "aten::where" or guards[0].args[2] is not softmax:
        return softmax
    (guard,) = guards
    dead, zero = guard.args[:2]
    is_zero = constant(zero) == 0 or (
        isinstance(zero, fx.Node)
        and op_name(zero) in _ZEROS
        and (op_name(zero) == "aten::zeros_like" or zero.args[1] == 0)
    )
    return guard if is_zero and _without_live_key(dead, scores) else softmax


def _without_live_key(node: object, scores: object) -> bool:
    """not any(not (scores == -inf), over the last axis)."""
    alive = _operand(node, "aten::logical_not")
    if alive is None or op_name(alive) != "aten::any" or list(alive.args[1:]) != [-1, True]:
        return False
    equal = _operand(alive.args[0], "aten::logical_not")
    if equal is None or op_name(equal) != "aten::eq":
        return False
    lowest = constant(equal.args[1])
    return equal.args[0] is scores and lowest is not None and lowest == -math.inf


def _operand(node: object, name: str) -> fx.Node | None:
    """What an operator of this name is given."""
    if not isinstance(node, fx.Node) or op_name(node) != name:
        return None
    operand = node.args[0]
    return operand if isinstance(operand, fx.Node) else None
