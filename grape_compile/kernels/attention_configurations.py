"""Sizes of tiles, warps and stages of the attention kernels for each GPU, size of head and dtype.

Those of plain and of heavy biases for compute capability 9.0 and 16 bits were the fastest of ten on an H100 (4096
tokens, 32 heads over 8 of the keys), though threads of the backward kernels spill a few registers; all others are the
largest tiles whose machine code does not spill, and were not timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import torch

from grape_compile.kernels.configuration import capability_of, record_of
from grape_compile.operators.bias import Additive
from grape_compile.operators.call import AttendCall

Kernel = Literal["forward", "by_query", "by_key"]
KERNELS: Final[tuple[Kernel, ...]] = ("forward", "by_query", "by_key")


@dataclass(frozen=True)
class Configuration:
    """Queries and keys of a tile, warps of a program, and tiles that are fetched ahead."""

    query_block: int
    key_block: int
    warps: int
    stages: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Configuration | None:
        """Return the configuration of a record, or None for numbers that no kernel can have."""
        numbers = [record.get(field.name) for field in fields(cls)]
        if not all(type(number) is int for number in numbers):
            return None
        query_block, key_block, warps, stages = (int(number or 0) for number in numbers)
        powers = all(number & (number - 1) == 0 for number in (query_block, key_block, warps))
        possible = powers and min(query_block, key_block) >= 16 and max(query_block, key_block) <= 256
        if not (possible and 0 < warps <= 32 and 0 < stages <= 8):
            return None
        return cls(query_block, key_block, warps, stages)

    @property
    def options(self) -> Mapping[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


#: Tiles by compute capability and coordinates of a head: forward, by query, by key.
_TILES: Final[Mapping[tuple[int, int], tuple[Configuration, Configuration, Configuration]]] = {
    (80, 64): (Configuration(128, 64, 8, 2), Configuration(64, 32, 4, 2), Configuration(32, 64, 8, 1)),
    (80, 128): (Configuration(128, 64, 8, 2), Configuration(64, 64, 8, 2), Configuration(64, 64, 8, 1)),
    (80, 256): (Configuration(64, 32, 8, 2), Configuration(64, 32, 8, 1), Configuration(32, 32, 8, 1)),
    (90, 64): (Configuration(64, 64, 4, 3), Configuration(64, 64, 4, 2), Configuration(64, 64, 4, 2)),
    (90, 128): (Configuration(64, 64, 4, 3), Configuration(64, 64, 4, 2), Configuration(32, 64, 4, 2)),
    (90, 256): (Configuration(64, 64, 8, 2), Configuration(64, 32, 8, 1), Configuration(32, 32, 8, 1)),
    (100, 64): (Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 2), Configuration(64, 64, 8, 1)),
    (100, 128): (Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 2), Configuration(64, 64, 8, 1)),
    (100, 256): (Configuration(64, 64, 8, 2), Configuration(64, 32, 8, 1), Configuration(32, 32, 8, 1)),
}
#: Clocks and gates of keys are more numbers to hold: tiles by query and by key of the backward pass.
_HEAVY: Final[Mapping[tuple[int, int], tuple[Configuration, Configuration]]] = {
    (80, 64): (Configuration(64, 32, 4, 2), Configuration(32, 32, 4, 1)),
    (80, 128): (Configuration(64, 64, 8, 2), Configuration(32, 64, 8, 1)),
    (90, 64): (Configuration(64, 64, 4, 2), Configuration(64, 64, 4, 1)),
    (90, 128): (Configuration(128, 64, 8, 2), Configuration(32, 64, 4, 2)),
    (100, 64): (Configuration(128, 32, 8, 2), Configuration(64, 64, 8, 1)),
    (100, 128): (Configuration(128, 32, 8, 2), Configuration(32, 64, 8, 1)),
}
#: So are a cap and segments, in the forward pass too.
_BESIDE: Final[Mapping[tuple[int, int], tuple[Configuration, Configuration, Configuration]]] = {
    (80, 128): (Configuration(128, 32, 8, 2), Configuration(64, 64, 8, 2), Configuration(64, 64, 8, 1)),
    (90, 64): (Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 2), Configuration(32, 128, 8, 2)),
    (90, 128): (Configuration(128, 64, 8, 3), Configuration(128, 32, 8, 2), Configuration(32, 64, 8, 1)),
    (100, 128): (Configuration(128, 32, 8, 3), Configuration(128, 64, 8, 2), Configuration(64, 64, 8, 1)),
}
#: Products of float32 run on the ordinary units, whose operands are in registers.
_WIDE: Final = Configuration(32, 32, 4, 1)
#: Where kernels are interpreted every tile costs the same.
_INTERPRETED: Final = Configuration(16, 16, 4, 1)


def case_of(kernel: Kernel, call: AttendCall) -> str:
    """Return what a kernel is called in the records: what it is compiled for, and how long the sequence is."""
    biases = [bias for bias in call.biases if isinstance(bias, Additive)]
    kinds = "+".join(
        "".join(
            (
                "steps" if bias.clock is None else "clock",
                "" if bias.gate_query is None else "-q",
                "" if bias.gate_key is None else "-k",
            )
        )
        for bias in biases
    )
    beside = {
        "causal": call.is_causal,
        "window": call.window is not None,
        "cap": call.cap is not None,
        "segments": call.segments is not None,
    }
    flags = [name for name, there in beside.items() if there]
    length = 1 << max(call.key.shape[2] - 1, 0).bit_length()
    sizes = f"{call.query.shape[3]} {call.value.shape[3]} x{call.groups} {length}"
    dtype = str(call.query.dtype).removeprefix("torch.")
    return " ".join(["attention", kernel, kinds or "none", dtype, sizes, *flags])


def configuration(kernel: Kernel, call: AttendCall, capability: int | None = None) -> Configuration:
    """Return the tiles of a kernel for a call, on its device or for a compute capability such as 90.

    On a GPU those that were recorded for it, if any.
    """
    if capability is None and call.query.device.type == "cpu":
        return _INTERPRETED
    if capability is None:
        if recorded := Configuration.of(record_of(case_of(kernel, call), call.query.device)):
            return recorded
        capability = capability_of(call.query.device)
    if call.query.dtype == torch.float32:
        return _WIDE
    size = max(call.query.shape[3], call.value.shape[3])
    place = (
        next(each for each in (100, 90, 80) if capability >= each or each == 80),
        64 if size <= 64 else 128,
    )
    if size > 128:
        place = place[0], 256
    heavy = any(
        bias.clock is not None or bias.gate_key is not None
        for bias in call.biases
        if isinstance(bias, Additive)
    )
    if heavy and kernel != "forward" and place in _HEAVY:
        return _HEAVY[place][kernel == "by_key"]
    if (call.cap is not None or call.segments is not None) and place in _BESIDE:
        return _BESIDE[place][KERNELS.index(kernel)]
    return _TILES[place][KERNELS.index(kernel)]
