"""Rotations that leave all but a few directions alone: y = x + M(x F) F^T, at a cost of O(rank d) per token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_compile.errors import OperandError
from grape_compile.operators.action import Action, Slots
from grape_compile.operators.angles import check_clock, clock_values
from grape_compile.operators.operands import check_broadcast, check_device, check_floating, compute_dtype


@dataclass(frozen=True)
class Update:
    """G - I as F M F^T, in the compute dtype.

    `frame` is F [..., head_dim, 2 planes]: the first vectors of all planes, then the second. `entries` are those
    of the 2 x 2 blocks of M, row by row, each [..., T, planes].
    """

    frame: Tensor
    entries: tuple[Tensor, Tensor, Tensor, Tensor]


class LowRank(Action):
    """An orthogonal G that differs from the identity by a product of thin matrices."""

    @abstractmethod
    def prepare(self, slots: Slots, tensor: Tensor) -> Update:
        """Return G - I for the tokens of `tensor`."""

    def act(self, prepared: Update, slots: Slots, tensor: Tensor) -> Tensor:
        dtype, frame = compute_dtype(tensor), prepared.frame
        wide, planes = tensor.to(dtype), prepared.frame.shape[-1] // 2
        (m00, m01, m10, m11) = prepared.entries
        with torch.autocast(tensor.device.type, enabled=False):
            inner = wide @ frame
            first, second = inner[..., :planes], inner[..., planes:]
            moved = torch.cat([m00 * first + m01 * second, m10 * first + m11 * second], -1)
            return (wide + moved @ frame.mT).to(tensor.dtype)

    def times(self, slots: Slots, tensor: Tensor) -> Tensor:
        """Return the time of every token, [..., 1], in float64."""
        return clock_values(self.clock, (0,), slots, tensor, torch.float64)

    def check_time(self, slots: Slots, tensor: Tensor) -> None:
        """Raise OperandError unless tensor and clock run over tokens."""
        if tensor.dim() < 2:
            raise OperandError(
                f"{self.encoding} of a tensor", f"shape {tuple(tensor.shape)}", "a tensor [..., T, head_dim]"
            )
        check_clock(self.clock, 1, slots, tensor)


def check_matrix(
    name: str,
    matrix: Tensor,
    tensor: Tensor,
    sizes: Sequence[int | None],
    meaning: str,
    *,
    may_be_vector: bool = False,
) -> None:
    """Raise OperandError unless `matrix` is [..., *sizes] (None: any size) and leads like [*tensor.shape[:-2]].

    `may_be_vector` takes one axis as that of a single row.
    """
    check_floating(name, matrix)
    check_device(name, matrix, tensor)
    shape = (1, *matrix.shape) if may_be_vector and matrix.dim() == 1 else tuple(matrix.shape)
    if len(shape) < 2 or any(want not in (None, have) for want, have in zip(sizes, shape[-2:], strict=True)):
        raise OperandError(f"{name} as {meaning}", f"{name} has shape {tuple(matrix.shape)}", meaning)
    check_broadcast(name, shape[:-2], tensor.shape[:-2], "tensor.shape[:-2]")
