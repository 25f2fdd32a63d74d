"""Sums of products of elements: what an element of a graph is made of, and the arithmetic on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from grape_compile.passes.graph import Unreadable, require_fake

Index = tuple[Tensor, ...]
"""One int64 vector per dimension; row r of them addresses one element."""


@dataclass(frozen=True)
class Factor:
    """One element of a position-side value per row; `part` is value, real, imag, reciprocal, cos, sin or polar."""

    node: fx.Node
    index: Index
    part: str = "value"

    @property
    def is_complex(self) -> bool:
        return self.part == "polar" or (self.part == "value" and require_fake(self.node).is_complex())


@dataclass(frozen=True)
class Term:
    """`coefficient * prod(factors) * source` for the listed rows (kept in increasing order)."""

    rows: Tensor
    coefficient: Tensor
    factors: tuple[Factor, ...] = ()
    source: tuple[fx.Node, Index] | None = None

    def scaled(self, number: complex) -> Term:
        return replace(self, coefficient=self.coefficient * number)

    def take(self, keep: Tensor) -> Term:
        """The same term for some of its rows (positions into `rows`)."""
        factors = tuple(replace(factor, index=_pick(factor.index, keep)) for factor in self.factors)
        source = None if self.source is None else (self.source[0], _pick(self.source[1], keep))
        return Term(self.rows[keep], self.coefficient[keep], factors, source)

    def constant(self) -> float | None:
        """The one real coefficient of all rows, or None."""
        first = self.coefficient[0]
        same = bool((self.coefficient == first).all()) and float(first.imag) == 0
        return float(first.real) if same else None


def unit(rows: Tensor, *factors: Factor, source: tuple[fx.Node, Index] | None = None) -> Term:
    """A term with coefficient one."""
    return Term(rows, torch.ones(rows.shape, dtype=torch.complex128), factors, source)


def broadcast(index: Index, shape: Sequence[int]) -> Index:
    """Index of the operand element that broadcasting pairs with each result element.

    Raises Unreadable for an operand of more axes than are indexed.
    """
    if len(shape) > len(index):
        raise Unreadable(f"a value of {len(shape)} axes beside {len(index)}")
    tail = index[len(index) - len(shape) :]
    return tuple(
        axis if size != 1 else torch.zeros_like(axis) for axis, size in zip(tail, shape, strict=True)
    )


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


def multiply(left: list[Term], right: list[Term]) -> list[Term]:
    """Product of two sums of terms, row by row."""
    terms: list[Term] = []
    for one in left:
        for other in right:
            first, second = _common(one, other)
            if not first.rows.numel():
                continue
            if first.source is not None and second.source is not None:
                raise Unreadable("a product of two activations")
            number, factors = first.coefficient * second.coefficient, first.factors + second.factors
            terms.append(Term(first.rows, number, factors, first.source or second.source))
    return terms


def reciprocal(terms: list[Term]) -> list[Term]:
    """One over a single product of elements."""
    if (
        len(terms) != 1
        or any(factor.part != "value" for factor in terms[0].factors)
        or terms[0].source is not None
    ):
        raise Unreadable("a division by more than one value")
    inverse = tuple(replace(factor, part="reciprocal") for factor in terms[0].factors)
    return [replace(terms[0], coefficient=1 / terms[0].coefficient, factors=inverse)]


def parts(terms: list[Term], part: str) -> list[Term]:
    """Real or imaginary part: `Re(c f) = Re c Re f - Im c Im f`, `Im(c f) = Re c Im f + Im c Re f`."""
    result: list[Term] = []
    other = "imag" if part == "real" else "real"
    for term in terms:
        which = [position for position, factor in enumerate(term.factors) if factor.is_complex]
        if len(which) > 1:
            raise Unreadable("a product of complex position-side values")
        real, imag = (half.to(torch.complex128) for half in (term.coefficient.real, term.coefficient.imag))
        if not which:
            result.append(replace(term, coefficient=real if part == "real" else imag))
            continue
        for coefficient, piece in ((real, part), (-imag if part == "real" else imag, other)):
            result.append(
                replace(term, coefficient=coefficient, factors=_with_part(term.factors, which[0], piece))
            )
    return [term for term in result if bool((term.coefficient != 0).any())]


def _pick(index: Index, keep: Tensor) -> Index:
    return tuple(axis[keep] for axis in index)


def _with_part(factors: tuple[Factor, ...], position: int, piece: str) -> tuple[Factor, ...]:
    factor = factors[position]
    if factor.part == "polar":
        piece = {"real": "cos", "imag": "sin"}[piece]
    return (*factors[:position], replace(factor, part=piece), *factors[position + 1 :])


def _common(one: Term, other: Term) -> tuple[Term, Term]:
    if one.rows.shape == other.rows.shape and torch.equal(one.rows, other.rows):
        return one, other
    shared = one.rows[torch.isin(one.rows, other.rows)]
    return one.take(torch.searchsorted(one.rows, shared)), other.take(torch.searchsorted(other.rows, shared))


def raise_if(condition: bool, reason: str) -> None:
    """Stop reading, softly, for this reason."""
    if condition:
        raise Unreadable(reason)
