"""`grape::logit_bias`: what an encoding and a mask add to the logits, for attention that computes the rest itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grape_compile.operators.attention import attend_call

SCHEMA = (
    "logit_bias(Tensor query, Tensor key, Tensor[] slots, str encoding, Tensor? mask=None, bool is_causal=False, "
    "int? window=None) -> Tensor"
)


def logit_bias(
    query: Tensor,
    key: Tensor,
    slots: list[Tensor],
    encoding: str,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Return bias + mask of an encoding without rotations, that broadcasts to [B, H, T_q, T_k] (GRAPE 4.2, 5.1).

    Operands are those of `attend`; of queries and keys the sizes and the dtype count. Minus infinity where a key may
    not be seen; in the compute dtype. In plain torch, so that autograd and compilers see through it.
    """
    with torch.autocast(query.device.type, enabled=False):
        call = attend_call(query, key, key, slots, encoding, mask, is_causal, None, window)
        added = call.logit_block(slice(0, query.shape[2]), slice(0, key.shape[2]))
    return query.new_zeros((1, 1, 1, 1), dtype=call.dtype) if added is None else added


_library: Any = torch.library.Library("grape", "FRAGMENT")
_library.define(SCHEMA)
_library.impl("logit_bias", logit_bias, "CompositeImplicitAutograd")
