"""What is added to the scores of a layer, term by term: masks and biases told apart where the model adds them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from grape_compile.passes.graph import Program, Taint, op_name, require_fake

PASSED = {"aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::type_as", "aten::alias"}
_LOWEST = -1e4


@dataclass(frozen=True)
class ScoreTerm:
    """Something added to the scores: `factor * node`, or where `dead` the entries of a boolean mask set to `value`.

    `dead` is None for an additive term, else the truth value that marks dead entries. `folded` is the batch and heads
    of a term that still lives in the folded [B * H, ...] layout. A `finished` term holds mask and bias at once: as
    a mask only its dead entries count.
    """

    node: fx.Node
    factor: float = 1.0
    dead: bool | None = None
    value: float = 0.0
    folded: bool = False
    finished: bool = False


def split_terms(program: Program, node: fx.Node, factor: float, folded: bool = False) -> list[ScoreTerm]:
    """Split a value along its sums and fills, so that a bias and a mask added together are seen apart."""
    name, args = op_name(node), node.args
    if name in PASSED and isinstance(args[0], fx.Node) and require_fake(args[0]).is_floating_point():
        return split_terms(program, args[0], factor, folded)
    if (
        name in ("aten::add", "aten::sub")
        and all(isinstance(arg, fx.Node) for arg in args[:2])
        and not node.kwargs
    ):
        value = require_fake(node)
        if value.dim() >= 3:
            first, second = args[0], args[1]
            assert isinstance(first, fx.Node)
            assert isinstance(second, fx.Node)
            sign = -1.0 if name == "aten::sub" else 1.0
            return split_terms(program, first, factor, folded) + split_terms(
                program, second, factor * sign, folded
            )
    if name in ("aten::masked_fill", "aten::where"):
        mask, kept, filled, dead = (
            (args[1], args[0], args[2], True)
            if name == "aten::masked_fill"
            else (args[0], args[1], args[2], False)
        )
        if constant(kept) is not None and constant(filled) is None:
            kept, filled, dead = filled, kept, not dead
        value_of, kept_of = constant(filled), constant(kept)
        if (
            value_of is not None
            and value_of <= _LOWEST
            and kept_of is None
            and isinstance(mask, fx.Node)
            and isinstance(kept, fx.Node)
            and program.taints[mask] < Taint.PARAMETER
        ):
            return [
                ScoreTerm(mask, dead=dead, value=value_of * factor, folded=folded),
                *split_terms(program, kept, factor, folded),
            ]
    return [ScoreTerm(node, factor, folded=folded)]


def constant(value: Any) -> float | None:
    """A number, or a scalar tensor made of one."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    name = op_name(value)
    if name in ("aten::full", "aten::zeros") and require_fake(value).dim() == 0:
        return constant(value.args[1]) if name == "aten::full" else 0.0
    if name == "aten::scalar_tensor":
        return constant(value.args[0])
    if name in ("aten::lift_fresh_copy", "aten::to", "aten::_to_copy", "aten::clone"):
        return constant(value.args[0])
    return None
