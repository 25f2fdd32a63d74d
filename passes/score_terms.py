"""What is added to the scores of a layer, term by term: masks and biases told apart where the model adds them up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from grape_compile.passes.axes import Axes
from grape_compile.passes.graph import Program, Role, Taint, fake, op_name, require_fake

PASSED = {"aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::type_as", "aten::alias"}
_RESHAPED = {
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::unsqueeze", "aten::squeeze", "aten::expand",
    "aten::select",
}  # fmt: skip
LOWEST = -1e4
"""A number this low may hide an entry, and nothing else is as low."""
NEVER = -1e9
"""A value this low removes an entry whatever the scores are; only such a mask may be replaced by `is_causal`."""

ABSORBING = -1e30
"""A number this low stays itself in fp32 and fp64 whatever score is added to it."""


@dataclass(frozen=True)
class ScoreTerm:
    """Something added to the scores: `factor * node`, or where `dead` the entries of a boolean mask set to `value`.

    `dead` is None for an additive term, else the truth value that marks dead entries. `axes` are those of the
    scores where it is added: the last of them are the term's own. A `finished` term holds mask and bias at once: as
    a mask only its dead entries count. A `whole` one fills the scores, not only what is added to them.
    """

    node: fx.Node
    factor: float = 1.0
    dead: bool | None = None
    value: float = 0.0
    axes: Axes = ()
    finished: bool = False
    whole: bool = False

    def along(self, axes: Axes) -> ScoreTerm:
        """The same term, the axes of the scores told by other letters."""
        return replace(self, axes=axes)


def split_terms(program: Program, node: fx.Node, factor: float, axes: Axes) -> list[ScoreTerm]:
    """Split a value along its sums and fills, so that a bias and a mask added together are seen apart."""
    name, args = op_name(node), node.args
    inner = _passed(node)
    if inner is not None and require_fake(inner[0]).dim() <= len(axes):
        found = split_terms(program, inner[0], factor * inner[1], axes)
        # A product that holds no sum is a term as it stands: `-1e9 * hidden` is a mask, `hidden` is none.
        return found if inner[1] == 1.0 or len(found) > 1 else [ScoreTerm(node, factor, axes=axes)]
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
            return split_terms(program, first, factor, axes) + split_terms(
                program, second, factor * sign, axes
            )
    if name in ("aten::masked_fill", "aten::where"):
        mask, kept, filled, dead = (
            (args[1], args[0], args[2], True)
            if name == "aten::masked_fill"
            else (args[0], args[1], args[2], False)
        )
        value_of, kept_of = uniform(filled, program), uniform(kept, program)
        if kept_of is not None and kept_of * factor <= LOWEST:
            kept, value_of, kept_of, dead = filled, kept_of, value_of, not dead
        if (
            value_of is not None
            and value_of * factor <= LOWEST
            # What adds so high a number or nothing fills nothing: a row whose keys are all hidden keeps its bias.
            and (kept_of is None or (kept_of == 0.0 and value_of * factor <= NEVER))
            and isinstance(mask, fx.Node)
            and program.taints[mask] < Taint.PARAMETER
        ):
            hidden = ScoreTerm(mask, dead=dead, value=value_of * factor, axes=axes)
            # Where everything but zero is hidden, nothing is left to add.
            if not isinstance(kept, fx.Node) or kept_of == 0 or (dead and _is_truth_of(mask, kept)):
                return [hidden]
            return [hidden, *split_terms(program, kept, factor, axes)]
    return [ScoreTerm(node, factor, axes=axes)]


def uniform(value: Any, program: Program) -> float | None:
    """The one number of a value, or of all its entries."""
    made = isinstance(value, fx.Node) and op_name(value) in (
        "aten::full",
        "aten::full_like",
        "aten::new_full",
    )
    return constant(value.args[-1], program) if made else constant(value, program)


def _is_truth_of(mask: fx.Node, value: fx.Node) -> bool:
    """Whether a mask is true wherever a value is not zero."""
    name = op_name(mask)
    cast = name in ("aten::to", "aten::_to_copy") and require_fake(mask).dtype is torch.bool
    return mask.args[0] is value and (cast or (name == "aten::ne" and constant(mask.args[1]) == 0))


def _passed(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The value a node hands on, times a number, axes of one entry in front aside; None for anything else."""
    name, args = op_name(node), node.args
    if not args or not isinstance(args[0], fx.Node):
        return None
    before, after = fake(args[0]), fake(node)
    if before is None or after is None or not before.is_floating_point():
        return None
    if name in PASSED or (name in _RESHAPED and _aligned(before) == _aligned(after)):
        return args[0], 1.0
    if name == "aten::neg":
        return args[0], -1.0
    number = args[1] if len(args) > 1 else None
    if name in ("aten::mul", "aten::div") and isinstance(number, int | float) and number:
        return args[0], float(number) if name == "aten::mul" else 1.0 / number
    return (args[0], 1.0) if name in ("aten::add", "aten::sub") and number == 0 else None


def _aligned(value: torch.Tensor) -> list[str]:
    """Sizes from the first that is not one."""
    sizes = list(map(str, value.shape))
    while sizes and sizes[0] == "1":
        del sizes[0]
    return sizes


def constant(value: Any, program: Program | None = None) -> float | None:
    """A number, or a scalar tensor made of one; of a `program`, also a tensor of one that its code writes out."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    name = op_name(value)
    if name in ("aten::full", "aten::zeros") and require_fake(value).dim() == 0:
        return constant(value.args[1], program) if name == "aten::full" else 0.0
    if name in _HANDED_ON:
        return constant(value.args[0], program)
    if program is None or program.roles.get(value) is not Role.LITERAL:
        return None
    held = program.values.get(value)
    return float(held) if isinstance(held, torch.Tensor) and held.dim() == 0 else None


_HANDED_ON = {f"aten::{name}" for name in ("scalar_tensor", "lift_fresh", "lift_fresh_copy", "detach", "detach_")} | {
    "aten::to", "aten::_to_copy", "aten::clone",
}  # fmt: skip
