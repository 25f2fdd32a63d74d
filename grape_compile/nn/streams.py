"""Keep what an upgraded layer has to remember of the tokens so far in the cache that its model keeps keys in.

A model's cache is any object with a list of `layers`, each of which appends tokens to those it has (`update`), as in
transformers. What is kept is one more such layer behind the model's own: whatever reorders, crops or selects the
cache reaches it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stream:
    """One layer of a cache: `entry` its number, `own` that of the layer with the keys it goes with, or None."""

    cache: Any
    entry: int
    own: int | None

    @property
    def _layer(self) -> Any:
        layers = self.cache.layers
        while len(layers) <= self.entry:
            layers.append(self._like_own())
        return layers[self.entry]

    def _like_own(self) -> Any:
        """A new layer that keeps and forgets tokens as the one with the keys does."""
        layers = self.cache.layers
        if self.own is None or self.own >= len(layers):
            return self.cache.layer_class_to_replicate()
        own = layers[self.own]
        sizes = {
            name: getattr(own, name) for name in ("max_cache_len", "sliding_window") if hasattr(own, name)
        }
        if "max_cache_len" in sizes and own.is_initialized:
            # As many as there are: torch.compile takes this size for a number that may change, the other one not.
            sizes["max_cache_len"] = own.keys.shape[2]
        if "max_cache_len" in sizes and own.is_sliding:
            sizes["sliding_window"] = sizes["max_cache_len"]
        made = type(own)(**sizes)
        if getattr(own, "record_past", False):
            made.activate_past_recording()
        return made

    @property
    def grows(self) -> bool:
        """Whether new tokens stand behind all others: not where room was made for them beforehand."""
        layers, own = self.cache.layers, self.own
        # Layers that a cache adds as it needs them grow.
        return own is None or own >= len(layers) or not hasattr(layers[own], "max_cache_len")

    def ends_with(self, new: Tensor) -> bool:
        """Whether the keys that a layer reads end with those of its hidden states `new`, [B, T, C].

        Not where there is room behind them. A window of fixed size has none once it is full: its first tokens make way.
        """
        if self.grows:
            return True
        own = self.cache.layers[self.own]
        return bool(own.is_sliding and own.get_seq_length() + new.shape[1] > own.max_cache_len)

    def tokens(self, new: Tensor) -> Tensor:
        """Number of tokens of a layer with room, once it has the keys of the hidden states `new`, [B, T, C]."""
        own = self.cache.layers[self.own]
        # A window counts in whole numbers too, which a CUDA graph would keep.
        before = own.cumulative_length if own.is_initialized else 0
        tokens: Tensor = torch.full((), new.shape[1], dtype=torch.int64, device=new.device) + before
        return tokens

    def length(self) -> Any:
        """Number of tokens so far: a whole number, or a tensor of one."""
        return self._layer.get_seq_length()

    def last(self) -> Tensor | None:
        """What was kept of the last token, [B, H, 1, C]; None before the first."""
        layer = self._layer
        if not layer.is_initialized or not layer.keys.numel():
            return None
        keys: Tensor = layer.keys
        if self.grows or (layer.is_sliding and layer.get_seq_length() >= layer.max_cache_len):
            return keys[:, :, -1:]
        length = layer.cumulative_length
        last: Tensor = keys.index_select(2, (length - 1).clamp(min=0).reshape(1)) * (length > 0)
        return last

    def append(self, new: Tensor) -> Tensor:
        """Keep [B, H, T, C] of new tokens; return what is kept of all that the keys of the layer are of."""
        whole: Tensor = self._layer.update(new, new[..., :0])[0]
        return whole


def cache_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a layer, or None."""
    for value in (*args, *kwargs.values()):
        own = getattr(value, "self_attention_cache", value)
        if isinstance(getattr(own, "layers", None), list) and callable(getattr(own, "update", None)):
            return own
    return None
