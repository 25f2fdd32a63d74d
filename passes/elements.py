"""Read a graph element by element: which elements of which earlier values make up an element, and with what factor.

An element of a value that is linear in an activation and polynomial in position-side values is a sum of terms

    coefficient * product of position-side elements * one element of the activation

and reading finds those terms exactly, by running indices (never data) backwards through movement, casts, sums and
products. The cost depends on the number of elements asked for, not on the size of the tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.passes.contractions import CONTRACTIONS, Contraction, contraction, renamed
from grape_compile.passes.facts import rely_on_numbers
from grape_compile.passes.filled import filled, holds_zeros, is_zero, is_zero_tensor
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.matrices import SUM_LIMIT, is_matrix, signs, summands
from grape_compile.passes.movement import (
    IDENTITIES,
    JOINS,
    MOVEMENTS,
    SINGLE,
    ints,
    is_frozen,
    is_symbolic,
    keeps_numbers,
    move,
    operand_of,
    places,
)
from grape_compile.passes.pieces import (
    BLOCKS,
    PADS,
    PUTS,
    SCATTERS,
    Back,
    blocks,
    joined,
    padded,
    put,
    scattered,
)
from grape_compile.passes.replay import Replay
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.terms import (
    Factor,
    Index,
    Term,
    broadcast,
    multiply,
    parts,
    raise_if,
    reciprocal,
    unit,
)

COMPLEX = {
    "aten::view_as_complex",
    "aten::view_as_real",
    "aten::real",
    "aten::imag",
    "aten::conj",
    "aten::_conj",
    "aten::complex",
}
SUMS = {"aten::add", "aten::sub", "aten::neg", "aten::sum", "aten::rsub", "aten::addcmul"}
PRODUCTS = {"aten::mul", "aten::div", "aten::multiply", "aten::divide", "aten::true_divide"}
PICKS = {"aten::index_select", "aten::index", "aten::gather", "aten::take_along_dim"}
_MASKED = {"aten::masked_fill", "aten::where"}
_DETACHES = {"aten::detach", "aten::detach_"}


def _axis_of(node: fx.Node) -> Any:
    """The axis that `take_along_dim` picks along."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    raise_if(dim is None, "elements picked out of the flattened tensor")
    return dim


