"""The additive biases of an attention call (GRAPE 4): their tensors, evaluated block by block.

A bias knows two forms of itself, and every gradient is the derivative of one of them: `block`, its values for some
queries and keys, and, where it is signed, `factors`: sums of products of a number of the query and a number of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from grape_compile.encoding import Distance, Euclidean, Signed


def pull(form: Callable[..., Any], tensors: Sequence[Tensor], cotangents: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `tensors` for cotangents of what `form` makes of them.

    By `torch.func`: the bodies of operators run below autograd, where nothing is recorded.
    """
    if not tensors:
        return ()
    back = torch.func.vjp(form, *tensors)[1]
    return tuple(back(cotangents))


@dataclass(frozen=True, eq=False)
class Leaves:
    """A value with tensors in its fields; None where there is none. `constants` are the fields no slot is behind."""

    constants: tuple[str, ...] = field(default=(), kw_only=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the floating tensors made of slots, which may have gradients, by the names of their fields."""
        found = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in self.constants
        }
        return {
            name: value
            for name, value in found.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    def holding(self, tensors: Sequence[Tensor]) -> Self:
        """Return the same with other tensors, in the order of `tensors()`."""
        values: dict[str, Any] = dict(zip(self.tensors(), tensors, strict=True))
        return replace(self, **values)

    def pull(self, form: Callable[[Self], Any], cotangents: Any) -> tuple[Tensor, ...]:
        """Return the gradients of the tensors for cotangents of what `form` makes of them."""
        return pull(lambda *tensors: form(self.holding(tensors)), tuple(self.tensors().values()), cotangents)


@dataclass(frozen=True, eq=False)
class Factor:
    """A number for each key, [1 or B, 1 or H, keys], times one for each query; None: times one."""

    by_query: Tensor | None
    by_key: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """A bias as the sum of `parts`, less `shift` [1 or B, 1 or H, rows], a constant of each row."""

    parts: tuple[Factor, ...]
    shift: Tensor


@dataclass(frozen=True, eq=False)
class Additive(Leaves):
    """b[t, j] = slope * gate[t, j] * distance(clock_j, clock_t), queries being the last keys (GRAPE 4.2, 4.6).

    `slopes` [1 or B, 1 or H], gates [1 or B, 1 or H, T_q] and [.., T_k] have the compute dtype. `clock` is
    [A, 1 or B, 1 or H, T_k] for A axes, in float64 where it was summed and in int64 where it counts, or None for steps.
    Times count from the first query of a block; they are rounded to the compute dtype after that.
    """

    distance: Distance
    slopes: Tensor
    clock: Tensor | None = None
    gate_query: Tensor | None = None
    gate_key: Tensor | None = None

    @property
    def is_signed(self) -> bool:
        """Whether the bias is a sum of factors."""
        return isinstance(self.distance, Signed)

    @property
    def is_clocked(self) -> bool:
        """Whether the only gradient of the signed bias is that of its clock.

        It is the slope times the sums of the logits' gradients over the keys and over the queries: no time is in it.
        """
        return self.is_signed and set(self.tensors()) <= {"clock"}

    @property
    def product_count(self) -> int:
        """How many of its factors need a number of the query."""
        return (self.gate_query is not None) + (self.gate_key is not None)

    def since(self, keys: slice, origin: int) -> Tensor:
        """Return clock_j - clock_origin, [A, 1 or B, 1 or H, keys]."""
        if self.clock is not None:
            return (self.clock[..., keys] - self.clock.narrow(-1, origin, 1)).to(self.slopes.dtype)
        numbers = torch.arange(
            keys.start - origin, keys.stop - origin, dtype=self.slopes.dtype, device=self.slopes.device
        )
        return numbers[None, None, None]

    def apart(self, at: slice, keys: slice) -> Tensor:
        """Return clock_j - clock_t, [A, 1 or B, 1 or H, rows, keys]; `at` are the key numbers of the queries."""
        # A sum of two small negations, so that its derivative has no large one.
        return self.since(keys, at.start)[..., None, :] + (-self.since(at, at.start))[..., :, None]

    def block(self, rows: slice, keys: slice, offset: int) -> Tensor:
        """Return the bias [1 or B, 1 or H, rows, keys]; query t stands at key number t + `offset`."""
        apart = self.apart(slice(rows.start + offset, rows.stop + offset), keys)
        steep = self.slopes[..., None, None]
        sides: list[Tensor] = []
        if self.gate_query is not None:
            sides.append(steep * self.gate_query[..., rows, None])
        if self.gate_key is not None:
            sides.append(steep * self.gate_key[..., None, keys])
        if sides:
            steep = sides[0] if len(sides) == 1 else sides[0] + sides[1]
        return steep * spread(self.distance, apart)

    def factors(self, rows: slice, keys: slice, offset: int) -> Factors:
        """Return the signed bias as factors; times count from the first query, which keeps their products small.

        (lam_q[t] + lam_k[j]) (c_j - c_t) = lam_q[t] c_j + lam_k[j] c_j - c_t lam_k[j] - lam_q[t] c_t.
        """
        origin = max(rows.start + offset, 0)
        slope = self.slopes[..., None]
        key_time = self.since(keys, origin)[0]
        query_time = self.since(slice(rows.start + offset, rows.stop + offset), origin)[0]
        if self.gate_query is None and self.gate_key is None:
            return Factors((Factor(None, slope * key_time),), slope * query_time)
        parts: list[Factor] = []
        shift = torch.zeros_like(query_time)
        if self.gate_query is not None:
            gate = self.gate_query[..., rows]
            parts.append(Factor(gate, slope * key_time))
            shift = slope * gate * query_time
        if self.gate_key is not None:
            by_key = slope * self.gate_key[..., keys]
            parts += [Factor(None, by_key * key_time), Factor(-query_time, by_key)]
        return Factors(tuple(parts), shift)


def spread(distance: Distance, apart: Tensor) -> Tensor:
    """Return the distance of differences [A, ...]: signed, or minus their length."""
    if isinstance(distance, Signed):
        return apart[0]
    if isinstance(distance, Euclidean) and apart.shape[0] > 1:
        # The norm has no derivative where two points meet; there it is zero.
        square = apart.square().sum(0)
        return -torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
    return -apart[0].abs()
