"""The path bias of an attention call (GRAPE 5): edges between a query and every key behind it, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import Identity, Link, LogSigmoid, NegativeExp
from grape_compile.operators.bias import Leaves
from grape_compile.operators.operands import LOG2E

#: What a link makes of the products of queries and edges.
LINKS: Final[Mapping[type[Link], Callable[[Tensor], Tensor]]] = {
    LogSigmoid: torch.nn.functional.logsigmoid,
    NegativeExp: lambda product: -product.exp(),
    Identity: lambda product: product,
}


@dataclass(frozen=True)
class Over:
    """A link in place: g(x) = `after` f(`before` x), and f writes over what it is given."""

    before: float
    write: Callable[[Tensor], object]
    after: float


LINKS_OVER: Final[Mapping[type[Link], Over]] = {
    LogSigmoid: Over(-LOG2E, lambda product: product.exp2_().log1p_(), -1.0),
    # Not by powers of two: the rounding of the product with log2(e) would grow with the product.
    NegativeExp: Over(1.0, Tensor.exp_, -1.0),
    Identity: Over(1.0, lambda product: product, 1.0),
}
#: Minus the softplus of -x is the log-sigmoid of x, and below -40 x itself; no power of two overflows on the way.
FAR_LOG_SIGMOID: Final = Over(
    1.0, lambda product: torch.ops.aten.softplus.out(product, -1.0, 40.0, out=product), 1.0
)
#: Powers of two of products up to this are numbers.
FAR: Final = 64.0


@dataclass(frozen=True, eq=False)
class Path(Leaves):
    """b[t, j] = slope * sum_{l = j+1 ... t} g(<p_t, r_l>), queries being the last keys; zero for j >= t.

    `slopes` [1 or B, 1 or H], `query` p / dim [1 or B, 1 or H, T_q, dim] and `key` r, turned,
    [1 or B, 1 or H, T_k, dim], have the compute dtype. `is_bounded`: no product is larger than one.
    """

    link: Link
    slopes: Tensor
    query: Tensor
    key: Tensor
    is_bounded: bool = False

    #: No product of a number of the query and one of the key, however many are summed.
    is_signed = False

    def linked(self, product: Tensor) -> Tensor:
        """Return g of the products."""
        return LINKS[type(self.link)](product)

    @property
    def over(self) -> Over:
        """Return g in place, as it is fastest for products of these queries and edges."""
        if isinstance(self.link, LogSigmoid) and not self.is_bounded:
            query, key = (edges.square().sum(-1).amax() for edges in (self.query, self.key))
            if not bool(query * key <= FAR**2):
                return FAR_LOG_SIGMOID
        return LINKS_OVER[type(self.link)]

    def block(self, rows: slice, keys: slice, offset: int) -> Tensor:
        """Return the bias [1 or B, 1 or H, rows, keys]; `keys` reach up to the key of the last query."""
        edges = self.linked(self.query[..., rows, :] @ self.key[..., keys, :].mT)
        edges = edges.masked_fill(later(rows, keys, offset, edges.device), 0.0)
        sums = edges.flip(-1).cumsum(-1).flip(-1) - edges
        return self.slopes[..., None, None] * sums


def later(rows: slice, keys: slice, offset: int, device: torch.device) -> Tensor:
    """Return True for keys behind which the query of a row stands no more, [rows, keys]."""
    at = torch.arange(rows.start + offset, rows.stop + offset, device=device)
    return torch.arange(keys.start, keys.stop, device=device) > at[:, None]