class Reader:
    """Reads elements of one program at the sizes of its captured example.

    `alive` reads a masked value as if nothing were masked (what its live entries hold), and cuts at symbolic offsets at
    the captured offset; `masked` and `frozen` tell that this happened: what was read holds for the captured sizes only.
    `fills` are the values whose masks were not looked at.
    """

    def __init__(self, program: Program, replay: Replay, alive: bool = False) -> None:
        self.program, self.replay, self.alive = program, replay, alive
        self.sizes = Sizes()
        self.frozen = self.masked = False
        self.fills: set[fx.Node] = set()

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.sizes.shape(node)

    def linear(self, node: fx.Node, stop: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements of `node` as terms in elements of the activation `stop`; position-side operands stay factors."""
        if node is stop:
            return [unit(rows, source=(node, index))]
        if self.program.taints[node] <= Taint.POSITION:
            return [] if holds_zeros(node) else [unit(rows, Factor(node, index))]
        return self.pull(node, index, rows, lambda operand, at, who: self.linear(operand, stop, at, who))

    def position(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements of a position-side value as products of elements of the leaves it is made of."""
        name = op_name(node)
        if name in ("aten::cos", "aten::sin"):
            return [unit(rows, Factor(operand_of(node, 0), index, name.removeprefix("aten::")))]
        if name == "aten::polar":
            radius = self.position(operand_of(node, 0), index, rows)
            angle = Factor(operand_of(node, 1), index, "polar")
            return [replace(term, factors=(*term.factors, angle)) for term in radius]
        number = filled(node, name)
        if number is not None:
            return [unit(rows).scaled(number)]
        if is_zero_tensor(node):
            return []
        if not self._goes_on(node, name):
            return self._leaf(node, index, rows)
        if name in PUTS or (name in SUMS | CONTRACTIONS and is_matrix(node)):
            return self._pieced(node, index, rows)
        return self.pull(node, index, rows, self.position)

    def _pieced(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """A value put together: every element is one of a part, the other parts zero, or reading stops here."""
        told = self.frozen, self.masked
        try:
            terms = self.pull(node, index, rows, self.position)
            whose = torch.cat([rows[:0], *(term.rows for term in terms)])
            if whose.unique().numel() == whose.numel():
                return terms
        except Unreadable:
            pass
        self.frozen, self.masked = told
        return self._leaf(node, index, rows)

    def product(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements of a position-side value as products of elements of the two values the model multiplies last."""
        name = op_name(node)
        if not self._goes_on(node, name):
            return [unit(rows, Factor(node, index))]
        further = name in MOVEMENTS or name in _MASKED or name == "aten::neg" or name in _DETACHES
        return self.pull(
            node,
            index,
            rows,
            self.product if further else lambda operand, at, who: [unit(who, Factor(operand, at))],
        )

    def element(self, factor: Factor, rows: Tensor) -> list[Term]:
        """A factor followed back to the leaves it is made of."""
        if factor.part in ("real", "imag"):
            return parts(self.position(factor.node, factor.index, rows), factor.part)
        if factor.part != "value":
            return [unit(rows, factor)]
        return self.position(factor.node, factor.index, rows)

    def _leaf(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """A value reading stops at; signs written as a tensor, or as a matrix that moves channels, are coefficients."""
        values = signs(self.program, self.replay, node)
        if values is None:
            return [unit(rows, Factor(node, index))]
        numbers = values[index].to(torch.complex128).expand(rows.shape)
        keep = numbers.nonzero().flatten()
        return [Term(rows[keep], numbers[keep])] if keep.numel() else []

    def _goes_on(self, node: fx.Node, name: str) -> bool:
        """Whether reading a position-side value goes on behind this operator."""
        if node in self.program.stale:
            return False
        if name in _DETACHES:
            return self.program.taints[node] <= Taint.PARAMETER
        if name in _MASKED:
            return self.alive and kept_by_mask(node) is not None
        if name in IDENTITIES:
            return keeps_numbers(node)
        if name in MOVEMENTS:
            return self.alive or not is_frozen(node, name)
        if name in SCATTERS:
            return not any(map(is_symbolic, node.args[2:]))
        if name in PICKS:
            return self._picks_channels(node)
        if name in COMPLEX | BLOCKS:
            return True
        value = fake(node)
        if value is None or not (value.is_floating_point() or value.is_complex()):
            return False
        if name in PRODUCTS:
            return "rounding_mode" not in node.kwargs
        if name in CONTRACTIONS:
            product = contraction(node, self.sizes)
            return product is not None and (product.size == 1 or is_matrix(node))
        if name == "aten::neg" or (name in SUMS and is_matrix(node)):
            return True
        return name in SUMS and any(is_zero(operand) for operand in node.args[:2])

    # -- one step back -----------------------------------------------------------------------------------------------

    def pull(self, node: fx.Node, index: Index, rows: Tensor, back: Back) -> list[Term]:
        name = op_name(node)
        raise_if(node in self.program.stale, "a value that was written to in place")
        if name in _DETACHES and self.program.taints[node] <= Taint.PARAMETER:
            return back(operand_of(node, 0), index, rows)
        if name in MOVEMENTS and is_frozen(node, name):
            raise_if(not self.alive, f"{name} at a symbolic offset")
            self.frozen = True
        if name in JOINS:
            return joined(node, index, rows, back, self.sizes)
        if name in SINGLE:
            operand, moved = move(node, name, index, self.sizes)
            return back(operand, moved, rows)
        if name in _MASKED and self.alive:
            filled = kept_by_mask(node)
            if filled is not None:
                self.masked = True
                self.fills.add(node)
                return self._at(filled[0], index, rows, back)
        if name in COMPLEX:
            return self._complex(node, name, index, rows, back)
        if name in SUMS:
            return self._sum(node, name, index, rows, back)
        if name in PRODUCTS:
            return self._product(node, name, index, rows, back)
        if name in PICKS:
            return back(operand_of(node, 0), self._picked(node, index), rows)
        if name in PUTS:
            return put(node, index, rows, back, self.sizes, self._held)
        if name in SCATTERS:
            return scattered(node, index, rows, back, self.sizes)
        if name in BLOCKS:
            return blocks(node, index, rows, back, self.sizes)
        if name in PADS:
            return padded(node, index, rows, back, self.sizes)
        reordered = renamed(node, index)
        if reordered is not None:
            return back(*reordered, rows)
        product = contraction(node, self.sizes)
        if product is not None:
            return self._contracted(product, index, rows, back)
        raise Unreadable(f"{name or node.op} is not linear movement")

    def _contracted(self, product: Contraction, index: Index, rows: Tensor, back: Back) -> list[Term]:
        """A product of tensors with few summands: a sum of products."""
        terms: list[Term] = []
        for keep, at in summands(self.program, self.replay, self.position, product, index):
            here = tuple(axis[keep] for axis in index)
            left = back(product.left, product.left_at(here, at), rows[keep])
            terms += multiply(left, back(product.right, product.right_at(here, at), rows[keep]))
        return terms

    def _picked(self, node: fx.Node, index: Index) -> Index:
        """Elements picked along one axis by a list of places, or by a place for every element, that cannot change."""
        axes, name = list(index), op_name(node)
        if name in ("aten::gather", "aten::take_along_dim"):
            chosen = operand_of(node, 2 if name == "aten::gather" else 1)
            dim = ints(node.args[1] if name == "aten::gather" else _axis_of(node))[0] % len(axes)
            at = self._held(chosen, broadcast(index, self.shape(chosen)))
        else:
            dim, chosen = places(node)
            at = self._held(chosen, (axes[dim],))
        shape = self.shape(operand_of(node, 0))
        axes[dim] = at % shape[dim]
        return broadcast(tuple(axes), shape)

    def _held(self, node: fx.Node, index: Index) -> Tensor:
        """The integers of a list, moved about or not; of one in a buffer that is kept they are relied on."""
        while (
            self.program.made_of(node) is None
            and op_name(node) in SINGLE
            and not is_frozen(node, op_name(node))
        ):
            node, index = move(node, op_name(node), index, self.sizes)
        raise_if(self.program.made_of(node) is None, "elements picked by an index that may change")
        held = self.replay.tensor(node)
        raise_if(held.dtype.is_floating_point or held.dtype is torch.bool, "elements picked by a mask")
        rely_on_numbers(self.program, node, self.replay)
        return held[index].to(torch.int64)

    def _picks_channels(self, node: fx.Node) -> bool:
        """Whether a constant list picks along the last axis; rows of a table are looked up, and reading stops there."""
        if op_name(node) not in ("aten::index", "aten::index_select"):
            return False
        try:
            dim, chosen = places(node)
        except Unreadable:
            return False
        held = require_fake(chosen)
        whole = not held.is_floating_point() and held.dtype is not torch.bool
        return whole and dim == require_fake(node).dim() - 1 and self.program.is_constant(chosen)

    def _sum(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Back) -> list[Term]:
        if name == "aten::sum":
            return self._reduce(node, index, rows, back)
        if name == "aten::neg":
            return [term.scaled(-1) for term in back(operand_of(node, 0), index, rows)]
        first, second = node.args[:2]
        if name == "aten::addcmul":
            factors = (self._at(operand_of(node, place), index, rows, back) for place in (1, 2))
            value = _number(node.kwargs.get("value", 1))
            return self._at(first, index, rows, back) + [term.scaled(value) for term in multiply(*factors)]
        alpha = _number(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1))
        if name == "aten::rsub":
            first, second = second, first
            raise_if(alpha != 1, "a reversed difference with a factor")
        sign = 1 if name == "aten::add" else -1
        return self._at(first, index, rows, back) + [
            term.scaled(sign * alpha) for term in self._at(second, index, rows, back)
        ]

    def _at(self, operand: object, index: Index, rows: Tensor, back: Back) -> list[Term]:
        """The elements of an operand that broadcasting pairs with `index`; a number is a term, zero is none."""
        if isinstance(operand, fx.Node):
            return back(operand, broadcast(index, self.shape(operand)), rows)
        number = _number(operand)
        return [unit(rows).scaled(number)] if number else []

    def _reduce(self, node: fx.Node, index: Index, rows: Tensor, back: Back) -> list[Term]:
        operand = operand_of(node, 0)
        shape = self.shape(operand)
        dims = (
            sorted(dim % len(shape) for dim in ints(node.args[1]))
            if len(node.args) > 1 and node.args[1] is not None
            else []
        )
        keep_dims = bool(node.args[2]) if len(node.args) > 2 else False
        raise_if(len(dims) != 1 or shape[dims[0]] > SUM_LIMIT, "a sum over many elements")
        raise_if(is_symbolic(require_fake(operand).shape[dims[0]]), "a sum over an axis of open size")
        terms: list[Term] = []
        for position in range(shape[dims[0]]):
            axes = list(index)
            if keep_dims:
                del axes[dims[0]]
            axes.insert(dims[0], torch.full_like(rows, position))
            terms += back(operand, tuple(axes), rows)
        return terms

    def _product(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Back) -> list[Term]:
        first, second = node.args[0], node.args[1]
        divide = name not in ("aten::mul", "aten::multiply")
        raise_if("rounding_mode" in node.kwargs, "a rounded division")
        if not isinstance(first, fx.Node):
            first, second = second, first
        assert isinstance(first, fx.Node)
        if not isinstance(second, fx.Node):
            number = _number(second)
            return [
                term.scaled(1 / number if divide else number) for term in self._at(first, index, rows, back)
            ]
        raise_if(fake(second) is None, "a product with a symbolic size")
        right = self._at(second, index, rows, back)
        return multiply(self._at(first, index, rows, back), reciprocal(right) if divide else right)

    def _complex(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Back) -> list[Term]:
        operand = operand_of(node, 0)
        if name == "aten::complex":
            imaginary = self._at(operand_of(node, 1), index, rows, back)
            return self._at(operand, index, rows, back) + [term.scaled(1j) for term in imaginary]
        if name == "aten::view_as_complex":
            zero = torch.zeros_like(rows)
            imaginary = [term.scaled(1j) for term in back(operand, (*index, zero + 1), rows)]
            return back(operand, (*index, zero), rows) + imaginary
        if name == "aten::view_as_real":
            terms: list[Term] = []
            for part, which in (("real", 0), ("imag", 1)):
                keep = (index[-1] == which).nonzero().flatten()
                if keep.numel():
                    terms += parts(back(operand, tuple(axis[keep] for axis in index[:-1]), rows[keep]), part)
            return terms
        terms = back(operand, index, rows)
        if name in ("aten::real", "aten::imag"):
            return parts(terms, name.removeprefix("aten::")) if require_fake(operand).is_complex() else terms
        conjugate_too = any(factor.is_complex for term in terms for factor in term.factors)
        raise_if(conjugate_too, "the conjugate of a complex position-side value")
        return [replace(term, coefficient=term.coefficient.conj()) for term in terms]


def kept_by_mask(node: fx.Node) -> tuple[fx.Node, object] | None:
    """What a mask leaves, the operand that is not the constant written over it, and that; None for anything else."""
    if op_name(node) not in _MASKED:
        return None
    one, other = (node.args[0], node.args[2]) if op_name(node) == "aten::masked_fill" else node.args[1:3]
    pairs = ((one, other),) if op_name(node) == "aten::masked_fill" else ((one, other), (other, one))
    found = [
        (kept, filled) for kept, filled in pairs if isinstance(kept, fx.Node) and require_fake(kept).dim() > 0
    ]
    return found[0] if len(found) == 1 else None


def _number(value: Any) -> complex:
    if isinstance(value, int | float | complex):
        return value
    raise Unreadable(f"{value!r} is no number")
