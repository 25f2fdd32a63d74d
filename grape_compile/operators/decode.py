"""`grape::decode`: one step of decoding over a cache of fixed capacity: turn, append and attend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from grape_compile.encoding import Encoding
from grape_compile.errors import OperandError
from grape_compile.operators.decode_call import DecodeCall, check_decode
from grape_compile.operators.operands import parse_encoding, slot_list, slot_mapping
from grape_compile.operators.providers import choose_decode

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor lengths, "
    "Tensor[] slots, str encoding, float? scale=None, int? window=None) -> Tensor"
)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    encoding: Encoding,
    slots: Mapping[str, Tensor] | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Put T new tokens of each sequence into the caches and return what they see, [B, H, T, D_v].

    `query` [B, H, T, D], `key` and `value` [B, H_kv, T, ...] are those of the new tokens, which stand at numbers
    lengths[b], lengths[b] + 1, ... of the caches [B, H_kv, C, ...]; `lengths` is int32 or int64, is read on the device
    and is not changed. The rotations of `encoding` turn queries and keys on their way, by slots of the new tokens
    ([B, 1, T], tables [B, 1, T, planes]) or by steps, which are those numbers. Slots of its biases belong to the places
    of the caches: clocks [.., C], gates of keys [.., C], keys of a path [.., C, dim], of the new tokens as well; gates
    of queries [.., T], queries of a path [.., T, dim]. A sum over tokens is given as the sums so far, as positions.
    Where a kernel takes the call it is two launches, the same for all lengths. Nothing is
    differentiated. Raises OperandError for operands that do not fit.
    """
    heads = (query, key, value, key_cache, value_cache)
    if torch.is_grad_enabled() and any(each.requires_grad for each in heads):
        raise OperandError("to decode", "a tensor that requires a gradient", "attend, or torch.no_grad()")
    named = slot_list(encoding, slots or {})
    return cast(Tensor, torch.ops.grape.decode(*heads, lengths, named, str(encoding), scale, window))


def _body(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    slots: list[Tensor],
    encoding: str,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    whole = parse_encoding(encoding)
    factor = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    heads = (query, key, value, key_cache, value_cache)
    call = DecodeCall(*heads, lengths, whole, slot_mapping(whole, slots), factor, window)
    check_decode(call)
    return choose_decode(call).decode_kernel().forward(call)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    slots: list[Tensor],
    encoding: str,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_operator = torch.library.custom_op(
    "grape::decode", _body, mutates_args=("key_cache", "value_cache"), schema=SCHEMA
)
_operator.register_fake(_fake)
