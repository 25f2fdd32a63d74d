"""Read attention sinks: a last column of logits, one number for each head, whose weights are dropped (gpt-oss).

What: softmax(cat([scores, sinks], -1))[..., :-1], a number of each row taken off before the softmax or not.
Leaves alone: columns that differ among queries, that depend on activations, or whose weights are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from grape_compile.passes.graph import Program, Taint, fake, op_name, require_fake
from grape_compile.passes.score_terms import PASSED


@dataclass(frozen=True)
class Sinks:
    """Logits of `scores` [B, H, Tq, Tk] and of `sinks` [B or 1, H or 1, 1, 1] that meet in one softmax."""

    scores: fx.Node
    sinks: fx.Node


def joined_sinks(program: Program, node: fx.Node) -> Sinks | None:
    """Scores and sinks behind the argument of a softmax over four axes; None where there is no such column."""
    name, args = op_name(node), node.args
    if name in PASSED and isinstance(args[0], fx.Node):
        return joined_sinks(program, args[0])
    if name == "aten::sub" and not node.kwargs and isinstance(args[0], fx.Node) and _is_of_rows(args[1]):
        return joined_sinks(program, args[0])
    if name != "aten::cat" or len(args) < 2 or args[1] not in (-1, 3):
        return None
    parts = args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    scores, column = parts
    if not isinstance(scores, fx.Node) or not isinstance(column, fx.Node) or not _is_of_rows(column):
        return None
    sinks = _before_expansion(column)
    if require_fake(sinks).dim() != 4 or str(require_fake(sinks).shape[2]) != "1":
        return None
    known = program.taints[sinks] <= Taint.PARAMETER and require_fake(sinks).is_floating_point()
    return Sinks(scores, sinks) if known else None


def without_sinks(node: fx.Node, weights: fx.Node) -> bool:
    """Whether a node takes all weights but those of the last column."""
    if op_name(node) != "aten::slice" or node.args[0] is not weights:
        return False
    places = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False))
    rank, count = require_fake(weights).dim(), require_fake(weights).shape[-1] - 1
    end = places.get("end")
    stops = end == -1 or str(end.meta.get("val") if isinstance(end, fx.Node) else end) == str(count)
    is_last = places.get("dim", 0) in (-1, rank - 1)
    return bool(is_last and places.get("start") in (0, None) and places.get("step", 1) == 1 and stops)


def _is_of_rows(value: object) -> bool:
    """Whether a value has one number for each row of the scores."""
    found = fake(value) if isinstance(value, fx.Node) else None
    return found is not None and found.dim() > 0 and str(found.shape[-1]) == "1"


def _before_expansion(node: fx.Node) -> fx.Node:
    """What was expanded over batch and queries."""
    while op_name(node) in {*PASSED, "aten::expand"} and isinstance(node.args[0], fx.Node):
        before = fake(node.args[0])
        if before is None or before.dim() != require_fake(node).dim():
            break
        node = node.args[0]
    return node
