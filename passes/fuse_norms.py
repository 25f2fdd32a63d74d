"""Join RMSNorm of queries and keys with the rotation beside it, where a kernel takes both in one pass.

What: every `grape::rotate` whose tensors are all normalised alike becomes `grape::rotate_normed`: each head by itself
    before (Qwen3, Gemma 3) or after it turns (HunYuan), or all heads of a token together (OLMo 2).
Leaves alone: devices without such a kernel, norms that something else reads, what is written to between the norm and
    the rotation, and what differs from the operator when both are replayed in fp64.
Ensures: the same numbers but for roundings that are left out: the operator rounds once.
Cost: one pass; each norm is read node by node, and each distinct one is replayed once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grape_compile.encoding import Multiplicative, parse
from grape_compile.errors import GrapeError
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.turn_call import Norm, TurnCall
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, Unreadable, op_name, require_fake
from grape_compile.passes.norms import NormRead, norm_after, norm_before
from grape_compile.passes.operands import Emitter
from grape_compile.passes.replay import Replay
from grape_compile.passes.rewrite_rotations import mutation_between, remove_unused
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.verify import difference


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Norms and rotations become one operator."""

    def run(self, program: Program) -> Outcome:
        program.representatives  # noqa: B018 - what is known of the nodes is found before others join them
        fusing = _Fusing(program, Emitter(program, Sizes()))
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.grape.rotate.default):
            for found in (_before(node), _after(node)):
                with suppress(Unreadable):
                    if found is not None and _keeps(program, node, found) and fusing.join(node, found):
                        break
        return Outcome()


@dataclass(frozen=True)
class _Found:
    """The norms of all tensors of a rotation: where they stand, how each was read, and what they are computed from.

    `sources` and the results of `reads` are what the operator is given and what it stands for.
    """

    place: str
    reads: tuple[NormRead, ...]
    sources: tuple[fx.Node, ...]


def _before(node: fx.Node) -> _Found | None:
    tensors = _tensors(node)
    reads = _alike([norm_before(tensor) for tensor in tensors])
    place = _place(reads, [require_fake(tensor) for tensor in tensors]) if reads else None
    return None if place is None else _Found(place, reads, tuple(read.source for read in reads))


def _after(node: fx.Node) -> _Found | None:
    turned = _results(node)
    if not turned or any(result is None for result in turned):
        return None
    reads = _alike([norm_after(result) for result in turned if result is not None])
    size = require_fake(_tensors(node)[0]).shape[-1]
    if not reads or any(tuple(require_fake(read.weight).shape) != (size,) for read in reads):
        return None
    return _Found("after", reads, _tensors(node))


def _keeps(program: Program, node: fx.Node, found: _Found) -> bool:
    """Whether all that norms and rotation read is the same from their first operator to their last."""
    if not program.mutations:
        return True
    ends = {*found.sources, *(read.weight for read in found.reads), *_nodes(node.args[1])}
    last = max((node, *(read.result for read in found.reads)), key=program.order.__getitem__)
    region, stack = {node}, [node, *(read.result for read in found.reads)]
    while stack:
        each = stack.pop()
        region.add(each)
        stack += [
            operand for operand in each.all_input_nodes if operand not in ends and operand not in region
        ]
    return not region & program.stale and mutation_between(program, region, last) is None


def _alike(reads: Sequence[NormRead | None]) -> tuple[NormRead, ...]:
    """Return the norms of one operator, or none where a tensor has none or another."""
    found = tuple(read for read in reads if read is not None)
    alike = len(found) == len(reads) and len({(read.epsilon, read.offset) for read in found}) == 1
    return found if alike else ()


