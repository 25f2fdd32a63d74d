"""Which tiles of keys matter to which tiles of queries: segments, padding, and distance with a proven bound.

Tiles of other segments, and tiles whose keys a mask hides from all queries, have no weight. Where no mask is in the
way distance is pruned as well. A logit of a tile is at most scale * |q| |k| plus the largest bias there, by the largest
norms of its queries and keys and the intervals of its clocks and gates. The best logit of a query is at least that of
its own key, -scale * |q| |k| plus a bias of zero. Tiles whose logits are all so far below it that the keys left out
together weigh less than half a unit in the last place of float32 beside it are visited neither forward nor backward. A
soft cap makes both bounds wider than they need be.
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
    """The tiles that may matter, [1 or B, 1 or H, tiles of queries, tiles of keys]."""

    def __init__(self, call: AttendCall, terms: Terms, query_block: int, key_block: int) -> None:
        self.call = call
        self.counts = tuple(
            -(-part.shape[2] // block) for part, block in ((call.query, query_block), (call.key, key_block))
        )
        self.times = tuple(-(-count // MOST) for count in self.counts)
        query_block, key_block = query_block * self.times[0], key_block * self.times[1]
        self.query_block, self.key_block = query_block, key_block
        counts = [-(-count // times) for count, times in zip(self.counts, self.times, strict=True)]
        self.matters = torch.ones((1, 1, *counts), dtype=torch.bool, device=call.query.device)
        if _forgets(call):
            self.matters = self.matters & self._near(terms)
        if call.segments is not None:
            self.matters = self.matters & self._of_one_segment(call.segments)
        if call.mask is not None and _hides_keys(call):
            seen = call.mask.to(torch.int32).expand(*call.mask.shape[:3], call.key.shape[2])
            self.matters = self.matters & (self._tiles(seen, key_block).high > 0)

    def _near(self, terms: Terms) -> Tensor:
        """Return the tiles whose best logit is not too far below that of the queries' own keys."""
        call, query_block, key_block = self.call, self.query_block, self.key_block
        query, key = (
            torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in (call.query, call.key)
        )
        if call.turn is not None:
            query = query * call.turn.growth()
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
        return highest >= lowest - least

    def _of_one_segment(self, segments: Tensor) -> Tensor:
        """Return the tiles that may have a segment in common: all of them where segments stand in any order."""
        by_key = _keys(self._tiles(segments[:, None], self.key_block))
        by_query = _queries(self._tiles(segments[:, None, self.call.offset :], self.query_block))
        return (by_key.low <= by_query.high) & (by_query.low <= by_key.high)

    def keys(self) -> Tensor:
        """Return for each tile of queries the first tile of keys that matters, and the number behind the last.

        [B, H, tiles, 2], int32; both zero where none matters.
        """
        return self._ends(self.matters, 0)

    def queries(self) -> Tensor:
        """Return for each tile of keys the first tile of queries it matters to, and the number behind the last."""
        return self._ends(self.matters.mT, 1)

    def _ends(self, matters: Tensor, axis: int) -> Tensor:
        """Return the ends of each row, for each of the tiles that were looked at as one."""
        numbers = matters.to(torch.int32)
        behind = matters.shape[-1] - numbers.flip(-1).argmax(-1)
        ends = (
            torch.stack([numbers.argmax(-1), torch.where(matters.any(-1), behind, 0)]) * self.times[1 - axis]
        )
        each = ends.repeat_interleave(self.times[axis], -1)[..., : self.counts[axis]]
        return each.expand(2, *self.call.query.shape[:2], -1).movedim(0, -1).to(torch.int32).contiguous()

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


def leaves_out(call: AttendCall) -> bool:
    """Whether there are tiles to leave out, in a call that is long enough to look for them."""
    some = _forgets(call) or call.segments is not None or _hides_keys(call)
    return some and call.key.shape[2] >= SHORTEST


def _forgets(call: AttendCall) -> bool:
    """Whether each query sees its own key, where the bias is zero, and others may be far below."""
    return call.is_causal and call.mask is None and call.offset >= 0 and bool(call.biases)


def _hides_keys(call: AttendCall) -> bool:
    """Whether the mask hides keys from all queries of all heads."""
    mask = call.mask
    return mask is not None and mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1
