"""The scores of an attention layer as a target of four axes (batch, head, query, key), and values seen through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.passes.attention import Attention
from grape_compile.passes.axes import BATCH as BATCH
from grape_compile.passes.axes import HEAD as HEAD
from grape_compile.passes.axes import KEY as KEY
from grape_compile.passes.axes import QUERY as QUERY
from grape_compile.passes.axes import Axes, on_tensors
from grape_compile.passes.facts import numbers_of
from grape_compile.passes.graph import Fact, Program, Taint, require_fake
from grape_compile.passes.movement import is_symbolic
from grape_compile.passes.operands import Axis, Operand, fit
from grape_compile.passes.replay import Found, Replay
from grape_compile.passes.score_terms import ScoreTerm
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Factor, Index, broadcast

DEAD = -1e4
"""An added value this low marks a dead entry."""


class Scores:
    """Axes, sizes and samples of the scores of one layer; of a few heads, or of `every_head`."""

    def __init__(self, program: Program, replay: Replay, layer: Attention) -> None:
        self.program, self.replay, self.layer = program, replay, layer
        self.sizes, self.every_head = Sizes(), False
        self.symbolic = tuple(layer.layout.size(role) for role in (BATCH, HEAD, QUERY, KEY))
        batch, heads, queries, keys = (self.sizes(size) for size in self.symbolic)
        self.shape = (batch, heads, queries, keys)
        self.facts: dict[fx.Node, list[Fact]] = {}

    @property
    def is_square(self) -> bool:
        """As many queries as keys, whatever the sizes."""
        return str(self.symbolic[QUERY]) == str(self.symbolic[KEY])

    @property
    def is_static(self) -> bool:
        """The graph runs at no other number of queries and keys."""
        return all(isinstance(self.symbolic[axis], int) for axis in (QUERY, KEY))

    def is_full(self, view: Operand, planes: int = 1) -> bool:
        """A view that takes every element of its axes, at any size."""
        sizes: dict[str | int, Any] = {**dict(enumerate(self.symbolic)), "plane": planes}
        shape = require_fake(view.node).shape
        return all(
            axis.role == "fixed"
            or ((axis.offset, axis.stride) == (0, 1) and str(size) == str(sizes[axis.role]))
            or axis.is_part
            for axis, size in zip(view.axes, shape, strict=True)
        )

    # -- numbers of kept tensors ---------------------------------------------------------------------------------------

    def rely(self, node: fx.Node, fact: Fact) -> None:
        """What is found in this layer holds as long as this is true of a kept input."""
        self.facts.setdefault(node, []).append(fact)

    def rely_on_numbers(self, nodes: Iterable[fx.Node]) -> None:
        """What is found in this layer holds as long as values made of constants and kept inputs are what they are."""
        for node in nodes:
            for leaf, fact in numbers_of(self.program, node, self.replay):
                self.rely(leaf, fact)

    def are_known(self, masks: Sequence[ScoreTerm]) -> bool:
        """Whether masks are made of constants and kept inputs alone: their numbers may be relied on."""
        return all(self.program.made_of(term.node) is not None for term in masks)

    # -- values at the captured size -----------------------------------------------------------------------------------

    def split(self) -> tuple[list[ScoreTerm], list[ScoreTerm]]:
        """Masks and biases apart. What depends on activations is a bias; it has no value here."""
        masks, biases = [], []
        for term in self.layer.terms:
            if term.dead is not None:
                masks.append(term)
                continue
            if self.program.taints[term.node] is Taint.DATA:
                biases.append(term)
                continue
            masking, adding = self.once("part", [term], partial(self._parts, term))
            if masking:
                masks.append(replace(term, finished=True) if adding else term)
            if adding:
                biases.append(term)
        return masks, biases

    def _parts(self, term: ScoreTerm) -> tuple[bool, bool]:
        """Whether a term hides keys, and whether it adds what differs among those it does not hide."""
        return hides_and_adds(self.value(term) * term.factor)

    def once(self, fact: str, terms: Sequence[ScoreTerm], find: Callable[[], Found]) -> Found:
        """What `find` tells of the values of terms, found once for the layers that add the same."""
        kinds = tuple((term.factor, term.dead, term.value, term.axes) for term in terms)
        key = fact, self.shape, self.layer.is_causal, kinds
        return self.replay.once(key, [term.node for term in terms], find)

    def value(self, term: ScoreTerm, replay: Replay | None = None) -> Tensor:
        """What a term adds, with four axes: [B or 1, H or 1, Tq or 1, Tk or 1], without its factor."""
        held = (replay or self.replay).tensor(term.node)
        axes = own_axes(held, term.axes)
        value: Tensor = self.layer.layout.ordered(on_tensors, held, axes, (BATCH, HEAD, QUERY, KEY))
        return value[(None,) * (4 - value.dim())]

    def alive(self, masks: list[ScoreTerm]) -> Tensor:
        """Entries a query can see."""
        return self.once("alive", masks, partial(self._alive, masks))

    def _alive(self, masks: list[ScoreTerm]) -> Tensor:
        alive = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        if self.layer.is_causal:
            alive = torch.ones(self.shape[QUERY], self.shape[KEY], dtype=torch.bool).tril()[None, None]
        for term in masks:
            value = self.value(term)
            dead = value.bool() == term.dead if term.dead is not None else value * term.factor <= DEAD
            alive = alive & ~dead
        return alive

    def added(self, replay: Replay, queries: list[int]) -> Tensor:
        """Everything added to the scores of some queries in fp64, [B or 1, H or 1, queries, Tk]; dead is -inf."""
        total = torch.zeros(1, 1, len(queries), self.shape[KEY], dtype=torch.float64)
        if self.layer.is_causal:
            future = torch.arange(self.shape[KEY]) > torch.tensor(queries)[:, None]
            total = total.masked_fill(future, -torch.inf)
        for term in self.layer.terms:
            value = self.value(term, replay)
            value = value[:, :, queries] if value.shape[QUERY] > 1 else value
            if term.dead is not None:
                total = torch.where(value.bool() == term.dead, -torch.inf, total)
            else:
                added = value * term.factor
                total = total + torch.where(added <= DEAD, -torch.inf, added)
        return total

    # -- elements ------------------------------------------------------------------------------------------------------

    def places(self) -> Index:
        """Sampled batch, head, query and key numbers, all combinations."""
        choices = [
            torch.tensor(sorted({0, 1, size // 2, size - 1} & set(range(size)))) for size in self.shape
        ]
        if self.every_head:
            choices[HEAD] = torch.arange(self.shape[HEAD])
        grid = torch.cartesian_prod(*choices).reshape(-1, 4)
        return tuple(grid[:, axis] for axis in range(4))

    def samples(self, term: ScoreTerm) -> tuple[Index, Index, Tensor]:
        """Sampled (batch, head, query, key), and the element of the term each of them sees."""
        lead = self.places()
        full = self.layer.layout.index(term.axes, lead)
        return lead, broadcast(full, self.sizes.shape(term.node)), torch.arange(lead[0].numel())

    def view(
        self, factor: Factor, lead: Index, plane: Tensor | None = None, planes: int = 1
    ) -> Operand | None:
        """A value as an operand, when its elements lie along the axes; `lead` says for which places they were read."""
        if factor.part not in ("value", "reciprocal"):
            return None
        node = self.program.representative(factor.node)
        plane = torch.zeros_like(lead[0]) if plane is None else plane
        counts = *self.shape, planes
        axes = fit(self.program, node, factor.index, lead, plane, self.sizes, counts, groups=True)
        if axes is None or any(
            (axis.role == "fixed" and axis.offset and is_symbolic(size))
            or (axis.is_part and (axis.role != HEAD or is_symbolic(size)))
            for axis, size in zip(axes, require_fake(node).shape, strict=True)
        ):
            return None  # a place counted from an end that moves, or tokens in blocks
        return Operand(node, axes, factor.part)

    def along(self, view: Operand, lead: Index, plane: Tensor | None = None) -> Index:
        """The elements of a value that a view reads for some places."""
        where: dict[str | int, Tensor] = {
            **dict(enumerate(lead)),
            "plane": torch.zeros_like(lead[0]) if plane is None else plane,
        }
        return tuple(
            torch.full_like(lead[0], axis.offset) if axis.role == "fixed" else axis.at(where[axis.role])
            for axis in view.axes
        )

    def aligned(self, view: Operand) -> Tensor:
        """The value of a view with axes batch, head, query, key."""
        value = self.replay.tensor(view.node)
        kept: list[int] = []
        for dimension in reversed(range(len(view.axes))):
            axis = view.axes[dimension]
            if axis.role == "fixed":
                value = value.select(dimension, axis.offset)
                continue
            kept.insert(0, int(axis.role))
            count = self.shape[int(axis.role)]
            value = value.index_select(dimension, axis.offset + axis.stride * torch.arange(count))
        value = value.permute([kept.index(role) for role in sorted(kept)])
        for role in range(4):
            if role not in kept:
                value = value.unsqueeze(role)
        return value.double()


def own_axes(value: Tensor, axes: Axes) -> Axes:
    """The axes of what is added to scores with these: the last of them, () where one entry is added to all."""
    shape = value.shape
    tail = axes[len(axes) - len(shape) :]
    return tuple(() if str(size) == "1" else axis for axis, size in zip(tail, shape, strict=True))


def hides_and_adds(value: Tensor) -> tuple[bool, bool]:
    """Whether what is added to scores hides keys, and whether it differs among those it does not hide."""
    live = value[value > DEAD]
    if live.numel() == 0 or bool((live == 0).all()):
        return True, False
    if bool((value <= DEAD).any()):
        return True, True
    return False, value.shape[-1] > 1 and bool((value != value[..., :1]).any())


def last_row(view: Operand, queries: int) -> Operand:
    """The view with its query axis fixed at the last query, which sees every key."""
    axes = tuple(
        Axis("fixed", axis.offset + axis.stride * (queries - 1)) if axis.role == QUERY else axis
        for axis in view.axes
    )
    return replace(view, axes=axes)


def as_key(view: Operand) -> Operand:
    """What a view along the queries is along the keys: the same value, read at the number of the key."""
    axes = tuple(replace(axis, role=KEY) if axis.role == QUERY else axis for axis in view.axes)
    return replace(view, axes=axes)