@dataclass
class _Fusing:
    """Joins what was found, each distinct function of its inputs verified once."""

    program: Program
    emitter: Emitter
    verified: set[object] = field(default_factory=set)

    def join(self, node: fx.Node, found: _Found) -> bool:
        """Put the operator in the place of norms and rotation, if a kernel takes it and it gives the same."""
        emitter, first, after = self.emitter, found.reads[0], found.place == "after"
        sources = [
            source if after else self._moved(source, read)
            for source, read in zip(found.sources, found.reads, strict=True)
        ]
        weights = [read.weight for read in found.reads]
        arguments = (sources, weights, node.args[1], node.args[2], found.place, first.epsilon, first.offset)
        if not _takes(arguments):
            remove_unused(emitter.program.graph, sources)
            return False
        fused = emitter.call(node, torch.ops.grape.rotate_normed.default, arguments)
        results = [read.result for read in found.reads] if after else _results(node)
        old, new = [], []
        for position, (read, result) in enumerate(zip(found.reads, results, strict=True)):
            if result is not None:
                value = emitter.call(fused, operator.getitem, (fused, position))
                old.append(result)
                new.append(self._moved(value, read) if after else value)
        try:
            self._verify(found, node, old, new)
        except Unreadable:
            emitter.cache.clear()
            remove_unused(emitter.program.graph, [*new, fused, *sources])
            return False
        for one, other in zip(old, new, strict=True):
            one.replace_all_uses_with(other)
        remove_unused(emitter.program.graph, [*old, node, *sources])
        return True

    def _moved(self, node: fx.Node, read: NormRead) -> fx.Node:
        """Return a value where the result or the source of a norm was moved to."""
        for move in read.moves:
            node = self.emitter.call(node, move.target, (node, *move.args[1:]), dict(move.kwargs))
        return node

    def _verify(self, found: _Found, node: fx.Node, old: Sequence[fx.Node], new: Sequence[fx.Node]) -> None:
        """Compare both in fp64 on random tensors, weights and slots; Unreadable where they differ."""
        inputs = [*found.sources, *(read.weight for read in found.reads), *_nodes(node.args[1])]
        inputs = list(dict.fromkeys(inputs))
        key = (self.program.signature(old, inputs), str(node.args[2]), found.place)
        if key in self.verified:
            return
        sizes, generator = self.emitter.sizes, torch.Generator().manual_seed(0)
        bound = {each: _random(each, sizes, generator) for each in inputs}
        replay = Replay(self.program, sizes, bound)
        for one, other in zip(old, new, strict=True):
            difference(replay.tensor(one), replay.tensor(other))
        self.verified.add(key)


def _random(node: fx.Node, sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    shape, like = sizes.shape(node), require_fake(node)
    if like.is_floating_point():
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    return torch.randint(0, 64, shape, generator=generator).to(like.dtype)


def _tensors(node: fx.Node) -> tuple[fx.Node, ...]:
    return _nodes(node.args[0])


def _nodes(group: Any) -> tuple[fx.Node, ...]:
    assert isinstance(group, list | tuple)
    return tuple(each for each in group if isinstance(each, fx.Node))


def _results(node: fx.Node) -> list[fx.Node | None]:
    """Return what reads each turned tensor, None where nothing does."""
    found: list[fx.Node | None] = [None] * len(_tensors(node))
    for user in node.users:
        if op_name(user) == "getitem":
            found[int(user.args[1])] = user  # type: ignore[arg-type] # the position in a list
    return found


def _takes(arguments: tuple[Any, ...]) -> bool:
    """Whether a kernel of their device takes these operands; without one the compiler joins what it can."""
    sources, weights, slots, text, place, epsilon, offset = arguments
    tensors, tables = ([require_fake(each) for each in group] for group in (sources, slots))
    encoding = parse(text)
    assert isinstance(encoding, Multiplicative)
    norm = Norm(tuple(require_fake(weight) for weight in weights), epsilon, place, offset)
    call = TurnCall(tuple(tensors), encoding, dict(zip(encoding.slots, tables, strict=True)), norm)
    try:
        return call.device.type in choose_turn(call).devices
    except GrapeError:
        return False


def _place(found: Sequence[NormRead], tensors: Sequence[torch.Tensor]) -> str | None:
    """Return what the means are taken over, or None where it is neither a head nor all heads of a token."""
    places = set()
    for read, tensor in zip(found, tensors, strict=True):
        source, weight = require_fake(read.source), require_fake(read.weight)
        if source.dtype != tensor.dtype or weight.dim() != 1:
            return None
        size, all_heads = tensor.shape[-1], tensor.shape[-1] * (tensor.shape[-3] if tensor.dim() > 2 else 1)
        names = [op_name(move) for move in read.moves]
        if weight.shape[0] == size == source.shape[-1] and not set(names) - {
            "aten::transpose",
            "aten::permute",
        }:
            places.add("before")
        elif weight.shape[0] == all_heads == source.shape[-1] and _splits_heads(read, tensor):
            places.add("across")
        else:
            return None
    return places.pop() if len(places) == 1 else None


def _splits_heads(read: NormRead, tensor: torch.Tensor) -> bool:
    """Whether [B, T, H * D] becomes [B, T, H, D] and then [B, H, T, D]: head by head, in the order of the weights."""
    if [op_name(move) for move in read.moves][1:] != ["aten::transpose"] or tensor.dim() != 4:
        return False
    split, exchanged = read.moves
    batch, heads, tokens, size = tensor.shape
    axes = {int(axis) % 4 for axis in exchanged.args[1:3]}  # type: ignore[arg-type] # axes are numbers
    return tuple(require_fake(split).shape) == (batch, tokens, heads, size) and axes == {1, 2}
