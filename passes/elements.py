"""Read a graph element by element: which elements of which earlier values make up an element, and with what factor.

An element of a value that is linear in an activation and polynomial in position-side values is a sum of terms

    coefficient * product of position-side elements * one element of the activation

and `pull` finds those terms exactly, by running indices (never data) backwards through movement, casts, sums and
products. The cost depends on the number of elements asked for, not on the size of the tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.passes.graph import Program, Sizes, Taint, Unreadable, fake, op_name, require_fake

Index = tuple[Tensor, ...]
"""One int64 vector per dimension; row r of them addresses one element."""


@dataclass(frozen=True)
class Factor:
    """One element of a position-side value per row; `part` is value, real, imag, cos or sin (of the value)."""

    node: fx.Node
    index: Index
    part: str = "value"


@dataclass(frozen=True)
class Term:
    """`coefficient * prod(factors) * source` for the listed rows."""

    rows: Tensor
    coefficient: Tensor
    factors: tuple[Factor, ...] = ()
    source: tuple[fx.Node, Index] | None = None

    def scaled(self, number: complex) -> Term:
        return replace(self, coefficient=self.coefficient * number)

    def take(self, keep: Tensor) -> Term:
        """The same term for some of its rows (positions into `rows`)."""
        pick: Callable[[Index], Index] = lambda index: tuple(axis[keep] for axis in index)  # noqa: E731 - used twice below
        return Term(
            self.rows[keep],
            self.coefficient[keep],
            tuple(replace(factor, index=pick(factor.index)) for factor in self.factors),
            None if self.source is None else (self.source[0], pick(self.source[1])),
        )


def broadcast(index: Index, shape: Sequence[int]) -> Index:
    """Index of the operand element that broadcasting pairs with each result element."""
    tail = index[len(index) - len(shape) :]
    return tuple(axis if size != 1 else torch.zeros_like(axis) for axis, size in zip(tail, shape, strict=True))


def ravel(index: Index, shape: Sequence[int]) -> Tensor:
    """Flat position of each element."""
    flat = torch.zeros_like(index[0]) if index else torch.zeros(1, dtype=torch.int64)
    for axis, size in zip(index, shape, strict=True):
        flat = flat * size + axis
    return flat


def unravel(flat: Tensor, shape: Sequence[int]) -> Index:
    """Inverse of `ravel`."""
    axes: list[Tensor] = []
    for size in reversed(shape):
        axes.append(flat % size)
        flat = flat // size
    return tuple(reversed(axes))


_RESHAPES = {
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten", "aten::squeeze", "aten::unsqueeze", "aten::view_as", "aten::reshape_as",
}  # fmt: skip
_IDENTITIES = {
    "aten::clone", "aten::contiguous", "aten::alias", "aten::to", "aten::_to_copy", "aten::type_as", "aten::lift_fresh",
    "aten::lift_fresh_copy", "aten::resolve_conj", "aten::resolve_neg", "aten::positive",
}  # fmt: skip
_EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to"}
_PERMUTES = {
    "aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT", "aten::swapaxes", "aten::swapdims", "aten::movedim", "aten::moveaxis",
}  # fmt: skip
_SPLITS = {"aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"}
_JOINS = {"aten::cat", "aten::concat", "aten::concatenate", "aten::stack"}
MOVEMENTS = (
    _RESHAPES | _IDENTITIES | _EXPANDS | _PERMUTES | _JOINS | _SPLITS
    | {"aten::slice", "aten::select", "aten::narrow", "getitem", "aten::repeat", "aten::tile", "aten::repeat_interleave", "aten::flip", "aten::roll"}
)  # fmt: skip
COMPLEX = {"aten::view_as_complex", "aten::view_as_real", "aten::real", "aten::imag", "aten::conj", "aten::_conj"}
SUMS = {"aten::add", "aten::sub", "aten::neg", "aten::sum", "aten::rsub", "aten::addcmul"}
PRODUCTS = {"aten::mul", "aten::div", "aten::multiply", "aten::divide", "aten::true_divide"}
_SUM_LIMIT = 8


def is_view_of_float_kind(node: fx.Node) -> bool:
    """A cast that keeps real numbers real (float to float, integer to float), so that exact arithmetic ignores it."""
    value, source = fake(node), fake(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if value is None or source is None:
        return True
    if value.is_complex() != source.is_complex():
        return False
    return not (source.is_floating_point() and not value.is_floating_point()) and not (
        value.dtype is torch.bool and source.dtype is not torch.bool
    )


class Reader:
    """Reads elements of one program at one binding of its symbolic sizes."""

    def __init__(self, program: Program, sizes: Sizes | None = None) -> None:
        self.program = program
        self.sizes = sizes or Sizes()

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.sizes.shape(node)

    def linear(self, node: fx.Node, stop: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements of `node` as terms in elements of the activation `stop`; position-side operands stay factors."""
        if node is stop:
            return [Term(rows, _ones(rows), (), (node, index))]
        if self.program.taints[node] <= Taint.POSITION:
            return [Term(rows, _ones(rows), (Factor(node, index),))]
        return self._pull(node, index, rows, lambda operand, at, who: self.linear(operand, stop, at, who))

    def position(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements of a position-side value as products of elements of the leaves it is made of."""
        name = op_name(node)
        if name in ("aten::cos", "aten::sin"):
            return [Term(rows, _ones(rows), (Factor(_operand(node, 0), index, name.removeprefix("aten::")),))]
        if name == "aten::polar":
            radius = self.position(_operand(node, 0), index, rows)
            angle = Factor(_operand(node, 1), index, "polar")
            return [replace(term, factors=(*term.factors, angle)) for term in radius]
        if name in ("aten::ones_like", "aten::ones", "aten::new_ones"):
            return [Term(rows, _ones(rows))]
        if not self._readable_position(node, name):
            return [Term(rows, _ones(rows), (Factor(node, index),))]
        return self._pull(node, index, rows, self.position)

    def element(self, factor: Factor, rows: Tensor) -> list[Term]:
        """A factor followed back to the leaves it is made of."""
        if factor.part in ("real", "imag"):
            return _parts(self.position(factor.node, factor.index, rows), factor.part)
        if factor.part != "value":
            return [Term(rows, _ones(rows), (factor,))]
        return self.position(factor.node, factor.index, rows)

    def product(self, node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
        """Elements of a position-side value as products of elements of the two values the model multiplies last."""
        name = op_name(node)
        if not self._readable_position(node, name):
            return [Term(rows, _ones(rows), (Factor(node, index),))]
        return self._pull(node, index, rows, self.product if name in MOVEMENTS or name in ("aten::neg", "aten::detach") else _leaf)

    def _readable_position(self, node: fx.Node, name: str) -> bool:
        if name == "aten::detach":
            return True
        if name in ("aten::to", "aten::_to_copy", "aten::type_as"):
            return is_view_of_float_kind(node)
        if name in MOVEMENTS or name in COMPLEX:
            return True
        value = fake(node)
        if value is None or not (value.is_floating_point() or value.is_complex()):
            return False
        if name in PRODUCTS:
            return "rounding_mode" not in node.kwargs
        if name in ("aten::matmul", "aten::bmm", "aten::outer", "aten::ger", "aten::einsum"):
            return self._outer(node, name) is not None
        return name == "aten::neg"

    # -- one step back -----------------------------------------------------------------------------------------------

    def _pull(self, node: fx.Node, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        name = op_name(node)
        if name == "aten::detach" and self.program.taints[node] <= Taint.PARAMETER:
            return back(_operand(node, 0), index, rows)
        if name in _JOINS:
            return self._join(node, name, index, rows, back)
        if name in MOVEMENTS:
            operand, moved = self._move(node, name, index)
            return back(operand, moved, rows)
        if name in COMPLEX:
            return self._complex(node, name, index, rows, back)
        if name in SUMS:
            return self._sum(node, name, index, rows, back)
        if name in PRODUCTS:
            return self._product(node, name, index, rows, back)
        outer = self._outer(node, name)
        if outer is not None:
            left, right = outer(index)
            return _multiply(back(left[0], left[1], rows), back(right[0], right[1], rows))
        raise Unreadable(f"{name or node.op} is not linear movement")

    def _move(self, node: fx.Node, name: str, index: Index) -> tuple[fx.Node, Index]:
        operand = _operand(node, 0)
        if name in _IDENTITIES:
            if not is_view_of_float_kind(node):
                raise Unreadable("a cast that rounds to integers")
            return operand, index
        if name == "getitem":
            return self._part(node, index)
        shape, out_shape = self.shape(operand), self.shape(node)
        if name in _RESHAPES:
            if str(node.target).endswith("view.dtype"):
                raise Unreadable("a view that reinterprets bits")
            return operand, unravel(ravel(index, out_shape), shape) if shape else ()
        if name in _EXPANDS:
            return operand, broadcast(index, shape)
        if name in _PERMUTES:
            order = self._order(node, name, len(shape))
            moved = list(index)
            for position, dim in enumerate(order):
                moved[dim] = index[position]
            return operand, tuple(moved)
        return operand, self._step(node, name, index, shape)

    def _step(self, node: fx.Node, name: str, index: Index, shape: tuple[int, ...]) -> Index:
        args = node.args
        if name in ("aten::repeat", "aten::tile"):
            tail = index[len(index) - len(shape) :]
            return tuple(axis % size for axis, size in zip(tail, shape, strict=True))
        if name == "aten::flip":
            dims = {int(dim) % len(shape) for dim in _ints(args[1])}
            return tuple(shape[d] - 1 - axis if d in dims else axis for d, axis in enumerate(index))
        if name == "aten::roll":
            return self._roll(node, index, shape)
        axes = list(index)
        if name == "aten::repeat_interleave":
            return self._repeat_interleave(node, axes, shape)
        dim = int(args[1]) % len(shape) if len(args) > 1 else 0  # type: ignore[call-overload] # a dimension is an int
        if name == "aten::select":
            position = self.sizes(args[2])
            axes.insert(dim, torch.full_like(index[0] if index else torch.zeros(1, dtype=torch.int64), position % shape[dim]))
        elif name == "aten::narrow":
            axes[dim] = axes[dim] + self.sizes(args[2]) % max(shape[dim], 1)
        else:
            start = self.sizes(args[2]) if len(args) > 2 and args[2] is not None else 0
            step = self.sizes(args[4]) if len(args) > 4 else 1
            start = max(0, min(start + shape[dim] if start < 0 else start, shape[dim]))
            axes[dim] = axes[dim] * step + start
        return tuple(axes)

    def _roll(self, node: fx.Node, index: Index, shape: tuple[int, ...]) -> Index:
        if len(node.args) < 3 or not node.args[2]:
            raise Unreadable("a roll of the flattened tensor")
        axes = list(index)
        for shift, dim in zip(_ints(node.args[1]), _ints(node.args[2]), strict=True):
            axes[dim % len(shape)] = (axes[dim % len(shape)] - shift) % shape[dim % len(shape)]
        return tuple(axes)

    def _repeat_interleave(self, node: fx.Node, axes: list[Tensor], shape: tuple[int, ...]) -> Index:
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        if isinstance(node.args[1], fx.Node) and fake(node.args[1]) is not None or not isinstance(dim, int):
            raise Unreadable("repeat_interleave with tensor repeats or of the flattened tensor")
        axes[dim % len(shape)] = axes[dim % len(shape)] // self.sizes(node.args[1])
        return tuple(axes)

    def _part(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
        split, which = _operand(node, 0), node.args[1]
        name = op_name(split)
        if name not in _SPLITS or not isinstance(which, int):
            raise Unreadable(f"output of {name or split.op}")
        operand = _operand(split, 0)
        shape = self.shape(operand)
        position = 0 if name == "aten::unbind" else 2
        dim = split.kwargs.get("dim", split.args[max(position, 1)] if len(split.args) > max(position, 1) else 0)
        dim = int(dim) % len(shape)  # type: ignore[call-overload] # a dimension is an int
        parts = list(split.meta["val"])
        which = which % len(parts)
        axes = list(index)
        if name == "aten::unbind":
            axes.insert(dim, torch.full_like(index[0], which))
        else:
            axes[dim] = axes[dim] + sum(self.sizes(part.shape[dim]) for part in parts[:which])
        return operand, tuple(axes)

    def _order(self, node: fx.Node, name: str, rank: int) -> list[int]:
        order = list(range(rank))
        if name == "aten::permute":
            return [dim % rank for dim in _ints(node.args[1])]
        if name in ("aten::movedim", "aten::moveaxis"):
            sources, targets = ([dim % rank for dim in _ints(argument)] for argument in node.args[1:3])
            order = [dim for dim in order if dim not in sources]
            for target, source in sorted(zip(targets, sources, strict=True)):
                order.insert(target, source)
            return order
        if name == "aten::numpy_T":
            return order[::-1]
        first, second = (-2, -1) if name == "aten::mT" else (0, 1) if name == "aten::t" else tuple(_ints(node.args[1:3]))
        if rank >= 2:
            order[first], order[second] = order[second], order[first]
        return order

    def _join(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        parts, rank = list(node.args[0]), len(index)  # type: ignore[arg-type] # a list of nodes
        dim = int(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)) % rank  # type: ignore[arg-type] # an int
        terms: list[Term] = []
        offset = 0
        for part in parts:
            assert isinstance(part, fx.Node)
            size = 1 if name == "aten::stack" else self.shape(part)[dim]
            keep = ((index[dim] >= offset) & (index[dim] < offset + size)).nonzero().flatten()
            if keep.numel():
                axes = [axis[keep] for axis in index]
                if name == "aten::stack":
                    del axes[dim]
                else:
                    axes[dim] = axes[dim] - offset
                terms += back(part, tuple(axes), rows[keep])
            offset += size
        return terms

    def _sum(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        if name == "aten::sum":
            return self._reduce(node, index, rows, back)
        if name == "aten::neg":
            return [term.scaled(-1) for term in back(_operand(node, 0), index, rows)]
        first, second = _operand(node, 0), _operand(node, 1)
        if name == "aten::addcmul":
            third = _operand(node, 2)
            product = _multiply(self._at(second, index, rows, back), self._at(third, index, rows, back))
            value = _number(node.kwargs.get("value", 1))
            return self._at(first, index, rows, back) + [term.scaled(value) for term in product]
        alpha = _number(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1))
        left, right = self._at(first, index, rows, back), self._at(second, index, rows, back)
        if name == "aten::rsub":
            left, right = right, left
        sign = 1 if name == "aten::add" else -1
        return left + [term.scaled(sign * alpha) for term in right]

    def _at(self, operand: fx.Node, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        return back(operand, broadcast(index, self.shape(operand)), rows)

    def _reduce(self, node: fx.Node, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        operand = _operand(node, 0)
        shape = self.shape(operand)
        dims = sorted(dim % len(shape) for dim in _ints(node.args[1])) if len(node.args) > 1 and node.args[1] else []
        keep_dims = bool(node.args[2]) if len(node.args) > 2 else False
        if len(dims) != 1 or shape[dims[0]] > _SUM_LIMIT:
            raise Unreadable("a sum over many elements")
        terms: list[Term] = []
        for position in range(shape[dims[0]]):
            axes = list(index)
            if keep_dims:
                del axes[dims[0]]
            axes.insert(dims[0], torch.full_like(rows, position))
            terms += back(operand, tuple(axes), rows)
        return terms

    def _product(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        first, second = node.args[0], node.args[1]
        divide = name not in ("aten::mul", "aten::multiply")
        if "rounding_mode" in node.kwargs:
            raise Unreadable("a rounded division")
        if not isinstance(first, fx.Node):
            first, second = second, first
        if not isinstance(second, fx.Node) or fake(second) is None:
            number = _number(second if not isinstance(second, fx.Node) else self.sizes(second))
            assert isinstance(first, fx.Node)
            return [term.scaled(1 / number if divide else number) for term in self._at(first, index, rows, back)]
        assert isinstance(first, fx.Node)
        right = self._at(second, index, rows, back)
        return _multiply(self._at(first, index, rows, back), [_reciprocal(term, right) for term in right] if divide else right)

    def _complex(self, node: fx.Node, name: str, index: Index, rows: Tensor, back: Callable[[fx.Node, Index, Tensor], list[Term]]) -> list[Term]:
        operand = _operand(node, 0)
        if name == "aten::view_as_complex":
            zero = torch.zeros_like(rows)
            imaginary = [term.scaled(1j) for term in back(operand, (*index, zero + 1), rows)]
            return back(operand, (*index, zero), rows) + imaginary
        if name == "aten::view_as_real":
            terms: list[Term] = []
            for part, which in (("real", 0), ("imag", 1)):
                keep = (index[-1] == which).nonzero().flatten()
                if keep.numel():
                    terms += _parts(back(operand, tuple(axis[keep] for axis in index[:-1]), rows[keep]), part)
            return terms
        terms = back(operand, index, rows)
        if name in ("aten::real", "aten::imag"):
            return _parts(terms, name.removeprefix("aten::")) if require_fake(operand).is_complex() else terms
        if any(require_fake(factor.node).is_complex() or factor.part == "polar" for term in terms for factor in term.factors):
            raise Unreadable("the conjugate of a complex position-side value")
        return [replace(term, coefficient=term.coefficient.conj()) for term in terms]

    def _outer(self, node: fx.Node, name: str) -> Callable[[Index], tuple[tuple[fx.Node, Index], tuple[fx.Node, Index]]] | None:
        """A product without a sum: `outer`, a matrix product over a dimension of size 1, an einsum without contraction."""
        if name in ("aten::outer", "aten::ger"):
            return lambda index: ((_operand(node, 0), (index[0],)), (_operand(node, 1), (index[1],)))
        if name in ("aten::matmul", "aten::bmm"):
            left, right = _operand(node, 0), _operand(node, 1)
            left_shape, right_shape = self.shape(left), self.shape(right)
            if len(left_shape) < 2 or len(right_shape) < 2 or left_shape[-1] != 1:
                return None
            return lambda index: (
                (left, broadcast((*index[:-1], torch.zeros_like(index[-1])), left_shape)),
                (right, broadcast((*index[:-2], torch.zeros_like(index[-1]), index[-1]), right_shape)),
            )
        return self._einsum(node) if name == "aten::einsum" else None

    def _einsum(self, node: fx.Node) -> Callable[[Index], tuple[tuple[fx.Node, Index], tuple[fx.Node, Index]]] | None:
        equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type] # a list of nodes
        inputs, arrow, output = equation.partition("->")
        left, comma, right = inputs.partition(",")
        if not arrow or not comma or "." in equation or set(left + right) - set(output) or len(operands) != 2:
            return None
        first, second = operands
        assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
        return lambda index: (
            (first, tuple(index[output.index(letter)] for letter in left)),
            (second, tuple(index[output.index(letter)] for letter in right)),
        )


def _leaf(node: fx.Node, index: Index, rows: Tensor) -> list[Term]:
    return [Term(rows, _ones(rows), (Factor(node, index),))]


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape, dtype=torch.complex128)


def _operand(node: fx.Node, position: int) -> fx.Node:
    operand = node.args[position] if position < len(node.args) else None
    if not isinstance(operand, fx.Node):
        raise Unreadable(f"operand {position} of {node.name} is no tensor")
    return operand


def _ints(values: Any) -> list[int]:
    return [values] if isinstance(values, int) else [operator.index(value) for value in values]


def _number(value: Any) -> complex:
    if isinstance(value, int | float | complex):
        return value
    raise Unreadable(f"{value!r} is no number")


def _multiply(left: list[Term], right: list[Term]) -> list[Term]:
    """Product of two sums of terms, row by row."""
    terms: list[Term] = []
    for one in left:
        for other in right:
            first, second = _common(one, other)
            if not first.rows.numel():
                continue
            if first.source is not None and second.source is not None:
                raise Unreadable("a product of two activations")
            terms.append(
                Term(first.rows, first.coefficient * second.coefficient, first.factors + second.factors, first.source or second.source)
            )
    return terms


def _reciprocal(term: Term, all_terms: list[Term]) -> Term:
    if len(all_terms) != 1 or any(factor.part != "value" for factor in term.factors) or term.source is not None:
        raise Unreadable("a division by more than one value")
    inverse = tuple(replace(factor, part="reciprocal") for factor in term.factors)
    return replace(term, coefficient=1 / term.coefficient, factors=inverse)


def _common(one: Term, other: Term) -> tuple[Term, Term]:
    if one.rows.shape == other.rows.shape and torch.equal(one.rows, other.rows):
        return one, other
    shared = one.rows[torch.isin(one.rows, other.rows)]
    place = lambda term: torch.searchsorted(term.rows, shared)  # noqa: E731 - rows are kept sorted
    return one.take(place(one)), other.take(place(other))


def _parts(terms: list[Term], part: str) -> list[Term]:
    """Real or imaginary part of complex terms: `Re(c f) = Re c Re f - Im c Im f`, `Im(c f) = Re c Im f + Im c Re f`."""
    result: list[Term] = []
    for term in terms:
        which = [k for k, factor in enumerate(term.factors) if factor.part == "polar" or factor.part == "value" and require_fake(factor.node).is_complex()]
        if len(which) > 1:
            raise Unreadable("a product of complex position-side values")
        real, imag = term.coefficient.real.to(torch.complex128), term.coefficient.imag.to(torch.complex128)
        if not which:
            result.append(replace(term, coefficient=real if part == "real" else imag))
            continue
        for coefficient, piece in ((real, part), (-imag if part == "real" else imag, "imag" if part == "real" else "real")):
            if bool((coefficient != 0).any()):
                result.append(replace(term, coefficient=coefficient, factors=_with_part(term.factors, which[0], piece)))
    return [term for term in result if bool((term.coefficient != 0).any())]


def _with_part(factors: tuple[Factor, ...], position: int, piece: str) -> tuple[Factor, ...]:
    factor = factors[position]
    if factor.part == "polar":
        piece = {"real": "cos", "imag": "sin"}[piece]
    return (*factors[:position], replace(factor, part=piece), *factors[position + 1 :])
