"""The operands of a path bias as its kernels read them, and their gradients from what the kernels return.

Products of queries and edges go through matrix instructions of 16 bits, which is not enough for numbers that are
summed over a whole sequence. So both are cut in two, p = p_1 + p_2 and r = r_1 + r_2, and multiplied as
[p_1, p_2, p_1] by [r_1, r_1, r_2]: what is left out is below 2^-16 of |p| |r| in bfloat16, 2^-22 in float16.
Float32 is multiplied as it is. Float16 has too few exponents: both are divided by a power of two of each head first,
and the kernels multiply the products by it.

The kernels want products as logarithms to the base two, unless a link has a polynomial of its own: p is multiplied by
log2(e) before it is cut, or the products with what they were divided by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import Identity, Link, LogSigmoid, NegativeExp
from grape_compile.kernels.pointers import padded
from grape_compile.operators.call import AttendCall
from grape_compile.operators.path import Path

#: What the kernels call a link; a log-sigmoid of products that are known to be small has its own polynomial.
BOUNDED: Final = 1
LINKS: Final[Mapping[type[Link], int]] = {LogSigmoid: 0, NegativeExp: 2, Identity: 3}
#: Divisors of heads whose operands are all zero.
SMALLEST: Final = 2.0**-100


def link_of(path: Path) -> int:
    """Return what the kernels call the link of a path."""
    is_small = isinstance(path.link, LogSigmoid) and path.is_bounded
    return BOUNDED if is_small else LINKS[type(path.link)]


class Edges:
    """Query and key of a path bias, cut for 16 bits, and the slopes."""

    def __init__(self, call: AttendCall) -> None:
        self.call = call
        (self.path,) = (bias for bias in call.biases if isinstance(bias, Path))

    @property
    def link(self) -> int:
        """What the kernels make of a product."""
        return link_of(self.path)

    @property
    def block(self) -> int:
        """Numbers of one operand of the products, padded."""
        return padded(self.path.query.shape[-1] * (1 if self.call.query.dtype == torch.float32 else 3))

    @cached_property
    def slopes(self) -> Tensor:
        """The slopes, [B, H]."""
        return self.path.slopes.expand(self.call.query.shape[:2]).contiguous()

    @property
    def is_sized(self) -> bool:
        """Whether products have to be multiplied by what their operands were divided by."""
        return self.link != BOUNDED and self.call.query.dtype == torch.float16

    @cached_property
    def query_size(self) -> Tensor:
        """What the queries were divided by, [1 or B, 1 or H, 1, 1]."""
        if not self.is_sized:
            return self.path.query.new_full((1, 1, 1, 1), 1.0 if self.link == BOUNDED else math.log(2.0))
        return _size(self.path.query)

    @cached_property
    def key_size(self) -> Tensor:
        """What the keys were divided by."""
        return _size(self.path.key) if self.is_sized else self.path.key.new_ones((1, 1, 1, 1))

    @cached_property
    def sizes(self) -> Tensor | None:
        """What a product was divided by, [B, H], or None where the kernels need not know."""
        if not self.is_sized:
            return None
        sizes = (self.query_size * self.key_size)[..., 0, 0]
        return sizes.expand(self.call.query.shape[:2]).contiguous()

    @cached_property
    def query(self) -> Tensor:
        """[p_1, p_2, p_1, 0 ...], [1 or B, 1 or H, T_q, block]."""
        first, rest = self._cut(self.path.query / self.query_size)
        return self._joined([first] if rest is None else [first, rest, first])

    @cached_property
    def key(self) -> Tensor:
        """[r_1, r_1, r_2, 0 ...], [1 or B, 1 or H, T_k, block]."""
        first, rest = self._cut(self.path.key / self.key_size)
        return self._joined([first] if rest is None else [first, first, rest])

    def gradients(self, slopes: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the tensors of the bias.

        From what the kernels found: sums of logit gradients times the bias without its slope, [B, H, T_q], and the
        gradients of each cut of queries and keys, [B, H, T, block].
        """
        dim = self.path.query.shape[-1]

        def joined(cuts: Tensor, size: Tensor, other: int) -> Tensor:
            whole = cuts[..., :dim]
            if self.call.query.dtype != torch.float32:
                # The keys of a query's second number are r_1 again: the cuts that count are the first and the third.
                whole = whole + cuts[..., other * dim : (other + 1) * dim]
            return whole * size

        found = {
            "slopes": slopes.sum(-1),
            "query": joined(query, self.key_size, 2),
            "key": joined(key, self.query_size, 1),
        }
        return tuple(found[name].sum_to_size(tensor.shape) for name, tensor in self.path.tensors().items())

    def _cut(self, operand: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = self.call.query.dtype
        first = operand.to(dtype)
        return first, None if dtype == torch.float32 else (operand - first).to(dtype)

    def _joined(self, cuts: list[Tensor]) -> Tensor:
        shape, dim = cuts[0].shape, cuts[0].shape[-1]
        joined = cuts[0].new_zeros((*shape[:-1], self.block))
        for at, cut in enumerate(cuts):
            joined[..., at * dim : (at + 1) * dim] = cut
        return joined


def _size(operand: Tensor) -> Tensor:
    """Return the power of two that the numbers of a head do not exceed."""
    largest = operand.abs().amax((-2, -1), keepdim=True).clamp_(min=SMALLEST)
    return largest.log2().ceil().exp2()
