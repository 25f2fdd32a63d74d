"""Name the axes of the tensors around an attention layer, in whatever order, folded or split, a model has them.

An axis is a product of *letters*, the first of which moves slowest: that of scores [B * H, Tq, Tk] is ("b", "h"). An
axis of one entry that is shared among all others is (). With letters a value is put into the order batch, head, query
(or key), channel of the operator, and back, by views alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grape_compile.passes.graph import Unreadable, op_name, require_fake
from grape_compile.passes.movement import PERMUTES, RESHAPES, operand_of, permutation
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import Index, ravel, unravel

aten = torch.ops.aten

Axis = tuple[str, ...]
Axes = tuple[Axis, ...]
Do = Callable[..., Any]
"""Do an operator of `aten` to a value: to a tensor, or in a graph."""


@dataclass
class Letters:
    """The letters of a layer while it is read: their sizes, and into which of them a view has split one."""

    sizes: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Axis] = field(default_factory=dict)

    def new(self, size: Any) -> str:
        """A letter of this size."""
        name = f"x{len(self.sizes)}"
        self.sizes[name] = size
        return name

    def copy(self) -> Letters:
        return Letters(dict(self.sizes), dict(self.splits))

    def split(self, axis: Axis) -> Axis:
        """An axis by the letters that are left."""
        parts = (self.split(self.splits[letter]) if letter in self.splits else (letter,) for letter in axis)
        return tuple(letter for part in parts for letter in part)

    def moved(self, node: fx.Node, axes: Axes) -> Axes | None:
        """The axes of what a movement makes of a value with these axes; None for anything else."""
        operand, name = operand_of(node, 0), op_name(node)
        before, after = require_fake(operand).shape, require_fake(node).shape
        if name in PERMUTES:
            return tuple(axes[dim] for dim in permutation(node, name, len(axes)))
        if name in RESHAPES:
            return self.viewed(axes, after)
        return axes if list(map(str, before)) == list(map(str, after)) else None

    def before(self, node: fx.Node, axes: Axes) -> Axes | None:
        """The axes of the operand of an exchange of axes."""
        name = op_name(node)
        if name not in PERMUTES:
            return None
        order = permutation(node, name, len(axes))
        return tuple(axes[order.index(dim)] for dim in range(len(axes)))

    def viewed(self, axes: Axes, shape: Sequence[Any]) -> Axes | None:
        """The axes of a view of this shape; a letter that is seen as several axes is split."""
        left = [letter for axis in axes for letter in self.split(axis)]
        found: list[Axis] = []
        for whole in shape:
            taken: list[str] = []
            size = _expression(whole)
            if size == 1 and left and _expression(self.sizes[left[0]]) == 1:
                taken.append(left.pop(0))
            while size != 1:
                if not left:
                    return None
                letter = left.pop(0)
                inside = _quotient(size, self.sizes[letter])
                if inside is None:
                    rest = _quotient(self.sizes[letter], size)
                    if rest is None:
                        return None
                    parts = self.new(_sized(size, shape)), self.new(_sized(rest, shape))
                    self.splits[letter] = parts
                    letter, left, inside = parts[0], [parts[1], *left], 1
                taken.append(letter)
                size = inside
            found.append(tuple(taken))
        if any(_expression(self.sizes[letter]) != 1 for letter in left):
            return None
        return (*found[:-1], (*found[-1], *left)) if found else None


def _expression(size: Any) -> Any:
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return expression if not getattr(expression, "is_number", False) else int(expression)


def _quotient(whole: Any, part: Any) -> Any:
    """How many times one size holds the other; None where it is no whole number at every size."""
    whole, part = _expression(whole), _expression(part)
    if isinstance(whole, int) and isinstance(part, int):
        return None if whole % part else whole // part
    quotient = whole / part
    return _expression(quotient) if quotient.is_integer else None


def _sized(size: Any, shape: Sequence[Any]) -> Any:
    """A size as the graph has it."""
    if isinstance(size, int):
        return size
    return next((each for each in shape if _expression(each) == size), size)


BATCH, HEAD, QUERY, KEY, CHANNEL, WIDTH = range(6)
"""What the letters of a layer stand for; a channel is one of queries and keys, a width of values."""


@dataclass(frozen=True)
class Layout:
    """The letters of each role, in the order of `BATCH` to `WIDTH`, and their sizes."""

    roles: Axes
    sizes: Mapping[str, Any]

    def size(self, role: int) -> Any:
        """The size of all letters of a role together."""
        total: Any = 1
        for letter in self.roles[role]:
            total = total * self.sizes[letter]
        return total

    def index(self, axes: Axes, lead: Index) -> Index:
        """The elements of a value with these axes that places (batch, head, query, key) see; one axis at a time."""
        at: dict[str, torch.Tensor] = {}
        sizes = Sizes()
        for letters, where in zip(self.roles, lead, strict=False):
            counts = [sizes(self.sizes[letter]) for letter in letters]
            at |= dict(zip(letters, unravel(where, counts), strict=True))
        zero = torch.zeros_like(lead[0])
        return tuple(
            ravel(tuple(at[letter] for letter in axis), [sizes(self.sizes[letter]) for letter in axis])
            if axis
            else zero
            for axis in axes
        )

    def ordered(
        self, do: Do, value: Any, axes: Axes, roles: Sequence[int], needed: Sequence[int] = ()
    ) -> Any:
        """The value with one axis for each role, of one entry where it has none of its letters and is not `needed` to.

        Of heads a value that is needed has those it tells apart: keys may be shared among the last of them. A value
        that is not has no roles in front of its first.
        """
        had = [letter for axis in axes for letter in axis]
        wanted = [self._wanted(role, had, needed) for role in roles]
        tail = wanted if needed else wanted[max(len(wanted) - len(axes), 0) :]
        if len(axes) == len(tail) and all(one == other for one, other in zip(axes, tail, strict=True)):
            return value
        for place in reversed(range(len(axes))):
            if not axes[place]:
                value = do(aten.squeeze.dim, value, place)
            elif len(axes[place]) > 1:
                value = do(aten.unflatten.int, value, place, self._counts(axes[place]))
        order = [had.index(letter) for axis in wanted for letter in axis if letter in had]
        if order != list(range(len(had))):
            value = do(aten.permute.default, value, order)
        first = 0 if needed else next((at for at, axis in enumerate(wanted) if axis), len(wanted))
        for place, axis in enumerate(wanted[first:]):
            value = self._joined(do, value, axis, place, had)
        return value

    def _wanted(self, role: int, had: Sequence[str], needed: Sequence[int]) -> Axis:
        """The letters of a role that a value is to have."""
        letters = self.roles[role]
        if role in needed:
            return letters
        while letters and letters[-1] not in had:
            letters = letters[:-1]
        return letters if needed or not letters else self.roles[role]

    def _joined(self, do: Do, value: Any, axis: Axis, place: int, had: Sequence[str]) -> Any:
        """Letters from `place` on as one axis; those the value does not have are repeated."""
        if not axis:
            return do(aten.unsqueeze.default, value, place)
        for at, letter in enumerate(axis):
            if letter in had:
                continue
            if not isinstance(self.sizes[letter], int):
                raise Unreadable("heads of an open number that share what is added to them")
            value = do(aten.unsqueeze.default, value, place + at)
            sizes = [-1] * _rank(value)
            sizes[place + at] = self.sizes[letter]
            value = do(aten.expand.default, value, sizes)
        return value if len(axis) == 1 else do(aten.flatten.using_ints, value, place, place + len(axis) - 1)

    def restored(self, do: Do, value: Any, axes: Axes, roles: Sequence[int]) -> Any:
        """A value with one axis for each role as one with these axes: what `ordered` undoes."""
        had = [self.roles[role] for role in roles]
        if len(axes) == len(had) and all(one == other for one, other in zip(axes, had, strict=True)):
            return value
        for place in reversed(range(len(had))):
            if not had[place]:
                value = do(aten.squeeze.dim, value, place)
            elif len(had[place]) > 1:
                value = do(aten.unflatten.int, value, place, self._counts(had[place]))
        flat = [letter for axis in had for letter in axis]
        kept = [letter for axis in axes for letter in axis]
        for place in reversed(range(len(flat))):
            if flat[place] not in kept:
                value = do(aten.squeeze.dim, value, place)
                del flat[place]
        order = [flat.index(letter) for axis in axes for letter in axis]
        if order != list(range(len(flat))):
            value = do(aten.permute.default, value, order)
        for place, axis in enumerate(axes):
            if len(axis) != 1:
                value = self._joined(do, value, axis, place, flat)
        return value

    def _counts(self, axis: Axis) -> list[int]:
        """Sizes to split an axis into; one that is known at run time is what the others leave."""
        sizes = [self.sizes[letter] for letter in axis]
        if sum(not isinstance(size, int) for size in sizes) > 1:
            raise Unreadable("an axis folded of several sizes that are known at run time only")
        return [size if isinstance(size, int) else -1 for size in sizes]


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, torch.Tensor) else require_fake(value).dim()


def on_tensors(operator: Any, value: torch.Tensor, *args: Any) -> torch.Tensor:
    """Do an operator to a tensor."""
    done: torch.Tensor = operator(value, *args)
    return done
