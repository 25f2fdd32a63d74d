"""The two products of an attention layer, and what their axes stand for.

Of `scores = sum over channels of query * key` the key axis is the one the softmax runs along; the query axis is one
that only the other operand has; all others are batch and heads, heads being the last of them and those that share a
key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from grape_compile.passes.axes import Axes, Axis, Layout, Letters
from grape_compile.passes.contractions import letters_of
from grape_compile.passes.graph import Program, Taint, op_name, require_fake
from grape_compile.passes.movement import PERMUTES, RESHAPES, operand_of
from grape_compile.passes.score_terms import ScoreTerm

Named = tuple[fx.Node, Axes]
"""A value and its axes."""


@dataclass(frozen=True)
class Product:
    """Scores with these `axes`, as a product of two values; the softmax runs along the letter `along`."""

    query: Named
    key: Named
    axes: Axes
    node: fx.Node
    along: str = ""

    def seen_from(self, key: str, letters: Letters) -> Product:
        """The same product under a softmax along this letter, which its key has."""
        if key in _flat(letters, self.query[1]):
            return replace(self, query=self.key, key=self.query, along=key)
        return replace(self, along=key)


def product_of(node: fx.Node, left: fx.Node, right: fx.Node, letters: Letters) -> Product | None:
    """The scores of a product of two values, or of a fused attention."""
    name = op_name(node)
    if name == "aten::einsum":
        return _by_name(node, left, right, letters)
    first, second = require_fake(left).shape, require_fake(right).shape
    if len(first) < 2 or len(second) < 2:
        return None
    fused = name == "aten::scaled_dot_product_attention"
    tokens, keys = first[-2], second[-2 if fused else -1]
    query, key, channel = (letters.new(size) for size in (tokens, keys, first[-1]))
    shared: list[Axis] = []
    for place in range(3, max(len(first), len(second)) + 1):
        sizes = [shape[-place] for shape in (first, second) if place <= len(shape)]
        shared.insert(0, _shared(sizes, letters))
    sides = (
        (*_had(shared, first[:-2], letters), (query,), (channel,)),
        (*_had(shared, second[:-2], letters), *(((key,), (channel,)) if fused else ((channel,), (key,)))),
    )
    return Product((left, sides[0]), (right, sides[1]), (*shared, (query,), (key,)), node, key)


def _shared(sizes: Sequence[Any], letters: Letters) -> Axis:
    """The axis that operands of these sizes have in common; of heads in groups the number of groups comes first."""
    texts = {str(size) for size in sizes} - {"1"}
    if len(texts) == 2 and all(isinstance(size, int) for size in sizes) and max(sizes) % min(sizes) == 0:
        return letters.new(min(sizes)), letters.new(max(sizes) // min(sizes))
    return (letters.new(next((size for size in sizes if str(size) != "1"), 1)),)


def _had(shared: Sequence[Axis], shape: Sequence[Any], letters: Letters) -> Axes:
    """Which letters an operand of this shape has of the last of some axes."""
    found: list[Axis] = []
    for axis, size in zip(shared[len(shared) - len(shape) :], shape, strict=True):
        axis = letters.split(axis)
        sizes = [letters.sizes[letter] for letter in axis]
        whole = all(isinstance(each, int) for each in (size, *sizes))
        grouped = whole and len(axis) > 1 and size != 1 and size == sizes[0] != torch.Size(sizes).numel()
        alone = str(size) == "1" and [str(each) for each in sizes] != ["1"]
        found.append(() if alone else axis[:1] if grouped else axis)
    return tuple(found)


def _by_name(node: fx.Node, left: fx.Node, right: fx.Node, letters: Letters) -> Product | None:
    """`einsum("bhtd,bhjd->bhtj", query, key)`, in any order of axes."""
    named = _named(node, (left, right), letters, {})
    if named is None:
        return None
    (first, second), axes, summed = named
    return Product((left, first), (right, second), axes, node) if len(summed) == 1 else None


def _named(
    node: fx.Node, operands: Sequence[fx.Node], letters: Letters, known: dict[str, Axis]
) -> tuple[tuple[Axes, Axes], Axes, set[str]] | None:
    """The axes of two operands and of the result of an einsum, and the names that are summed over."""
    shapes = [require_fake(operand).shape for operand in operands]
    found = letters_of(str(node.args[0]), tuple(map(len, shapes)))
    if found is None or any(len(set(name)) != len(name) for name in found):
        return None
    *names, out = found
    sizes: dict[str, Any] = {}
    for name, shape in zip(names, shapes, strict=True):
        for letter, size in zip(name, shape, strict=True):
            sizes[letter] = size if str(sizes.get(letter, 1)) == "1" else sizes[letter]
    if not set(out) <= set(sizes):
        return None
    axes = {
        letter: known[letter] if letter in known else (letters.new(size),) for letter, size in sizes.items()
    }
    sides = [
        tuple(
            () if str(size) == "1" and str(sizes[letter]) != "1" else axes[letter]
            for letter, size in zip(name, shape, strict=True)
        )
        for name, shape in zip(names, shapes, strict=True)
    ]
    alone = set(names[0]) ^ set(names[1])
    if not alone <= set(out):
        return None
    return (sides[0], sides[1]), tuple(axes[letter] for letter in out), set(sizes) - set(out)


def mixed(
    axes: Axes,
    value: fx.Node,
    letters: Letters,
    product: fx.Node | None = None,
    weights: fx.Node | None = None,
    key: str = "",
) -> tuple[Axes, Axes] | None:
    """The axes of the values and of their mean by weights with these axes; where it is no `product`, keys come last."""
    axes = tuple(letters.split(axis) for axis in axes)
    shape = require_fake(value).shape
    if product is not None and op_name(product) == "aten::einsum":
        return _mixed_by_name(axes, value, letters, product, weights, key)
    if len(shape) < 2 or len(shape) > len(axes):
        return None
    behind = product is not None and product.args[1] is weights
    width = letters.new(shape[-2 if behind else -1])
    front = _had(axes[:-2], shape[:-2], letters)
    tokens, keys = (axes[-1], axes[-2]) if behind else (axes[-2], axes[-1])
    if len(keys) != 1 or (key and keys[0] != key):
        return None
    letters.sizes[keys[0]] = shape[-1 if behind else -2]
    if behind:
        return (*front, (width,), keys), (*axes[:-2], (width,), tokens)
    return (*front, keys, (width,)), (*axes[:-2], tokens, (width,))


def _mixed_by_name(
    axes: Axes, value: fx.Node, letters: Letters, product: fx.Node, weights: fx.Node | None, key: str
) -> tuple[Axes, Axes] | None:
    """`einsum("bhtj,bhjd->bhtd", weights, value)`, in any order of axes."""
    operands = product.args[1]
    assert isinstance(operands, list | tuple)
    first, second = (each for each in operands if isinstance(each, fx.Node))
    found = letters_of(str(product.args[0]), (require_fake(first).dim(), require_fake(second).dim()))
    if found is None:
        return None
    which = 0 if first is weights else 1
    known = dict(zip(found[which], axes, strict=True))
    named = _named(product, (first, second), letters, known)
    if named is None:
        return None
    sides, out, summed = named
    if [known.get(letter) for letter in summed] != [(key,)] or sum(
        letter not in known for letter in found[2]
    ) != 1:
        return None
    letters.sizes[key] = require_fake(value).shape[found[1 - which].index(next(iter(summed)))]
    return sides[1 - which], out


def layout_of(
    program: Program,
    letters: Letters,
    product: Product,
    axes: tuple[Axes, Axes, Axes],
    terms: Sequence[ScoreTerm],
) -> tuple[Layout, Callable[[Axes], Axes], Named, Named] | None:
    """The letters of each role under names of their own, what renames axes, and query and key, freed of exchanges."""
    query, key = product.query, product.key
    outside = _outside(letters, product)
    if outside is not None and len(outside) == 1 and op_name(query[0]) in RESHAPES:
        inner = operand_of(query[0], 0)
        letters.viewed(query[1], require_fake(inner).shape)  # [B, H, T, D] folded to [B * H, T, D]
        outside = _outside(letters, product)
    tokens = _tokens(letters, product)
    if outside is None or tokens is None:
        return None
    known = {*outside, *tokens, product.along}
    channels = [letter for letter in _flat(letters, query[1]) if letter not in known]
    width = [letter for letter in _flat(letters, axes[1]) if letter not in known]
    if len(channels) != 1 or len(width) != 1:
        return None
    start = _first_head(program, letters, outside, key[1], terms)
    batch, heads = tuple(outside[:start]), tuple(outside[start:])
    roles = (batch, heads, tokens, (product.along,), tuple(channels), tuple(width))
    names = {
        letter: f"{'bhtjdw'[role]}{place}"
        for role, axis in enumerate(roles)
        for place, letter in enumerate(axis)
    }
    layout = Layout(
        tuple(tuple(names[letter] for letter in axis) for axis in roles),
        {names[letter]: letters.sizes[letter] for letter in names},
    )

    def renamed(axes: Axes) -> Axes:
        return tuple(tuple(names[letter] for letter in letters.split(axis)) for axis in axes)

    straight = [
        _straight(letters, node, own, [*outside, *last, *channels])
        for (node, own), last in ((query, tokens), (key, (product.along,)))
    ]
    (query_node, query_axes), (key_node, key_axes) = straight
    return layout, renamed, (query_node, renamed(query_axes)), (key_node, renamed(key_axes))


def _flat(letters: Letters, axes: Axes) -> list[str]:
    return [letter for axis in axes for letter in letters.split(axis)]


def _own(letters: Letters, axes: Axes, other: Axes) -> Axis:
    """The letters one operand has and the other does not."""
    return tuple(letter for letter in _flat(letters, axes) if letter not in _flat(letters, other))


def _tokens(letters: Letters, product: Product) -> Axis | None:
    """The axis of queries: of those the keys do not have the one of as many entries as there are keys, or the last."""
    own = _own(letters, product.query[1], product.key[1])
    if len(own) < 2:
        return own or None
    same = [letter for letter in own if str(letters.sizes[letter]) == str(letters.sizes[product.along])]
    return (same[0] if len(same) == 1 else own[-1],)


def _outside(letters: Letters, product: Product) -> list[str] | None:
    """The letters of batch and heads: all of the scores but queries and keys."""
    tokens = _tokens(letters, product)
    if tokens is None or product.along not in _own(letters, product.key[1], product.query[1]):
        return None
    own = _flat(letters, product.query[1])
    rest = [letter for letter in _flat(letters, product.axes) if letter not in (*tokens, product.along)]
    return sorted(rest, key=lambda letter: own.index(letter) if letter in own else -1)


def _first_head(
    program: Program, letters: Letters, outside: Sequence[str], key: Axes, terms: Sequence[ScoreTerm]
) -> int:
    """Which of these letters is the first of a head; the ones before are the batch."""
    if len(outside) < 3:
        return len(outside) - 1
    had = _flat(letters, key)
    heads = [max(place - 1, 1) for place, letter in enumerate(outside) if letter not in had]
    for term in terms:
        shape = require_fake(term.node).shape
        if term.dead is not None or program.taints[term.node] is Taint.DATA or not len(shape):
            continue
        for axis, size in zip(term.axes[-len(shape) :], shape[-len(term.axes) :], strict=True):
            heads += [
                place
                for place, letter in enumerate(outside)
                if place and str(size) != "1" and letter in letters.split(axis)
            ]
    return min(heads, default=len(outside) - 1)


def _straight(letters: Letters, node: fx.Node, axes: Axes, order: Sequence[str]) -> Named:
    """A value before its axes were exchanged, where they were in the operator's order."""
    start = node, axes
    while op_name(node) in PERMUTES:
        had = _flat(letters, axes)
        if had == [letter for letter in order if letter in had]:
            return node, axes
        before = letters.before(node, axes)
        if before is None:
            return start
        node, axes = operand_of(node, 0), before
    had = _flat(letters, axes)
    return (node, axes) if had == [letter for letter in order if letter in had] else start
