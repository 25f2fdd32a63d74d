"""Encodings as layers for models written by hand: in place of RoPE, of fused attention, of an attention layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from grape_compile.encoding import Bias, Encoding, Multiplicative, PathBias
from grape_compile.errors import OperandError
from grape_compile.nn.cache import StreamingCache
from grape_compile.nn.named import trainable
from grape_compile.nn.trainable import TrainableEncoding
from grape_compile.operators import attend, rotate
from grape_compile.operators.prepare import parts

Given = Mapping[str, Tensor] | None


class _Layer(nn.Module):
    """A layer of one encoding: by name (see `trainable`), an `Encoding`, or a `TrainableEncoding`."""

    #: What the parts of the encoding may be.
    kinds: tuple[type[Encoding], ...] = (Multiplicative, Bias, PathBias)

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        encoding: str | Encoding | TrainableEncoding,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and hidden_size % heads:
            raise OperandError(
                f"{heads} heads of {hidden_size} channels",
                f"{hidden_size} is no multiple of {heads}",
                "a multiple, or the size of a head as `head_dim`",
            )
        self.heads, self.head_dim = heads, head_dim or hidden_size // heads
        self.grape = trainable(encoding, hidden_size, heads, self.head_dim)
        for part in parts(self.encoding):
            if not isinstance(part, self.kinds):
                raise OperandError(
                    f"{type(self).__name__} with the encoding {self.encoding}",
                    f"the part {part}",
                    "only "
                    + " or ".join(kind.__name__ for kind in self.kinds)
                    + "; GRAPEAttention takes all of them",
                )

    @property
    def encoding(self) -> Encoding:
        """The structure of the encoding."""
        return self.grape.encoding

    def slots(
        self, hidden: Tensor | None, query: Tensor, key: Tensor, given: Given = None
    ) -> dict[str, Tensor]:
        """Return the tensors of the encoding: `given` ones, and what the parameters make of the hidden states."""
        if hidden is None and self.grape.reads_hidden:
            raise OperandError(
                f"the encoding {self.encoding}",
                "no hidden states, of which its tensors are made",
                "`hidden` [B, T, hidden_size]",
            )
        return {**self.grape(query if hidden is None else hidden, query, key), **(given or {})}


class RotaryGRAPE(_Layer):
    """Turns queries and keys: where a model calls its rotary embedding (GRAPE 3).

    >>> import torch
    >>> query, key = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 10, 16)
    >>> [each.shape[1] for each in RotaryGRAPE(64, 4)(query, key)]
    [4, 2]
    """

    kinds: tuple[type[Encoding], ...] = (Multiplicative,)

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        encoding: str | Encoding | TrainableEncoding = "grape-m",
        head_dim: int | None = None,
    ) -> None:
        super().__init__(hidden_size, heads, encoding, head_dim)

    def forward(
        self, query: Tensor, key: Tensor, hidden: Tensor | None = None, slots: Given = None
    ) -> tuple[Tensor, Tensor]:
        """Return queries [B, H, T, D] and keys [B, H_kv, T, D], turned; `slots` are those left to the caller."""
        query, key = rotate([query, key], self.encoding, self.slots(hidden, query, key, slots))
        return query, key


class AdditiveGRAPE(_Layer):
    """Attention with an additive bias: where a model calls `scaled_dot_product_attention` (GRAPE 4)."""

    kinds: tuple[type[Encoding], ...] = (Bias,)

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        encoding: str | Encoding | TrainableEncoding = "grape-a-qk",
        head_dim: int | None = None,
    ) -> None:
        super().__init__(hidden_size, heads, encoding, head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        slots: Given = None,
    ) -> Tensor:
        """Return [B, H, T, D_v] for queries [B, H, T, D], keys [B, H_kv, T, D] and values [B, H_kv, T, D_v].

        `attn_mask` is True where a key may be seen, or a float that is added; `scale` is 1/sqrt(D) by default.
        """
        filled = self.slots(hidden, query, key, slots)
        return attend(
            query, key, value, self.encoding, filled, mask=attn_mask, is_causal=is_causal, scale=scale
        )


class PathIntegralGRAPE(AdditiveGRAPE):
    """Causal attention with a bias that sums the edges between key and query (GRAPE 5)."""

    kinds: tuple[type[Encoding], ...] = (PathBias,)

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        encoding: str | Encoding | TrainableEncoding = "grape-ap",
        head_dim: int | None = None,
    ) -> None:
        super().__init__(hidden_size, heads, encoding, head_dim)


class GRAPEAttention(_Layer):
    """Self-attention with any encoding, heads in groups over fewer keys, and a cache for streaming.

    `encoding` is a name or a sum of names ("grape-m+grape-ap"), an `Encoding`, or a module made by hand. Gates read
    queries and keys as they are projected.

    >>> import torch
    >>> attention = GRAPEAttention(64, 4, "fox", key_heads=2)
    >>> attention(torch.randn(1, 10, 64)).shape
    torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        encoding: str | Encoding | TrainableEncoding = "grape-m",
        *,
        key_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, heads, encoding, head_dim)
        self.key_heads = heads if key_heads is None else key_heads
        if self.key_heads < 1 or heads % self.key_heads:
            raise OperandError(
                f"{heads} heads over {self.key_heads} key heads",
                "groups of different sizes",
                f"a divisor of {heads}",
            )
        width, narrow = heads * self.head_dim, self.key_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=bias)

    def new_cache(self) -> StreamingCache:
        """Return an empty cache for this layer."""
        return StreamingCache(self.encoding)

    def forward(
        self,
        hidden: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        scale: float | None = None,
        cache: StreamingCache | None = None,
        slots: Given = None,
    ) -> Tensor:
        """Return [B, T, hidden_size]; with a `cache` the T tokens follow those in it, and see them.

        `attn_mask` broadcasts to [B, H, T, keys]: True where a key may be seen, or a float that is added. `slots` are
        those that the encoding leaves to the caller. Raises OperandError for operands that do not fit.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.q_proj.in_features:
            raise OperandError(
                "attention over hidden states",
                f"a shape of {tuple(hidden.shape)}",
                f"[B, T, {self.q_proj.in_features}]",
            )
        query, key, value = (
            proj(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        filled = self.slots(hidden, query, key, slots)
        if cache is None:
            out = attend(
                query, key, value, self.encoding, filled, mask=attn_mask, is_causal=is_causal, scale=scale
            )
        else:
            self._check_cache(cache, is_causal)
            out = cache.attend(query, key, value, filled, mask=attn_mask, scale=scale)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result

    def _check_cache(self, cache: StreamingCache, is_causal: bool) -> None:
        if not is_causal:
            raise OperandError(
                "attention over a cache", "is_causal=False", "is_causal=True: a cache holds the past"
            )
        if cache.encoding != self.encoding:
            raise OperandError(
                f"attention with the encoding {self.encoding}",
                f"a cache of {cache.encoding}",
                "`new_cache()`",
            )
