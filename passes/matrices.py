"""Matrices with few entries, which move channels or turn them: those entries, among the zeros that are always there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, fx

from grape_compile.passes.contractions import Contraction
from grape_compile.passes.facts import Zeros, rely_on, rely_on_numbers
from grape_compile.passes.graph import Changing, Program, Taint, Unreadable, require_fake
from grape_compile.passes.movement import is_symbolic, table_of
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Index, Term, raise_if

SUM_LIMIT = 8
_SUMMANDS = 1 << 23
"""Places that are looked at to find the few of a long sum that are not zero."""

Read = Callable[[fx.Node, Index, Tensor], list[Term]]
"""From elements of a position-side value to what they are made of."""


def is_matrix(node: fx.Node) -> bool:
    """A value whose last two axes have one size, known beforehand."""
    shape = require_fake(node).shape
    return len(shape) > 1 and not any(map(is_symbolic, shape[-2:])) and shape[-1] == shape[-2] > 1


def signs(program: Program, replay: Replay, node: fx.Node) -> Tensor | None:
    """Numbers, known, that are signs or make a matrix with one sign in a row and a column at most."""
    value, leaves = require_fake(node), program.made_of(node)
    if program.taints[node] is not Taint.STRUCTURE or leaves is None or not value.is_floating_point():
        return None
    if leaves and not (value.dim() == 2 and is_matrix(node)):
        return None
    try:
        values = replay.tensor(node)
    except Unreadable:
        return None
    if not leaves and bool((values.abs() == 1).all()):
        return values
    if not replay.once("moves", [node], partial(_moves, values)):
        return None
    rely_on_numbers(program, node, replay)
    return values


def _moves(matrix: Tensor) -> bool:
    """Whether a matrix has one entry in a row and in a column at most, which is a sign."""
    entries = matrix != 0
    if matrix.dim() != 2 or not bool(entries.any()):
        return False
    one = int(max(entries.sum(0).max(), entries.sum(1).max())) == 1
    return one and bool((matrix[entries].abs() == 1).all())


def summands(
    program: Program, replay: Replay, read: Read, product: Contraction, index: Index
) -> Iterator[tuple[Tensor, Tensor]]:
    """Which elements have a first, second, ... summand, and where: of many those where no position-side value is zero.

    Raises Unreadable where there are many.
    """
    count = index[0].numel()
    if product.size <= SUM_LIMIT:
        for place in range(product.size):
            yield torch.arange(count), torch.full((count,), place)
        return
    told = "a product of tensors over many elements"
    raise_if(count * product.size > _SUMMANDS, told)
    first = _live(program, replay, read, product, tuple(axis[:1] for axis in index))
    raise_if(int(first.sum()) > SUM_LIMIT, told)
    live = _live(program, replay, read, product, index)
    counts, rank = live.sum(1), live.cumsum(1)
    raise_if(bool((counts > SUM_LIMIT).any()), told)
    for number in range(1, int(counts.max()) + 1):
        keep = (counts >= number).nonzero().flatten()
        yield keep, (rank[keep] >= number).to(torch.uint8).argmax(1)


def _live(program: Program, replay: Replay, read: Read, product: Contraction, index: Index) -> Tensor:
    """For every element and place summed over, whether the summand may be other than zero."""
    count, size = index[0].numel(), product.size
    wide, at = tuple(axis.repeat_interleave(size) for axis in index), torch.arange(size).repeat(count)
    live = torch.ones(count * size, dtype=torch.bool)
    for side, pick in ((product.left, product.left_at), (product.right, product.right_at)):
        if program.taints[side] <= Taint.POSITION:
            found = torch.zeros_like(live)
            for term in read(side, pick(wide, at), torch.arange(count * size)):
                found[term.rows] |= (term.coefficient != 0) & _may_hold(program, replay, term)
            live &= found
    return live.view(count, size)


def _may_hold(program: Program, replay: Replay, term: Term) -> Tensor:
    """False for elements of stored matrices at whose place all of these are zero."""
    leaf = term.factors[0] if len(term.factors) == 1 else None
    node = None if leaf is None or leaf.part != "value" else leaf.node
    while node is not None and (table := table_of(node, 2)) is not None:
        node = table
    if leaf is None or node is None or not _are_stored(program, node):
        return torch.ones_like(term.rows, dtype=torch.bool)
    if program.made_of(node) is None:
        raise Changing(
            "activations are multiplied by matrices of their positions, kept in a tensor that may change unseen (a "
            "buffer of an exported program that a state dict may replace): keep them with persistent=False, or make "
            "them in the forward pass"
        )
    values = replay.tensor(node)
    zeros = replay.once("zeros", [node], lambda: Zeros((values == 0).flatten(0, -3).all(0)))
    if not zeros.leave_few(SUM_LIMIT):
        return torch.ones_like(term.rows, dtype=torch.bool)
    rely_on(program, node, zeros, replay)
    first, second = leaf.index[-2:]
    return ~zeros.places[first, second]


def _are_stored(program: Program, node: fx.Node) -> bool:
    """Whether matrices lie in a tensor, several of them, or are made of known numbers."""
    shape = require_fake(node).shape
    if not is_matrix(node) or len(shape) < 3 or program.taints[node] is not Taint.STRUCTURE:
        return False
    several = any(not is_symbolic(size) and size > 1 for size in shape[:-2])
    return program.made_of(node) is not None or (node.op != "call_function" and several)
