"""Which tiles of keys matter to which tiles of queries: distance pruning with a proven bound.

A logit of a tile is at most scale * |q| |k| plus the largest bias there, by the largest norms of its queries and keys
and the intervals of its clocks and gates. The best logit of a query is at least that of its own key, -scale * |q| |k|
plus a bias of zero. Tiles whose logits are all so far below it that the keys left out together weigh less than half a
unit in the last place of float32 beside it are visited neither forward nor backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grape_compile.kernels.attention_terms import Term, Terms
from grape_compile.operators.call import AttendCall

#: Shorter sequences are walked whole: finding their reach costs more than it saves.
SHORTEST: Final = 2048
#: Tiles that are looked at along each axis; longer sequences are looked at in larger ones.
MOST: Final = 256
#: A sum rounds away what is below half of its last place, 2^-25; once more for the sum of the weights, and once for the
#: roundings of the bound itself.
ROUNDED_AWAY: Final = 27 * math.log(2)


@dataclass(frozen=True, eq=False)
class _Interval:
    """Least and largest numbers, broadcastable over [B, H, tiles of queries, tiles of keys]."""

    low: Tensor
    high: Tensor

    def plus(self, other: _Interval) -> _Interval:
        return _Interval(self.low + other.low, self.high + other.high)

    def minus(self, other: _Interval) -> _Interval:
        return _Interval(self.low - other.high, self.high - other.low)

    def times(self, other: _Interval) -> _Interval:
        ends = [one * two for one in (self.low, self.high) for two in (other.low, other.high)]
        low, high = ends[0], ends[0]
        for end in ends[1:]:
            low, high = torch.minimum(low, end), torch.maximum(high, end)
        return _Interval(low, high)


class Reach:
    """The tiles of a causal call that may matter, [B, H, tiles of queries, tiles of keys]."""

    def __init__(self, call: AttendCall, terms: Terms, query_block: int, key_block: int) -> None:
        self.call = call
        self.counts = tuple(
            -(-part.shape[2] // block) for part, block in ((call.query, query_block), (call.key, key_block))
        )
        self.times = tuple(-(-count // MOST) for count in self.counts)
        query_block, key_block = query_block * self.times[0], key_block * self.times[1]
        self.query_block, self.key_block = query_block, key_block
        query, key = (
            torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in (call.query, call.key)
        )
        key = key.repeat_interleave(call.groups, 1)
        # The queries are the last of the keys.
        own = key[..., call.offset :]
        query_norm = self._tiles(query, query_block).high[..., :, None]
        lowest = -call.scale * self._tiles(query * own, query_block).high[..., :, None]
        highest = call.scale * query_norm * self._tiles(key, key_block).high[..., None, :]
        for term in (terms.level, terms.term):
            if term is not None:
                highest = highest + self._bias(term).high
        least = math.log(call.key.shape[2]) + ROUNDED_AWAY
        self.matters = highest >= lowest - least

    def first(self) -> Tensor:
        """Return for each tile of queries the first tile of keys that matters, [B, H, tiles], int32."""
        found = self.matters.to(torch.int32).argmax(-1) * self.times[1]
        return self._spread(found, 0)

    def last(self) -> Tensor:
        """Return for each tile of keys the number behind the last tile of queries it matters to, like `first`."""
        behind = self.matters.shape[2] - self.matters.to(torch.int32).flip(2).argmax(2)
        return self._spread(torch.where(self.matters.any(2), behind, 0) * self.times[0], 1)

    def _spread(self, found: Tensor, axis: int) -> Tensor:
        """Return what was found for several tiles for each of them."""
        each = found.repeat_interleave(self.times[axis], -1)[..., : self.counts[axis]]
        return each.to(torch.int32).contiguous()

    def _bias(self, term: Term) -> _Interval:
        """Return the values of a term over tiles."""
        if term.clock is None:
            length = self.call.key.shape[2]
            clock = torch.arange(length, device=self.call.query.device, dtype=torch.float64)[None, None]
        else:
            clock = term.clock.to(torch.float64)
        by_key = _keys(self._tiles(clock, self.key_block))
        by_query = _queries(self._tiles(clock[..., self.call.offset :], self.query_block))
        apart = by_key.minus(by_query)
        if not term.is_absolute:
            # The future is hidden, but a clock may run backwards: only steps are known to be behind.
            if term.clock is None:
                apart = _Interval(apart.low.clamp(max=0), apart.high.clamp(max=0))
        else:
            nearest = torch.maximum(apart.low, -apart.high).clamp(min=0)
            apart = _Interval(torch.minimum(apart.low, -apart.high), -nearest)
        apart = _Interval(apart.low.float(), apart.high.float())
        slope = term.slopes[..., None, None]
        steep = _Interval(slope, slope)
        gates = [
            sides(self._tiles(gate, block))
            for gate, sides, block in (
                (term.gate_query, _queries, self.query_block),
                (term.gate_key, _keys, self.key_block),
            )
            if gate is not None
        ]
        if gates:
            steep = steep.times(gates[0] if len(gates) == 1 else gates[0].plus(gates[1]))
        return steep.times(apart)

    def _tiles(self, numbers: Tensor, block: int) -> _Interval:
        """Return least and largest of each tile of the last axis."""
        length = numbers.shape[-1]
        count = -(-length // block)
        index = torch.arange(count * block, device=numbers.device).clamp_(max=length - 1)
        parts = numbers[..., index].unflatten(-1, (count, block))
        return _Interval(parts.amin(-1), parts.amax(-1))


def _queries(tiles: _Interval) -> _Interval:
    return _Interval(tiles.low[..., :, None], tiles.high[..., :, None])


def _keys(tiles: _Interval) -> _Interval:
    return _Interval(tiles.low[..., None, :], tiles.high[..., None, :])


def prunes(call: AttendCall) -> bool:
    """Whether a call is worth it, and each of its queries sees its own key, where the bias is zero."""
    plain = call.is_causal and call.mask is None and call.offset >= 0
    return plain and bool(call.biases) and call.key.shape[2] >= SHORTEST
