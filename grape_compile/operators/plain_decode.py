"""Decoding by the other operators, one sequence after the other: what `grape::decode` means. Reads lengths back."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Multiplicative, Nope, PathBias, Positions, Steps
from grape_compile.operators.decode_call import DecodeCall
from grape_compile.operators.prepare import parts


def supports(call: DecodeCall) -> Literal[True] | str:
    """Every call."""
    return True


def forward(call: DecodeCall) -> Tensor:
    """Return what the new tokens see, and put their keys and values into the caches."""
    # Deferred: both are operators that look up providers, of which this is one.
    from grape_compile.operators.attention import attend
    from grape_compile.operators.rotation import rotate

    query, key = call.query, call.key
    biases = []
    for part in parts(call.encoding):
        if not isinstance(part, Multiplicative):
            biases.append(part)
            continue
        slots = dict(call.slots)
        if isinstance(part.clock, Steps):
            new = torch.arange(call.count, device=query.device)
            slots["steps"] = (call.lengths[:, None] + new)[:, None]
            part = part.by(Positions("steps"))
        query, key = rotate([query, key], part, slots)
    encoding = Compose(tuple(biases)) if biases else Nope()
    rows = []
    for number, length in enumerate(call.lengths.tolist()):
        stop = length + call.count
        one = slice(number, number + 1)
        for cache, new in ((call.key_cache, key), (call.value_cache, call.value)):
            cache[one, :, length:stop] = new[one]
        keys, values = (cache[one, :, :stop] for cache in (call.key_cache, call.value_cache))
        slots = _slots_of(call, number, stop)
        rows.append(
            attend(
                query[one],
                keys,
                values,
                encoding,
                slots,
                is_causal=True,
                scale=call.scale,
                window=call.window,
            )
        )
    return torch.cat(rows)


def _slots_of(call: DecodeCall, number: int, stop: int) -> dict[str, Tensor]:
    """Return the slots of the biases for one sequence: those of the cache end where its tokens do."""
    found: dict[str, Tensor] = {}
    for part in parts(call.encoding):
        if not isinstance(part, Bias | PathBias):
            continue
        found |= {name: _row(call.slots[name], 2, number) for name in part.slopes.slots}
        if isinstance(part, PathBias):
            found |= {part.query: _row(call.slots[part.query], 4, number)}
            found |= {part.key: _row(call.slots[part.key], 4, number)[..., :stop, :]}
            continue
        found |= {name: _row(call.slots[name], 2, number)[..., :stop] for name in part.clock.slots}
        if part.gate is not None:
            for name, kept in ((part.gate.query, call.count), (part.gate.key, stop)):
                if name is not None:
                    found[name] = _row(call.slots[name], 3, number)[..., :kept]
    return found


def _row(slot: Tensor, rank: int, number: int) -> Tensor:
    """Return one row of the batch of a slot that has that axis, from `rank` axes on."""
    return slot[number : number + 1] if slot.dim() >= rank and slot.shape[0] > 1 else slot
