"""Find additive position biases by what softmax can see.

What: attention layers whose scores carry biases of the algebra off the mask, up to a constant per row (GRAPE 4, 5,
    App. C): softmax ignores the constant, so `slope * j` and `slope * (j - t)` are one bias.
How: everything added to the scores is read as one sum of products (addends.py) and named (bias_parts.py, paths.py).
    Biases that no product shows (finished tables, counts of a mask) are evaluated at the captured size, every row.
Leaves alone: buckets, saturating tables, slopes that differ per key, anything behind a non-linear operation.
Cost: one reading per layer; one evaluation per distinct term that holds no activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from grape_compile.passes.addends import AddendReader
from grape_compile.passes.attention import Attention, find_attention
from grape_compile.passes.bias_parts import BiasPart, Namer
from grape_compile.passes.causal import CausalMasks
from grape_compile.passes.evaluated_biases import evaluated
from grape_compile.passes.finished_tables import TablePart
from grape_compile.passes.graph import Program, Role, Taint, Unreadable
from grape_compile.passes.memory import owner
from grape_compile.passes.paths import PathPart
from grape_compile.passes.plans import Miss
from grape_compile.passes.replay import Replay
from grape_compile.passes.score_terms import NEVER, ScoreTerm
from grape_compile.passes.scores import DEAD, KEY, QUERY, Scores
from grape_compile.passes.unread import unread_biases


@dataclass(frozen=True)
class BiasPlan:
    """An attention layer with a bias: `parts` add up; `masks` are what else is added."""

    layer: Attention
    scores: Scores
    masks: tuple[ScoreTerm, ...]
    parts: tuple[BiasPart | PathPart | TablePart, ...]
    is_causal: bool
    window: int | None


def detect_biases(
    program: Program,
    plain: Callable[[Attention], bool] = lambda _: False,
    unbiased: Callable[[Attention], bool] = lambda _: False,
    keeps: Callable[[Attention], bool] = lambda _: False,
    *,
    nearly: bool = True,
) -> tuple[list[BiasPlan], list[tuple[fx.Node, Miss]]]:
    """All additive biases of a program, and the layers with a position-dependent bias of another form.

    Of the layers that are wanted as operators although nothing is added, `plain` ones, there are plans without parts.
    Of `unbiased` ones it is known that they add no position: what the graph is given to add to them stays as it is.
    Those that one `keeps` may have weights that have to stay the model's own, which otherwise is an obstacle; so may
    those whose weights are `nearly` a softmax of their scores.
    """
    plans: list[BiasPlan] = []
    misses: list[tuple[fx.Node, Miss]] = []
    replay = Replay(program)
    layers, products = find_attention(program, plain)
    for layer in layers:
        if layer.stays and not keeps(layer):
            layer.plain = layer.plain and not layer.nearly
            layer.obstacle = layer.obstacle or ("" if layer.nearly and nearly else layer.stays)
        try:
            result = _plan(Scores(program, replay, layer), unbiased(layer))
        except Unreadable as reason:
            result = Miss("readable", f"what is added to the scores cannot be read: {reason}", 1)
        if isinstance(result, BiasPlan):
            plans.append(result)
        elif result is not None and result.depth > 0:
            misses.append((layer.softmax, result))
    return plans, misses + unread_biases(program, replay, products)


def _plan(scores: Scores, unbiased: bool) -> BiasPlan | Miss | None:
    layer = scores.layer
    if 0 in scores.shape:
        return None
    masks, biases = scores.split()
    if unbiased:
        masks += [term for term in biases if _is_given(scores.program, term)]
        biases = [term for term in biases if term not in masks]
    if not biases:
        return _plain(scores, masks) if layer.plain else None
    contextual = any(scores.program.taints[term.node] is Taint.DATA for term in biases)
    if layer.obstacle and not contextual:
        return _obstacle(layer)
    alive = scores.alive(masks)
    parts: list[BiasPart | PathPart | TablePart] | Miss
    parts = _parts(scores, biases, alive, masks)
    if isinstance(parts, Miss) and not contextual:
        values = evaluated(scores, biases, masks)
        parts = values if isinstance(values, Miss) else [*values]
    if isinstance(parts, Miss) and parts.depth == 0 and any(_is_given_line(scores, term) for term in biases):
        parts = _GIVEN
    if isinstance(parts, Miss):
        # Of a layer that is wanted as an operator it is told however far this is from a bias.
        return replace(parts, depth=max(parts.depth, 1)) if layer.plain else parts
    if layer.sinks is not None and not scores.is_static:
        return Miss(
            "attention",
            "the layer adds a position bias beside attention sinks, which see numbers of a row that softmax alone "
            "does not; those are compared at one length, and this graph runs at several",
            3,
        )
    if not parts and not layer.plain:  # only what is the same along a row, which softmax does not see
        return None
    if layer.obstacle:
        return _obstacle(layer)
    return _with_masks(scores, masks, parts)


def _is_given(program: Program, term: ScoreTerm) -> bool:
    """Whether a term is an input of the graph, or a part of one."""
    return program.roles.get(owner(term.node)) is Role.INPUT


def _is_given_line(scores: Scores, term: ScoreTerm) -> bool:
    """Whether a term that the graph is given rises by one slope per head in this example."""
    if not _is_given(scores.program, term) or scores.shape[KEY] < 3:
        return False
    value = scores.value(term).double()
    steps = value.diff()
    scale = float(value[value > DEAD].abs().max()) if bool((value > DEAD).any()) else 0.0
    seen = (value[..., 1:] > DEAD) & (value[..., :-1] > DEAD)
    high = torch.where(seen, steps, -torch.inf).amax((-2, -1))
    low = torch.where(seen, steps, torch.inf).amin((-2, -1))
    apart = (high - low)[high.isfinite()]
    return apart.numel() > 0 and bool((apart <= 1e-6 * scale).all()) and bool((steps[seen] != 0).any())


_GIVEN = Miss(
    "outside",
    "a bias that rises by one slope per head is an input of the graph: nothing proves that it does in the next call; "
    "make it in the same graph, from slopes and positions (a graph break between the two, or a frame that receives it "
    "ready made, takes them apart)",
    3,
    "ALiBi",
)


def _plain(scores: Scores, masks: list[ScoreTerm]) -> BiasPlan | Miss:
    if scores.layer.obstacle:
        return Miss("attention", f"the layer cannot be an operator: {scores.layer.obstacle}", 3)
    return _with_masks(scores, masks, [])


def _with_masks(
    scores: Scores,
    masks: list[ScoreTerm],
    parts: Sequence[BiasPart | PathPart | TablePart],
) -> BiasPlan:
    """The plan of a layer that hides keys by these masks, by a flag where they say no more."""
    causal, window = bool(masks) and CausalMasks(scores, AddendReader(scores)).say_causal(masks, NEVER), None
    if not causal:
        causal, window = scores.once("causal", masks, partial(_causal, scores, masks))
        if causal:
            scores.rely_on_numbers(term.node for term in masks)
    return BiasPlan(scores.layer, scores, tuple(masks), tuple(parts), causal, window)


def _obstacle(layer: Attention) -> Miss:
    return Miss("attention", f"the layer adds a position bias, but {layer.obstacle}", 3)


def _parts(
    scores: Scores, biases: list[ScoreTerm], alive: Tensor, masks: list[ScoreTerm]
) -> list[BiasPart | PathPart | TablePart] | Miss:
    """The biases as sums of products, read and named."""
    reader = AddendReader(scores)
    causal = CausalMasks(scores, reader)
    if causal.hide_the_future(masks):
        reader.kept = causal.for_seen
    try:
        addends = reader.read(biases)
    except Unreadable as reason:
        return Miss("readable", f"what is added to the scores cannot be read: {reason}", 0)
    lead, _, _ = scores.samples(biases[0])
    parts = Namer(scores, reader, lead, alive, masks).parts(addends)
    return parts if isinstance(parts, Miss) else [*parts]


def _causal(scores: Scores, masks: list[ScoreTerm]) -> tuple[bool, int | None]:
    """Whether the masks are exactly lower-right causal (and a window) for the only size the graph can run at."""
    layer, alive = scores.layer, scores.alive(masks)
    queries, keys = scores.shape[QUERY], scores.shape[KEY]
    if not masks:
        return layer.is_causal, None
    if layer.is_causal or not scores.are_known(masks):
        return False, None
    for term in masks:
        lowest = scores.value(term) * term.factor
        if (term.dead is None and bool(((lowest <= DEAD) & (lowest > NEVER)).any())) or (
            term.dead is not None and term.value > NEVER
        ):
            return False, None
    offset = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    seen = alive[..., -1, :].expand(*alive.shape[:-2], keys).sum(-1)
    window = int(seen.max())
    wanted = (offset <= 0) & (offset > -window)
    if not bool((alive == wanted).all()) or alive.shape[-2:] != wanted.shape:
        return False, None
    return True, None if window >= keys else window
