"""Path edges that train: GRAPE-AP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from grape_compile.encoding import Learned, grape_ap
from grape_compile.nn.slopes import SlopeFactors
from grape_compile.nn.trainable import Slots, TrainableEncoding, wide


class PathEdges(TrainableEncoding):
    """GRAPE-AP: b[t, j] = alpha_h sum_{l = j+1 ... t} logsigmoid(<p_t, R_l p_l> / dim), p = W x (GRAPE 5.1-5.2).

    `proj` W gives `dim` numbers for each head. `normalised`: "keys" divides p_l by its root mean square (the authors'
    code), "both" p_t as well (the paper). alpha are ALiBi's slopes; given `slopes`, or a `factor` that softplus(omega)
    has at the start, they train by `SlopeFactors`. From hidden states [B, T, C] to `path_query` and
    `path_key` [B, H, T, dim], one tensor.
    """

    reads_hidden = True

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        dim: int = 8,
        *,
        normalised: str = "keys",
        slopes: Sequence[float] | Tensor | None = None,
        factor: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(hidden_size, heads * dim, bias=False)
        self.factors = None
        self.encoding = grape_ap(heads, dim, normalised)
        if slopes is not None or factor is not None:
            self.factors = SlopeFactors(heads, slopes, 1.0 if factor is None else factor)
            self.encoding = replace(self.encoding, slopes=Learned("path_slopes"))

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        edges = wide(self.proj(hidden.to(self.proj.weight.dtype)))
        edges = edges.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        slots = {"path_query": edges, "path_key": edges}
        if self.factors is not None:
            slots["path_slopes"] = self.factors()
        return slots
