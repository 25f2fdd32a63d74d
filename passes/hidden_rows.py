"""Rows in which a fill hides every key: their scores are all one number, whatever they were.

Softmax weighs all keys of such a row alike, and no gradient reaches its scores. A mask that is added says the same of
the weights where its numbers absorb every score, but lets gradients through; what is written here says both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from grape_compile.passes.biases import BiasPlan
from grape_compile.passes.graph import Unreadable, require_fake
from grape_compile.passes.operands import Emitter
from grape_compile.passes.regions import may_differentiate
from grape_compile.passes.score_terms import ABSORBING, NEVER, ScoreTerm

aten = torch.ops.aten


def hidden_rows(plan: BiasPlan, emitter: Emitter, mask_of: Callable[[ScoreTerm], fx.Node]) -> fx.Node | None:
    """Return what is true, [.., T_q, 1], in rows of which nothing is left: there the output is the mean of all values.

    None where no row can be one, or where the mask says it and nothing is differentiated. Unreadable where what such a
    row computes depends on the order of what is filled and added.
    """
    fills = _fills(plan)
    if not fills or (fills[0].value <= ABSORBING and not may_differentiate(emitter.program.graph)):
        return None
    hidden: fx.Node | None = None
    for fill in fills:
        node = mask_of(fill)
        if require_fake(node).dtype is not torch.bool:
            node = emitter.call(node, aten.to.dtype, (node, torch.bool))
        if not fill.dead:
            node = emitter.call(node, aten.logical_not.default, (node,))
        hidden = node if hidden is None else emitter.call(node, aten.logical_or.default, (hidden, node))
    assert hidden is not None
    return emitter.call(hidden, aten.all.dim, (hidden, -1, True))


def _fills(plan: BiasPlan) -> list[ScoreTerm]:
    """The fills that may hide all keys of a row, all with one number; none where no row can be hidden."""
    # Beside a sink such a row has no weight left for its keys, and no gradient.
    if plan.is_causal or plan.layer.sinks is not None or _leaves_keys(plan):
        return []
    if plan.layer.floored and plan.masks:
        raise Unreadable(
            "scores are raised to a lowest number: a row whose keys are all hidden would weigh them alike, and nothing "
            "shows that there is none"
        )
    if any(term.dead is not None and not term.whole and term.value > NEVER for term in plan.masks):
        raise Unreadable(
            f"a bias is filled with a number above {NEVER:.0e}: a row whose keys are all hidden would weigh them by "
            "their scores alone"
        )
    fills = [term for term in plan.masks if term.whole and math.isfinite(term.value)]
    if not fills:
        return []
    absorbs = all(term.value <= ABSORBING for term in fills)
    if len({term.value for term in fills}) > 1 or (
        len(fills) < len(plan.masks) and (not absorbs or may_differentiate(plan.scores.program.graph))
    ):
        raise Unreadable(
            "what hides keys is of several kinds, and one fills the scores with a number: a row whose keys are all "
            "hidden would tell them apart; fill once, with one mask"
        )
    if not absorbs and not plan.layer.terms[0].whole:
        raise Unreadable(
            f"scores are filled with {fills[0].value:g} before more is added to them: a row whose keys are all hidden "
            "would weigh them by that"
        )
    return fills


def _leaves_keys(plan: BiasPlan) -> bool:
    """Whether every row is known to see a key: masks of no input, at the only size the graph runs at."""
    scores, masks = plan.scores, list(plan.masks)
    if not (scores.is_static and scores.are_known(masks) and bool(scores.alive(masks).any(-1).all())):
        return False
    scores.rely_on_numbers(term.node for term in masks)
    return True
