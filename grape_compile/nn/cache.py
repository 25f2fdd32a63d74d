"""The streaming cache of one attention layer: what an encoding has to remember of the tokens so far (GRAPE 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Compose,
    Encoding,
    Euclidean,
    Multiplicative,
    Nope,
    PathBias,
    Positions,
    Steps,
)
from grape_compile.errors import OperandError
from grape_compile.operators import attend, rotate
from grape_compile.operators.angles import accumulate
from grape_compile.operators.operands import slot_list
from grape_compile.operators.prepare import by_root_mean_square, parts

Slots = dict[str, Tensor]


@dataclass
class _Kept:
    """A tensor with one entry for each token so far, and which of its axes are tokens and batch."""

    tensor: Tensor
    token_axis: int
    batch_axis: int


class StreamingCache:
    """Remembers keys, values and what else the attention of one layer needs under one encoding.

    A key is turned once, when it arrives, and never touched again; of a running sum the sums are kept (in
    float64), of a gate the numbers of the keys, of a path its turned edges R_l r_l. Feeding tokens in pieces
    of any size gives what `attend(..., is_causal=True)` gives for all of them at once.

    >>> from grape_compile.encoding import alibi
    >>> cache = StreamingCache(alibi(2))
    >>> token = torch.ones(1, 2, 1, 4)
    >>> cache.attend(token, token, token).shape, cache.length
    (torch.Size([1, 2, 1, 4]), 1)
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self._kept: dict[str, _Kept] = {}

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        keys = self._kept.get("key")
        return 0 if keys is None else keys.tensor.shape[-2]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Mapping[str, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Append new tokens and return what they see: causal attention [B, H, T, D_v] over everything so far.

        `query` [B, H, T, D], `key` and `value` [B, H_kv, T, D] and the slots that run along the sequence hold the T new
        tokens alone; slopes, spectra and bases are given anew each time. `mask` covers all keys, [.., T, length + T].
        Raises OperandError for operands that do not fit; the cache is then as it was.
        """
        given = dict(zip(self.encoding.slots, slot_list(self.encoding, slots or {}), strict=True))
        count = key.shape[-2] if key.dim() == 4 else 0
        if query.dim() != 4 or key.dim() != 4 or query.shape[-2] != count:
            raise OperandError(
                "to append tokens to a cache",
                f"query {tuple(query.shape)}, key {tuple(key.shape)}",
                "query [B, H, T, D] and key [B, H_kv, T, D] of the same T new tokens",
            )
        before = dict(self._kept)
        try:
            return self._attend(query, key, value, given, {"mask": mask, "scale": scale, "window": window})
        except Exception:
            self._kept = before
            raise

    def crop(self, length: int) -> None:
        """Forget all tokens from number `length` on; a longer length changes nothing.

        Raises OperandError for a negative length.
        """
        if length < 0:
            raise OperandError("to crop a cache", f"length {length}", "a number of tokens to keep, 0 or more")
        if length == 0:
            self._kept = {}
        for kept in self._kept.values():
            size = kept.tensor.shape[kept.token_axis]
            kept.tensor = kept.tensor.narrow(kept.token_axis, 0, min(length, size))

    def reorder(self, beams: Tensor) -> None:
        """Let row b of the batch go on from row beams[b]; what all rows share stays."""
        for kept in self._kept.values():
            if kept.tensor.shape[kept.batch_axis] > 1:
                kept.tensor = kept.tensor.index_select(kept.batch_axis, beams.to(kept.tensor.device))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, slots: Slots, options: dict[str, Any]
    ) -> Tensor:
        count = key.shape[-2]
        biases: list[Encoding] = []
        filled: Slots = {}
        for number, part in enumerate(parts(self.encoding)):
            name = str(number)
            if isinstance(part, Multiplicative):
                turning, own = self._turning(part, slots, name, key)
                query, key = rotate([query, key], turning, own)
                continue
            if isinstance(part, PathBias):
                found, tensors = self._path(part, slots, name)
            else:
                assert isinstance(part, Bias), "an encoding turns or adds"
                found, tensors = self._bias(part, slots, name, count)
            biases.append(found)
            filled |= tensors
        keys, values = self._append("key", key, -2, 0), self._append("value", value, -2, 0)
        encoding = Compose(tuple(biases)) if biases else Nope()
        return attend(query, keys, values, encoding, filled, is_causal=True, **options)

    def _append(self, name: str, tensor: Tensor, token_axis: int, batch_axis: int) -> Tensor:
        """Add new entries behind those of a name, and return all."""
        held = self._kept.get(name)
        axis = token_axis % tensor.dim()
        whole = tensor if held is None else torch.cat([held.tensor, tensor], axis)
        self._kept[name] = _Kept(whole, axis, batch_axis)
        return whole

    def _sums(self, clock: Accumulated, rates: Tensor, name: str, count: int, batch_axis: int) -> Tensor:
        """Return the sums of all tokens so far in float64, inclusive or exclusive as the clock has them."""
        held = self._kept.get(name)
        new = accumulate(Accumulated(clock.slot, True), rates.to(torch.float64), (count,))
        if held is not None and held.tensor.shape[-1]:
            new = new + held.tensor[..., -1:]
        sums = self._append(name, new, -1, batch_axis)
        return sums if clock.inclusive else torch.nn.functional.pad(sums[..., :-1], (1, 0))

    def _turning(
        self, part: Multiplicative, slots: Slots, name: str, tokens: Tensor
    ) -> tuple[Encoding, Slots]:
        """Return a rotation for the new tokens [..., T, D] alone, and its slots."""
        own = {slot: slots[slot] for slot in part.slots}
        clock, count = part.clock, tokens.shape[-2]
        if isinstance(clock, Steps):
            times = torch.arange(self.length, self.length + count, device=tokens.device)
            return part.by(Positions("steps")), {**own, "steps": times}
        if not isinstance(clock, Accumulated):
            return part, own
        rates = own[clock.slot]
        sums = self._sums(clock, rates, f"{name}.sums", count, max(rates.dim() - 3, 0))[..., -count:]
        # The rates whose inclusive sums are these: the first one holds all that was.
        steps = torch.cat([sums[..., :1], sums.diff(dim=-1)], -1)
        return part.by(Accumulated(clock.slot, True)), {**own, clock.slot: steps}

    def _bias(self, bias: Bias, slots: Slots, name: str, count: int) -> tuple[Encoding, Slots]:
        """Return the bias over all keys so far, and its slots."""
        filled = {slot: slots[slot] for slot in bias.slots}
        clock, gate = bias.clock, bias.gate
        if isinstance(clock, Positions | Accumulated):
            times = filled.pop(clock.slot)
            axes = isinstance(bias.distance, Euclidean) and times.dim() >= 3
            times = times.unsqueeze(0) if times.dim() < 2 else times
            if isinstance(clock, Accumulated):
                whole = self._sums(clock, times, f"{name}.sums", count, int(axes))
            else:
                whole = self._append(f"{name}.times", times, -1, int(axes))
            # A name of its own: two biases may sum the same rates in two ways.
            clock = Positions(f"{clock.slot}.{name}")
            filled[clock.slot] = whole
        if gate is not None and gate.key is not None:
            by_key = filled[gate.key]
            by_key = by_key.reshape((1,) * (3 - by_key.dim()) + tuple(by_key.shape))
            filled[gate.key] = self._append(f"{name}.gate", by_key, -1, 0)
        return replace(bias, clock=clock), filled

    def _path(self, path: PathBias, slots: Slots, name: str) -> tuple[Encoding, Slots]:
        """Return the path bias over the turned edges so far, and its slots."""
        query, edges = slots[path.query], slots[path.key]
        if path.normalised == "both":
            query = by_root_mean_square(query)
        if path.normalised != "none":
            edges = by_root_mean_square(edges)
        if path.turn is not None:
            turning, own = self._turning(path.turn, slots, f"{name}.turn", edges)
            (edges,) = rotate([edges], turning, own)
        edges = edges.reshape((1,) * (4 - edges.dim()) + tuple(edges.shape))
        filled = {slot: slots[slot] for slot in path.slopes.slots}
        filled |= {path.query: query, path.key: self._append(f"{name}.edges", edges, -2, 0)}
        return replace(path, normalised="none", turn=None), filled
