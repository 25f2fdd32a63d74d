"""The definitions, written for reading: coordinate by coordinate and logit by logit.

Plain torch, differentiable by autograd, computed in the dtype of the operands: give them float64 to have the
truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    Bias,
    Clock,
    Compose,
    Encoding,
    Learned,
    Positions,
    Rotation,
    Signed,
    Slopes,
    Spectrum,
    Steps,
    Table,
    Tables,
)

Slots = Mapping[str, Tensor]


def reference_rotate(
    tensors: Sequence[Tensor], encoding: Encoding, slots: Slots | None = None
) -> tuple[Tensor, ...]:
    """Return every tensor turned by `encoding` (GRAPE 3.1), plane by plane, in the dtype of the tensor.

    Same operands and layout as `rotate`. Angles are radians, in the dtype of the tensor.
    """
    given = {} if slots is None else slots
    return tuple(_rotated(tensor, encoding, given) for tensor in tensors)


def _rotated(tensor: Tensor, encoding: Encoding, slots: Slots) -> Tensor:
    match encoding:
        case Compose(parts):
            for part in parts:
                tensor = tensor if isinstance(part, Bias) else _rotated(tensor, part, slots)
            return tensor
        case Rotation():
            return _planes_turned(tensor, encoding, slots)
        case _:
            return tensor.clone()


def _planes_turned(tensor: Tensor, rotation: Rotation, slots: Slots) -> Tensor:
    cos, sin = _cos_sin(tensor, rotation, slots)
    source = tensor if rotation.basis is None else tensor @ slots[rotation.basis].to(tensor.dtype)
    pairs, targets = rotation.planes.pairs(), rotation.output.pairs()
    columns: list[Tensor | None] = [None] * rotation.head_dim
    for j, ((i0, i1), (o0, o1)) in enumerate(zip(pairs, targets, strict=True)):
        c, s = cos[..., j] * rotation.scale, sin[..., j] * rotation.scale
        columns[o0] = c * source[..., i0] - s * source[..., i1]
        columns[o1] = s * source[..., i0] + c * source[..., i1]
    outside = iter(
        sorted(set(range(rotation.head_dim)) - {coordinate for pair in pairs for coordinate in pair})
    )
    filled = [source[..., next(outside)] if column is None else column for column in columns]
    return torch.stack(torch.broadcast_tensors(*filled), -1)


def _cos_sin(tensor: Tensor, rotation: Rotation, slots: Slots) -> tuple[Tensor, Tensor]:
    if isinstance(rotation.clock, Tables):
        cos, sin = slots[rotation.clock.cos].to(tensor.dtype), slots[rotation.clock.sin].to(tensor.dtype)
        return cos, rotation.orientation * sin
    theta = _frequencies(rotation.spectrum, rotation.planes.count, tensor, slots)
    several = rotation.planes.axis_count > 1
    clock = _clock(rotation.clock, tensor.shape[-2] if tensor.dim() > 1 else 1, tensor, slots)
    times = [clock[axis] if several else clock for axis in rotation.planes.axes()]
    angles = rotation.orientation * torch.stack(times, -1) * theta
    return angles.cos(), angles.sin()


def _frequencies(spectrum: Spectrum | None, count: int, like: Tensor, slots: Slots) -> Tensor:
    if isinstance(spectrum, Learned | Table):
        return slots[spectrum.slot].to(like.dtype)
    assert spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
    return torch.tensor(spectrum.frequencies(count), dtype=like.dtype, device=like.device)


def _clock(clock: Clock, length: int, like: Tensor, slots: Slots) -> Tensor:
    match clock:
        case Positions(slot):
            return slots[slot].to(like.dtype)
        case Accumulated(slot, inclusive):
            rates = slots[slot].to(like.dtype)
            return rates.cumsum(-1) if inclusive else rates.cumsum(-1) - rates
        case _:
            return torch.arange(length, dtype=like.dtype, device=like.device)


def reference_bias(encoding: Encoding, slots: Slots, query_length: int, keys: Tensor) -> Tensor:
    """Return the logit bias [B or 1, H, T_q, T_k] of `encoding` (GRAPE 4.2), for `keys` [B, H, T_k, D].

    b[t, j] = slope * (clock_j - clock_t), or minus slope times the distance; the queries are the last T_q
    keys.
    """
    if isinstance(encoding, Compose):
        total = keys.new_zeros(())
        for part in encoding.parts:
            total = total + reference_bias(part, slots, query_length, keys)
        return total
    if not isinstance(encoding, Bias):
        return keys.new_zeros(())
    slopes = _slopes(encoding.slopes, keys, slots)[..., None, None]
    length = keys.shape[-2]
    clock = _clock(encoding.clock, length, keys, slots)
    if clock.dim() == 1:
        clock = clock.unsqueeze(0)
    if isinstance(encoding.clock, Steps):
        rows = torch.arange(length - query_length, length, dtype=keys.dtype, device=keys.device)[None]
    else:
        rows = clock[..., length - query_length :]
    # [B or 1, 1, T_q, T_k], with the axes in front where the distance is Euclidean and has several.
    apart = clock[..., None, None, :] - rows[..., None, :, None]
    if isinstance(encoding.distance, Signed):
        return slopes * apart
    if isinstance(encoding.distance, Absolute) or apart.dim() == 4:
        return -slopes * apart.abs()
    return -slopes * cast(Tensor, torch.linalg.vector_norm(apart, dim=0))


def _slopes(slopes: Slopes, like: Tensor, slots: Slots) -> Tensor:
    if isinstance(slopes, Learned | Table):
        return slots[slopes.slot].to(like.dtype)
    return torch.tensor(slopes.values(), dtype=like.dtype, device=like.device)


def reference_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoding: Encoding,
    slots: Slots | None = None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return softmax(q k^T scale + bias + mask) v with all logits in memory (GRAPE 4.2); see `attend`."""
    given = {} if slots is None else slots
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, keys = _turned_pair(query, keys, encoding, given)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query @ keys.mT) * factor + reference_bias(encoding, given, query.shape[2], keys)
    hidden = _hidden(query.shape[2], key.shape[2], is_causal, window, query.device)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        logits = logits + mask.to(logits.dtype)
    logits = logits.masked_fill(hidden, -math.inf)
    # A row without any key would be nan; it is zero by definition.
    weights = torch.where(logits.isneginf().all(-1, keepdim=True), 0.0, logits).softmax(-1)
    return weights.masked_fill(logits.isneginf(), 0.0) @ values


def _turned_pair(query: Tensor, key: Tensor, encoding: Encoding, slots: Slots) -> tuple[Tensor, Tensor]:
    """Turn queries and keys of one sequence whose last tokens are the queries."""
    length = key.shape[-2]
    padding = query.new_zeros(*query.shape[:2], max(length - query.shape[-2], 0), query.shape[-1])
    turned_query, turned_key = reference_rotate([torch.cat([padding, query], -2), key], encoding, slots)
    return turned_query[..., padding.shape[-2] :, :], turned_key


def _hidden(queries: int, keys: int, is_causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Return True where query t may not see key j: the future, and what is `window` or more tokens behind."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if is_causal:
        hidden = hidden | (behind < 0)
    if window is not None:
        hidden = hidden | (behind >= window)
    return hidden
