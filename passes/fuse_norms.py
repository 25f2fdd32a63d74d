"""Join RMSNorm of queries and keys with the rotation behind it, where a kernel takes both in one pass.

What: every `grape::rotate` whose tensors are all normalised alike becomes `grape::rotate_normed`: each head by itself
    (Qwen3, Gemma 3), or all heads of a token together (OLMo 2).
Leaves alone: devices without such a kernel, norms that something else reads, graphs that write into their values.
Ensures: the same numbers but for roundings that are left out: the operator rounds once.
Cost: one pass; each norm is read node by node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from grape_compile.encoding import Multiplicative, parse
from grape_compile.errors import GrapeError
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.turn_call import Norm, TurnCall
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, Sizes, Unreadable, op_name, require_fake
from grape_compile.passes.operands import Emitter
from grape_compile.passes.rewrite_rotations import remove_unused

aten = torch.ops.aten

_CASTS = {"aten::to", "aten::_to_copy", "aten::type_as"}
_MOVES = {"aten::transpose", "aten::permute", "aten::view", "aten::reshape", "aten::unflatten"}


@dataclass(frozen=True)
class _Read:
    """A norm as it was found: of `source` by `weight`; `moves` lead from its result to the tensor that turns."""

    source: fx.Node
    weight: fx.Node
    epsilon: float
    offset: float
    moves: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Norms and rotations become one operator."""

    def run(self, program: Program) -> Outcome:
        if program.mutations:
            return Outcome()
        emitter = Emitter(program, Sizes())
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.grape.rotate.default):
            with suppress(Unreadable):
                _fuse(emitter, node)
        return Outcome()


def _fuse(emitter: Emitter, node: fx.Node) -> None:
    tensors, slots, text = node.args
    assert isinstance(tensors, list | tuple)
    assert isinstance(slots, list | tuple)
    reads = [_read(tensor) for tensor in tensors if isinstance(tensor, fx.Node)]
    found = [read for read in reads if read is not None]
    if len(found) < len(tensors) or len({(read.epsilon, read.offset) for read in found}) > 1:
        return
    place = _place(found, [require_fake(tensor) for tensor in tensors if isinstance(tensor, fx.Node)])
    if place is None:
        return
    sources = [_moved(emitter, read) for read in found]
    weights = [read.weight for read in found]
    arguments = (sources, weights, slots, text, place, found[0].epsilon, found[0].offset)
    if _takes(arguments):
        fused = emitter.call(node, torch.ops.grape.rotate_normed.default, arguments)
        node.replace_all_uses_with(fused)
    remove_unused(emitter.program.graph, [node, *sources])


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


def _place(found: Sequence[_Read], tensors: Sequence[torch.Tensor]) -> str | None:
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


def _splits_heads(read: _Read, tensor: torch.Tensor) -> bool:
    """Whether [B, T, H * D] becomes [B, T, H, D] and then [B, H, T, D]: head by head, in the order of the weights."""
    if [op_name(move) for move in read.moves][1:] != ["aten::transpose"] or tensor.dim() != 4:
        return False
    split, exchanged = read.moves
    batch, heads, tokens, size = tensor.shape
    axes = {int(axis) % 4 for axis in exchanged.args[1:3]}  # type: ignore[arg-type] # axes are numbers
    return tuple(require_fake(split).shape) == (batch, tokens, heads, size) and axes == {1, 2}


def _moved(emitter: Emitter, read: _Read) -> fx.Node:
    """Return the source of a norm where its result was moved to."""
    node = read.source
    for move in read.moves:
        node = emitter.call(node, move.target, (node, *move.args[1:]), dict(move.kwargs))
    return node


def _read(node: fx.Node) -> _Read | None:
    """Read x * rsqrt(mean(x^2) + epsilon) * (weight + offset) back from its result, or give up."""
    moves: list[fx.Node] = []
    while op_name(node) in _MOVES | _CASTS:
        if len(node.users) != 1 or not _keeps_last(node):
            return None
        if op_name(node) in _MOVES:
            moves.insert(0, node)
        node = _first(node)
    if len(node.users) != 1:
        return None
    for read in _candidates(node):
        return replace(read, moves=tuple(moves))
    return None


def _keeps_last(node: fx.Node) -> bool:
    """Whether a move leaves the last axis the last; a view is looked at where its shapes are known."""
    rank = require_fake(node).dim()
    if op_name(node) == "aten::transpose":
        return rank - 1 not in {int(axis) % rank for axis in node.args[1:3]}  # type: ignore[arg-type] # numbers
    if op_name(node) == "aten::permute":
        order = node.args[1]
        return isinstance(order, list | tuple) and int(order[-1]) % rank == rank - 1  # type: ignore[arg-type] # numbers
    return require_fake(node).is_floating_point()


def _candidates(node: fx.Node) -> Iterator[_Read]:
    if op_name(node) == "aten::rms_norm":
        source, shape, weight, epsilon = (*node.args, None, None)[:4]
        known = isinstance(source, fx.Node) and isinstance(weight, fx.Node) and isinstance(epsilon, float)
        if known and isinstance(shape, list | tuple) and len(shape) == 1:
            yield _Read(source, weight, epsilon, 0.0)  # type: ignore[arg-type] # checked above
        return
    for normed, scaled in _factors(node):
        weight, offset = _weight(scaled)
        found = _normalised(_uncast(normed))
        if weight is not None and found is not None:
            yield _Read(found[0], weight, found[1], offset)


def _weight(node: fx.Node) -> tuple[fx.Node | None, float]:
    """Return the vector behind weight + offset and the offset, or None where it is none."""
    node, offset = _uncast(node), 0.0
    if op_name(node) == "aten::add" and not node.kwargs:
        numbers = [each for each in node.args if isinstance(each, int | float)]
        vectors = [each for each in node.args if isinstance(each, fx.Node)]
        if len(numbers) != 1 or len(vectors) != 1:
            return None, 0.0
        node, offset = _uncast(vectors[0]), float(numbers[0])
    return (node if node.op in ("placeholder", "get_attr") else None), offset


def _normalised(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Return x and epsilon of x * rsqrt(mean(x^2, -1) + epsilon)."""
    for wide, factor in _factors(node):
        if op_name(factor) != "aten::rsqrt":
            continue
        total = _first(factor)
        if op_name(total) != "aten::add" or total.kwargs or not isinstance(total.args[1], float):
            continue
        mean = _first(total)
        if op_name(mean) != "aten::mean" or mean.kwargs or not _is_last_mean(mean):
            continue
        if _is_square(_first(mean), wide):
            return _uncast(wide), total.args[1]
    return None


def _is_last_mean(mean: fx.Node) -> bool:
    rank = require_fake(_first(mean)).dim()
    return len(mean.args) >= 3 and mean.args[1] in ([-1], [rank - 1], (-1,)) and mean.args[2] is True


def _is_square(node: fx.Node, of: fx.Node) -> bool:
    if op_name(node) == "aten::pow":
        return node.args == (of, 2)
    if op_name(node) == "aten::mul":
        return node.args == (of, of)
    return op_name(node) == "aten::square" and node.args == (of,)


def _factors(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    if op_name(node) != "aten::mul":
        return
    one, two = node.args
    if isinstance(one, fx.Node) and isinstance(two, fx.Node):
        yield one, two
        yield two, one


def _uncast(node: fx.Node) -> fx.Node:
    """Skip casts between floating dtypes."""
    while op_name(node) in _CASTS and require_fake(_first(node)).is_floating_point():
        if not require_fake(node).is_floating_point():
            return node
        node = _first(node)
    return node


def _first(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand
