"""The axes of tensors and angles as a kernel walks them: two of the batch, heads that share angles, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Axes:
    """Sizes and strides (in elements) of one operand: outer, inner, head, token."""

    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """Which leading axis of [..., D] is walked as what; None for an axis of size one that is not there."""

    outer: int | None
    inner: int | None
    head: int | None
    token: int | None

    def of(self, tensor: Tensor) -> Axes:
        """Return how the kernel walks a tensor [..., D]."""
        return self._walk(tensor, 0)

    def of_angles(self, operand: Tensor, rank: int, own: int) -> Axes:
        """Return how the kernel walks an operand whose axes broadcast against `rank` leading ones, `own` more behind.

        An axis of size one has stride zero: all that meet it read the same.
        """
        return self._walk(operand, rank + own - operand.dim())

    def _walk(self, operand: Tensor, missing: int) -> Axes:
        shape, steps = operand.shape, operand.stride()
        sizes, strides = [], []
        for place in (self.outer, self.inner, self.head, self.token):
            at = -1 if place is None else place - missing
            broadcast = at < 0 or shape[at] == 1
            sizes.append(1 if broadcast else shape[at])
            strides.append(0 if broadcast else steps[at])
        return Axes(
            (sizes[0], sizes[1], sizes[2], sizes[3]), (strides[0], strides[1], strides[2], strides[3])
        )


def frame_of(tensors: Sequence[Tensor], varying: Sequence[bool], token: int | None) -> Frame | str:
    """Return how to walk tensors [..., D], or a sentence where no four axes do.

    `varying` says of each leading axis whether angles differ along it; `token` names the axis of tokens where the clock
    fixes it. Else tokens are the last axis along which angles differ, and heads the last of those along which they do
    not, or the one whose size differs between the tensors. No sizes are compared that may be symbols.
    """
    first = tensors[0]
    sizes = first.shape[:-1]
    apart = [at for at, size in enumerate(sizes) if any(other.shape[at] != size for other in tensors)]
    if len(apart) > 1 or any(varying[at] for at in apart):
        return "tensors whose sizes differ along more than an axis of heads"
    if token is None:
        others = [at for at in range(len(sizes)) if at not in apart]
        token = max(others, key=lambda at: (varying[at], at), default=None)
    shared = [at for at, differs in enumerate(varying) if not differs and at != token and sizes[at] != 1]
    head = apart[0] if apart else max(shared, default=None)
    rest = [at for at, size in enumerate(sizes) if at not in (head, token) and size != 1]
    if len(rest) > 2:
        return f"{len(rest)} axes beside heads and tokens, more than two"
    outer, inner = (*rest, None, None)[:2]
    return Frame(outer, inner, head, token)
