"""The biases of an attention call as its kernels read them, and their gradients from the sums the kernels return.

Two terms, each slope * gate * spread(clock_j - clock_t): the *level*, signed and without a gate, and one more of any
kind. Several signed biases without gates are one level, the sum of their slopes times their clocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import Absolute, Euclidean, Signed
from grape_compile.kernels.pointers import NONE
from grape_compile.operators.bias import Additive
from grape_compile.operators.call import AttendCall

STEPS: Final = 1
CLOCK: Final = 2
HALVES: Final = 1
NEIGHBOURS: Final = 2
LOG2E: Final = math.log2(math.e)


@dataclass(frozen=True)
class BiasKind:
    """What the terms of a call are, a constant for the kernels: what each counts, the gates and sign of the second."""

    level: int = NONE
    term: int = NONE
    gate_query: bool = False
    gate_key: bool = False
    absolute: bool = False


@dataclass(frozen=True)
class SightKind:
    """What hides keys in a call, a constant for the kernels; `masked` is NONE, BYTES or NUMBERS."""

    causal: bool = False
    window: bool = False
    masked: int = NONE
    segmented: bool = False


@dataclass(frozen=True, eq=False)
class Term:
    """slope [1 or B, 1 or H] times gates [1 or B, 1 or H, T] times the spread of a clock [1 or B, 1 or H, T_k]."""

    slopes: Tensor
    clock: Tensor | None = None
    gate_query: Tensor | None = None
    gate_key: Tensor | None = None
    is_absolute: bool = False

    @property
    def kind(self) -> int:
        """What the kernels are told of the clock."""
        return STEPS if self.clock is None else CLOCK


def unfit(call: AttendCall) -> str | None:
    """Return why the biases of a call are not two terms, or None."""
    biases = [bias for bias in call.biases if isinstance(bias, Additive)]
    if len(biases) < len(call.biases):
        return "a path bias is no sum of terms"
    levels, others = _sorted(biases)
    if len(others) > 1:
        return f"{len(others)} biases with gates or distances without a sign, more than one"
    if any(isinstance(bias.distance, Euclidean) and _axes(bias) > 1 for bias in others):
        return "the length of differences over several axes"
    if len(levels) > 1 and call.wants_bias_gradients and any("slopes" in bias.tensors() for bias in levels):
        return "learned slopes of several biases that are summed before the kernel"
    return None


def _sorted(biases: Sequence[Additive]) -> tuple[list[Additive], list[Additive]]:
    """Part the biases into those of the level and the others."""
    levels = [bias for bias in biases if isinstance(bias.distance, Signed) and not bias.product_count]
    return levels, [bias for bias in biases if bias not in levels]


def _axes(bias: Additive) -> int:
    return 1 if bias.clock is None else bias.clock.shape[0]


class Terms:
    """The level and the other term of a call; None where there is none."""

    def __init__(self, call: AttendCall) -> None:
        self.call = call
        self.biases = [bias for bias in call.biases if isinstance(bias, Additive)]
        self.levels, others = _sorted(self.biases)
        self.level = None if not self.levels else _level(self.levels, call.key.shape[2])
        self.term = None if not others else _term(others[0])
        self.other = others[0] if others else None

    @property
    def kind(self) -> BiasKind:
        """What the kernels are told of the terms."""
        level, term = self.level, self.term
        return BiasKind(
            NONE if level is None else level.kind,
            NONE if term is None else term.kind,
            term is not None and term.gate_query is not None,
            term is not None and term.gate_key is not None,
            term is not None and term.is_absolute,
        )

    @cached_property
    def slopes(self) -> Tensor:
        """Slopes of level and term, [B, H, 2]."""
        batch, heads = self.call.query.shape[:2]
        slopes = self.call.query.new_zeros((batch, heads, 2), dtype=torch.float32)
        for at, term in enumerate((self.level, self.term)):
            if term is not None:
                slopes[..., at] = term.slopes
        return slopes

    @cached_property
    def gates(self) -> Tensor | None:
        """Gates of the queries, [1 or B, 1 or H, T_q]."""
        return (
            None if self.term is None or self.term.gate_query is None else self.term.gate_query.contiguous()
        )

    def columns(self, block: int) -> Tensor | None:
        """Return what is read for each key, [1 or B, 1 or H, vectors, T_k padded], for tiles of `block` keys, or None.

        For each clock its rounding to float32, what that left out, and its distance to the clock just behind the key's
        tile; the slopes times gates of the keys; last, what the biases add to all logits of a key: its distances times
        slopes and gates. The last two as powers of two. None where all of it is slopes times steps.
        """
        level, term = self.level, self.term
        clocks = [each.clock for each in (level, term) if each is not None and each.clock is not None]
        if not clocks and (term is None or term.gate_key is None):
            return None
        found = [vector for clock in clocks for vector in _in_three(clock, block)]
        by_key: Tensor | None = None
        for each in (level, term):
            if each is None or (each.gate_query is not None and each.gate_key is None):
                continue
            steep = each.slopes[..., None].double() * LOG2E
            if each.gate_key is not None:
                steep = steep * each.gate_key
                found.append(steep)
            part = steep * self._distance(each, block)
            by_key = part if by_key is None else by_key + part
        found.append(found[0] if by_key is None else by_key)
        *lead, length = torch.broadcast_shapes(*(vector.shape for vector in found))
        padded = -(-length // block) * block
        columns = found[0].new_zeros((*lead, len(found), padded), dtype=torch.float32)
        for at, vector in enumerate(found):
            columns[..., at, :length] = vector
        return columns

    def _distance(self, term: Term, block: int) -> Tensor:
        """Return clock_j less the clock just behind the key's tile."""
        if term.clock is not None:
            return _apart(term.clock, block)
        numbers = torch.arange(self.call.key.shape[2], device=term.slopes.device)
        return numbers % block - block

    @property
    def wants_apart(self) -> bool:
        """Whether the slope of the level is learned: a sum of logit gradients times differences of the clock."""
        return any("slopes" in bias.tensors() for bias in self.levels)

    @property
    def wants_level(self) -> bool:
        """Whether the clock of the level is learned."""
        return any("clock" in bias.tensors() for bias in self.levels)

    @property
    def wants_query(self) -> bool:
        """Whether the slope of the term or its gate of the query is learned."""
        return self.other is not None and bool({"slopes", "gate_query"} & set(self.other.tensors()))

    @property
    def wants_key(self) -> bool:
        """Whether the gate of the key is learned."""
        return self.other is not None and "gate_key" in self.other.tensors()

    @property
    def wants_clock(self) -> bool:
        """Whether the clock of the term is learned."""
        return self.other is not None and "clock" in self.other.tensors()

    def gradients(
        self, rows: Sequence[Tensor | None], columns: Sequence[Tensor | None], left: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Return the gradients of the biases' tensors from sums over rows [B, H, T_q] and columns [B, H, T_k].

        `rows`: logit gradients times the differences of the level; times the spread of the term; times the
        derivative of the term by its differences. `columns`: logit gradients; those times the spread of the term; times
        the derivative of the term by its differences. `left` [B, H, T_q] is the sum of a query's logit gradients, None
        where it is zero.
        """
        return tuple(
            self._level_gradients(bias, rows[0], columns[0], left)
            if bias is not self.other
            else self._term_gradients(bias, rows[1:], columns[1:])
            for bias in self.biases
        )

    def _level_gradients(
        self, bias: Additive, apart: Tensor | None, sums: Tensor | None, left: Tensor | None
    ) -> tuple[Tensor, ...]:
        found = {}
        for name, tensor in bias.tensors().items():
            if name == "slopes":
                assert apart is not None, "asked for"
                found[name] = apart.sum(-1).sum_to_size(tensor.shape)
            else:
                # Where the logit gradients of a query sum to zero the clocks of queries have no part.
                assert sums is not None, "asked for"
                whole = sums
                if left is not None:
                    whole = sums.clone()
                    whole[..., self.call.offset :] -= left
                found[name] = _as_clock(whole * bias.slopes[..., None], tensor)
        return tuple(found.values())

    def _term_gradients(
        self, bias: Additive, rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        found = {}
        for name, tensor in bias.tensors().items():
            if name == "slopes":
                total = torch.zeros((), dtype=bias.slopes.dtype, device=bias.slopes.device)
                if rows[0] is not None and (bias.gate_query is not None or bias.gate_key is None):
                    by_query = rows[0] if bias.gate_query is None else rows[0] * bias.gate_query
                    total = total + by_query.sum(-1)
                if bias.gate_key is not None:
                    assert columns[0] is not None, "asked for"
                    total = total + (columns[0] * bias.gate_key).sum(-1)
                found[name] = total.sum_to_size(tensor.shape)
            elif name == "clock":
                row, column = rows[1], columns[1]
                assert row is not None, "asked for"
                assert column is not None, "asked for"
                whole = column.clone()
                whole[..., self.call.offset :] -= row
                found[name] = _as_clock(whole, tensor)
            else:
                by_token = rows[0] if name == "gate_query" else columns[0]
                assert by_token is not None, "asked for"
                found[name] = (by_token * bias.slopes[..., None]).sum_to_size(tensor.shape)
        return tuple(found.values())


def _level(biases: Sequence[Additive], length: int) -> Term:
    if len(biases) == 1:
        return Term(biases[0].slopes, _clock(biases[0]))
    total: Tensor | None = None
    for bias in biases:
        clock = _clock(bias)
        if clock is None:
            clock = torch.arange(length, device=bias.slopes.device)
        part = bias.slopes[..., None].double() * clock
        total = part if total is None else total + part
    return Term(torch.ones_like(biases[0].slopes), total)


def _term(bias: Additive) -> Term:
    return Term(
        bias.slopes,
        _clock(bias),
        bias.gate_query,
        bias.gate_key,
        isinstance(bias.distance, Absolute | Euclidean),
    )


def _clock(bias: Additive) -> Tensor | None:
    return None if bias.clock is None else bias.clock[0]


def _in_three(clock: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a clock rounded, what the rounding left out, and its distance to the clock behind its tile of keys."""
    high = clock.to(torch.float32)
    return high, clock - high.to(clock.dtype), _apart(clock, block)


def _apart(clock: Tensor, block: int) -> Tensor:
    """Return a clock less the clock just behind its tile of keys, or the last where there is none."""
    length = clock.shape[-1]
    places = torch.arange(length, device=clock.device)
    origins = ((places // block + 1) * block).clamp_(max=length - 1)
    return clock - clock[..., origins]


def _as_clock(gradient: Tensor, clock: Tensor) -> Tensor:
    """Sum a gradient [B, H, T_k] to the shape of a clock [1, 1 or B, 1 or H, T_k]."""
    return gradient.sum_to_size(clock.shape[1:])[None].to(clock.dtype)
