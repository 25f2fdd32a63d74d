"""What was read off the numbers of a tensor the model keeps, and whether a call finds them so.

A buffer holds what it holds until somebody writes to it, replaces it or loads another. What a graph was rewritten by is
therefore kept as *facts*: predicates of one tensor. A tensor that is the one looked at, at the same version, is known
without looking; of any other the facts are asked anew, once, so that a slope that was changed, a table that grew, a
copy in another layer are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from grape_compile.passes.graph import Fact, Program
from grape_compile.passes.memory import owner, writes, written
from grape_compile.passes.replay import Replay, has_value

Way = tuple[int, ...]
"""Where a kept tensor is found in a call: the place of an input, and from there parts of what it is made of."""

_LARGEST_COPY = 1 << 24
"""Bytes of a tensor that is worth a copy, to know its numbers again in another."""


def keep(program: Program, nodes: Iterable[fx.Node]) -> None:
    """Let facts be read off the numbers of those inputs, except what the graph itself writes into."""
    roots = {owner(node) for write in filter(writes, program.graph.nodes) for node in written(write)}
    overwritten = {_memory(program.values.get(root)) for root in roots}
    program.kept = frozenset(
        node
        for node in nodes
        if node not in roots and has_value(program, node) and _memory(program.values[node]) not in overwritten
    )


def numbers_of(program: Program, node: fx.Node, replay: Replay) -> list[tuple[fx.Node, Same]]:
    """The facts that a value made of constants and kept inputs is what it is."""
    leaves = program.made_of(node) or ()
    return [(leaf, replay.once("same", [leaf], partial(Same.as_in, program.values[leaf]))) for leaf in leaves]


def rely_on_numbers(program: Program, node: fx.Node, replay: Replay) -> None:
    """What is read off a value made of constants and kept inputs holds as long as these are what they are."""
    for leaf, same in numbers_of(program, node, replay):
        program.rely(leaf, [same])


def rely_on(program: Program, node: fx.Node, fact: Fact, replay: Replay) -> None:
    """What is read off a value holds as long as the fact does, where the value is kept, or else as its numbers do."""
    if node in program.kept:
        program.rely(node, [fact])
    else:
        rely_on_numbers(program, node, replay)


def _memory(value: Any) -> int | None:
    """The memory of a tensor, whoever else sees it."""
    return value.untyped_storage().data_ptr() if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    """A tensor that wraps no others and has memory of its own."""
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided


def is_watched(value: Any) -> bool:
    """Whether a tensor is not trained, and writes into it can be told afterwards."""
    return _state(value) is not None and not value.requires_grad


def _state(value: Any) -> tuple[int, int] | None:
    """What changes when a tensor is written into or given other memory; those of inference do not tell."""
    return (value._version, value.data_ptr()) if _is_plain(value) and not value.is_inference() else None


@dataclass(frozen=True, eq=False)
class Same:
    """The fact that a tensor holds the numbers of this one."""

    first: Callable[[], Tensor | None]
    state: tuple[int, int] | None
    copy: Tensor | None

    @classmethod
    def as_in(cls, tensor: Tensor) -> Same:
        """Small tensors are remembered; a large one is compared with for as long as it is what it was."""
        small = tensor.numel() * tensor.element_size() <= _LARGEST_COPY
        return cls(ref(tensor), _state(tensor), tensor.detach().clone() if small else None)

    def __call__(self, tensor: Tensor) -> bool:
        known, first = self.copy, self.first()
        if known is None and first is not None and _state(first) == self.state:
            known = first
        return known is not None and known.device == tensor.device and torch.equal(known, tensor)


@dataclass(frozen=True, eq=False)
class Zeros:
    """The fact that the matrices a tensor ends in are zero at these `places`."""

    places: Tensor

    def leave_few(self, most: int) -> bool:
        """Whether no row and no column has more entries than that."""
        entries = ~self.places
        return int(max(*entries.sum(0), *entries.sum(1))) <= most

    def __call__(self, tensor: Tensor) -> bool:
        same = tensor.shape[-2:] == self.places.shape
        return same and not bool((tensor[..., self.places.to(tensor.device)] != 0).any())


@dataclass(frozen=True)
class Skew:
    """The fact that matrices on two `axes` of a tensor are the opposites of their transposes."""

    axes: tuple[int, int]

    def __call__(self, tensor: Tensor) -> bool:
        return torch.equal(tensor, -tensor.transpose(*self.axes))


@dataclass(frozen=True, eq=False)
class _Input:
    """One input of a graph: the facts about it, and what they say of the tensors seen so far."""

    facts: Sequence[Fact]
    seen: Any

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is known to be as the facts say, or found to be."""
        state = _state(tensor)
        if state is None:
            return False
        known = self.seen.get(tensor)
        if known is None or known[0] != state:
            known = self.seen[tensor] = state, all(fact(tensor.detach()) for fact in self.facts)
        held: bool = known[1]
        return held


def still_hold(
    facts: Mapping[Way, Sequence[Fact]], examples: Sequence[Any], find: Callable[[Way, Sequence[Any]], Any]
) -> Callable[[Sequence[Any]], bool]:
    """Whether the facts about what is found on some ways hold in a call; they do of the examples as they are now."""
    inputs: list[tuple[Way, _Input]] = []
    for way, known in facts.items():
        seen, example = WeakTensorKeyDictionary(), find(way, examples)
        if example is not None:
            seen[example] = _state(example), True
        inputs.append((way, _Input(known, seen)))
    return lambda args: all(each.holds(find(way, args)) for way, each in inputs)
