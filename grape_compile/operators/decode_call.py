"""One call of `grape::decode` with everything checked: what a provider is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.encoding import Accumulated, Encoding, Multiplicative, PathBias
from grape_compile.errors import OperandError
from grape_compile.operators.call import check_tensors
from grape_compile.operators.operands import check_device
from grape_compile.operators.prepare import parts


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """New queries [B, H, T, D], keys and values [B, H_kv, T, D] of tokens that come to `lengths` [B] in the caches.

    The caches are [B, H_kv, C, D] and [B, H_kv, C, D_v]; `encoding` turns the new tokens and biases their logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lengths: Tensor
    encoding: Encoding
    slots: Mapping[str, Tensor]
    scale: float
    window: int | None

    @property
    def count(self) -> int:
        """Number of new tokens."""
        return self.query.shape[2]


def check_decode(call: DecodeCall) -> None:
    """Raise OperandError for operands that do not fit each other."""
    check_tensors(call.query, call.key, call.value)
    check_tensors(call.query, call.key_cache, call.value_cache)
    new, kept = (
        tuple((*each.shape[:2], each.shape[3]) for each in pair)
        for pair in ((call.key, call.value), (call.key_cache, call.value_cache))
    )
    if new != kept or call.key.shape[2] != call.count:
        raise OperandError(
            "to append tokens to a cache",
            f"query {tuple(call.query.shape)}, key {tuple(call.key.shape)}, cache {tuple(call.key_cache.shape)}",
            "query [B, H, T, D], key [B, H_kv, T, D] and cache [B, H_kv, C, D], of values likewise",
        )
    check_device("lengths", call.lengths, call.query)
    if tuple(call.lengths.shape) != call.query.shape[:1] or call.lengths.dtype not in (
        torch.int32,
        torch.int64,
    ):
        raise OperandError(
            "the tokens of each sequence in a cache",
            f"lengths {call.lengths.dtype} of shape {tuple(call.lengths.shape)}",
            f"int32 or int64 of shape {(call.query.shape[0],)}",
        )
    for part in parts(call.encoding):
        if isinstance(part, PathBias) and part.turn is not None and part.turn.slots:
            raise OperandError(
                f"{part} over a cache of fixed capacity",
                f"keys of the path that turn by {', '.join(part.turn.slots)}",
                "keys that have turned before they joined the cache: turn=None",
            )
        if isinstance(part, Multiplicative) and isinstance(part.clock, Accumulated):
            raise OperandError(
                f"{part} over a cache of fixed capacity",
                "positions that are a sum over all tokens so far",
                "the sums themselves as positions, or grape_compile.nn.StreamingCache",
            )
