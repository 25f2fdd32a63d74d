"""The logit bias of an attention call: read from an encoding and its tensors, evaluated block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Distance,
    Encoding,
    Euclidean,
    Learned,
    Nope,
    Positions,
    Signed,
    Steps,
    Table,
)
from grape_compile.errors import OperandError
from grape_compile.operators.angles import accumulate, accumulate_gradient
from grape_compile.operators.constants import constant
from grape_compile.operators.operands import (
    check_broadcast,
    check_device,
    check_floating,
    check_numbers,
    compute_dtype,
)

Slots = Mapping[str, Tensor]


@dataclass(frozen=True)
class LogitBias:
    """b[t, j] = slope * distance(clock_j, clock_t), with the queries at the last keys.

    `slopes` is [1 or B, H]; `clock` is [A, 1 or B, T_k] (A axes), or None for steps, whose differences are
    formed as whole numbers. Both have the compute dtype.
    """

    slopes: Tensor
    clock: Tensor | None
    distance: Distance

    def times(self, keys: slice) -> Tensor:
        """Return the time of some keys, [A, 1 or B, n]."""
        if self.clock is not None:
            return self.clock[..., keys]
        return torch.arange(keys.start, keys.stop, dtype=self.slopes.dtype, device=self.slopes.device)[
            None, None
        ]

    def apart(self, rows: slice, keys: slice) -> Tensor:
        """Return clock_j - clock_t, [A, 1 or B, rows, keys]; `rows` are the key numbers of the queries."""
        return self.times(keys)[..., None, :] - self.times(rows)[..., :, None]

    def block(self, rows: slice, keys: slice) -> Tensor:
        """Return the bias [1 or B, H, rows, keys] of some queries (by their key numbers) and some keys."""
        return self.slopes[..., None, None] * spread(self.distance, self.apart(rows, keys)).unsqueeze(1)

    def by_key(self, keys: slice, origin: int) -> Tensor:
        """Return slope * (clock_j - clock_origin), [1 or B, H, keys]: the signed bias up to row constants."""
        since = self.times(keys) - self.times(slice(origin, origin + 1))
        return self.slopes[..., None] * since[0].unsqueeze(1)


def spread(distance: Distance, apart: Tensor) -> Tensor:
    """Return the distance of differences [A, ...]: signed, or minus their length."""
    if isinstance(distance, Signed):
        return apart[0]
    if isinstance(distance, Euclidean) and apart.shape[0] > 1:
        return -cast(Tensor, torch.linalg.vector_norm(apart, dim=0))
    return -apart[0].abs()


def spread_gradient(distance: Distance, apart: Tensor) -> Tensor:
    """Return the derivative of `spread` by each axis of the differences, [A, ...]; zero where they meet."""
    if isinstance(distance, Signed):
        return torch.ones_like(apart)
    if isinstance(distance, Euclidean) and apart.shape[0] > 1:
        length = torch.linalg.vector_norm(apart, dim=0)
        return -apart / torch.where(length == 0, 1.0, length)
    return -apart.sign()


def logit_bias(
    encoding: Encoding, slots: Slots, query: Tensor, key: Tensor, is_causal: bool
) -> LogitBias | None:
    """Return the bias of `encoding` for queries [B, H, T_q, D] and keys [B, H_kv, T_k, D]; None for `Nope`.

    Under a causal mask with steps, |j - t| is t - j, so `Absolute` becomes `Signed`. Raises OperandError for
    another encoding and for slots of the wrong shape.
    """
    if isinstance(encoding, Nope):
        return None
    if not isinstance(encoding, Bias):
        raise OperandError(
            "grape::attend",
            f"the encoding {encoding}",
            "a bias or nope; rotate queries and keys first with grape::rotate (`attend` does both)",
        )
    slopes, clock = _slopes(encoding, slots, query), _clock(encoding, slots, query, key)
    steps_behind = is_causal and isinstance(encoding.clock, Steps)
    return LogitBias(slopes, clock, Signed() if steps_behind else encoding.distance)


def slots_gradient(encoding: Bias, slots: Slots, slopes: Tensor, clock: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the slots from those of `LogitBias.slopes` [B, H] and `.clock` [A, B, T_k]."""
    gradients = {}
    if isinstance(encoding.slopes, Learned | Table):
        name = encoding.slopes.slot
        gradients[name] = slopes.sum_to_size(slots[name].shape).to(slots[name].dtype)
    if isinstance(encoding.clock, Positions | Accumulated) and slots[encoding.clock.slot].is_floating_point():
        name = encoding.clock.slot
        # One axis has no axis dimension in its slot.
        full = clock if _has_axes(encoding, slots[name]) else clock[0]
        summed = full.sum_to_size(slots[name].shape)
        gradients[name] = accumulate_gradient(encoding.clock, summed).to(slots[name].dtype)
    return gradients


def _slopes(bias: Bias, slots: Slots, query: Tensor) -> Tensor:
    batch, heads, dtype = query.shape[0], query.shape[1], compute_dtype(query)
    if isinstance(bias.slopes, Learned | Table):
        name = bias.slopes.slot
        slopes = slots[name]
        check_floating(name, slopes)
        check_device(name, slopes, query)
        check_broadcast(name, slopes.shape, (batch, heads), "[batch, heads]")
        wide = slopes.to(dtype)
    else:
        values = bias.slopes.values()
        if len(values) != heads:
            raise OperandError(
                f"the {len(values)} slopes of {bias}", f"{heads} query heads", "one slope for each head"
            )
        wide = constant(values, dtype, query)
    wide = wide.reshape((1,) * (2 - wide.dim()) + tuple(wide.shape))
    return wide.expand(wide.shape[0], heads)


def _has_axes(bias: Bias, clock: Tensor) -> bool:
    return isinstance(bias.distance, Euclidean) and clock.dim() == 3


def _clock(bias: Bias, slots: Slots, query: Tensor, key: Tensor) -> Tensor | None:
    if isinstance(bias.clock, Steps):
        return None
    assert isinstance(bias.clock, Positions | Accumulated), "a bias has no cosines and sines"
    name, batch, length = bias.clock.slot, key.shape[0], key.shape[2]
    clock = slots[name]
    check_numbers(name, clock)
    check_device(name, clock, query)
    axes = _has_axes(bias, clock)
    check_broadcast(name, clock.shape[axes:], (batch, length), "[batch, keys]")
    if query.shape[2] > length:
        raise OperandError(
            f"{name} as the time of queries and keys",
            f"{query.shape[2]} queries over {length} keys",
            "queries that are the last of the keys",
        )
    wide = accumulate(bias.clock, clock.to(compute_dtype(query)), (length,))
    lead = wide.shape[0] if axes else 1
    inner = wide.shape[1:] if axes else wide.shape
    wide = wide.reshape(lead, *(1,) * (2 - len(inner)), *inner)
    return wide.expand(lead, wide.shape[1], length)


def is_signed(bias: LogitBias | None) -> bool:
    """Return whether a bias is a function of the key plus a constant of each row (or is none at all)."""
    return bias is None or isinstance(bias.distance, Signed)
