"""Sizes of tiles, warps and stages of the kernels of path biases for each GPU, size of head and dtype.

Those for 16 bits are the largest tiles whose machine code does not spill; none has been timed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, cast

import torch

from grape_compile.kernels.attention_configurations import Configuration
from grape_compile.kernels.configuration import capability_of, record_of
from grape_compile.operators.call import AttendCall
from grape_compile.operators.path import Path

Kernel = Literal["forward", "by_query", "by_edge_query", "by_key", "by_edge_key"]
#: In the order in which they run.
BACKWARD: Final[tuple[Kernel, ...]] = ("by_query", "by_edge_query", "by_key", "by_edge_key")
KERNELS: Final[tuple[Kernel, ...]] = ("forward", *BACKWARD)
OF_EDGES: Final[tuple[Kernel, ...]] = ("by_edge_query", "by_edge_key")
OVER_KEYS: Final[tuple[Kernel, ...]] = ("by_query", "by_edge_query")


@dataclass(frozen=True)
class Tiles(Configuration):
    """A configuration, and who shares a row of a tile of logits (`bodies/path_tiles.py`).

    `lanes` threads of a warp, four up to Hopper and one on Blackwell, in each of `split` warps.
    """

    lanes: int = 4
    split: int = 1

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Tiles | None:
        """Return the tiles of a record, or None for numbers that no kernel can have."""
        found = Configuration.of(record)
        lanes, split = record.get("lanes"), record.get("split")
        if found is None or lanes not in (1, 4) or split not in (1, 2, 4):
            return None
        return cls(**asdict(found), lanes=cast(int, lanes), split=cast(int, split))


#: Tiles by compute capability, for heads of up to 128 coordinates and beyond, in the order of `KERNELS`.
_TILES: Final[Mapping[tuple[int, int], tuple[Tiles, Tiles, Tiles, Tiles, Tiles]]] = {
    (80, 128): (
        Tiles(32, 32, 4, 2),
        Tiles(32, 32, 4, 2),
        Tiles(64, 32, 4, 1),
        Tiles(32, 32, 4, 1),
        Tiles(64, 32, 4, 1),
    ),
    (90, 128): (
        Tiles(128, 64, 8, 3),
        Tiles(128, 32, 8, 2),
        Tiles(128, 32, 8, 2),
        Tiles(128, 64, 8, 2),
        Tiles(128, 64, 8, 2),
    ),
    (100, 128): (
        Tiles(128, 64, 8, 3, 1, 2),
        Tiles(128, 32, 8, 1, 1, 2),
        Tiles(128, 32, 8, 2, 1, 2),
        Tiles(64, 64, 8, 1, 1, 2),
        Tiles(64, 64, 8, 1, 1, 2),
    ),
    (80, 256): (Tiles(32, 32, 8, 1),) * 5,
    (90, 256): (Tiles(64, 32, 8, 1), *(Tiles(32, 32, 8, 1),) * 4),
    (100, 256): (Tiles(64, 32, 8, 1), *(Tiles(32, 32, 8, 1),) * 4),
}
#: Products of float32 run on the ordinary units, whose operands are in registers.
_WIDE: Final = Tiles(32, 32, 4, 1)
#: Where kernels are interpreted every tile costs the same.
_INTERPRETED: Final = Tiles(16, 16, 4, 1)


def case_of(kernel: Kernel, call: AttendCall) -> str:
    """Return what a kernel is called in the records: what it is compiled for, and how long the sequence is."""
    (path,) = (bias for bias in call.biases if isinstance(bias, Path))
    link = type(path.link).__name__.lower() + ("-bounded" if path.is_bounded else "")
    length = 1 << max(call.key.shape[2] - 1, 0).bit_length()
    sizes = f"{call.query.shape[3]} {call.value.shape[3]} {path.query.shape[3]} x{call.groups} {length}"
    flags = [
        name for name, there in (("causal", call.is_causal), ("window", call.window is not None)) if there
    ]
    dtype = str(call.query.dtype).removeprefix("torch.")
    return " ".join(["path", kernel, link, dtype, sizes, *flags])


def configuration(kernel: Kernel, call: AttendCall, capability: int | None = None) -> Tiles:
    """Return the tiles of a kernel for a call, on its device or for a compute capability such as 90.

    On a GPU those that were recorded for it, if any.
    """
    if capability is None and call.query.device.type == "cpu":
        return _INTERPRETED
    if capability is None:
        if recorded := Tiles.of(record_of(case_of(kernel, call), call.query.device)):
            return recorded
        capability = capability_of(call.query.device)
    if call.query.dtype == torch.float32:
        return _WIDE
    size = max(call.query.shape[3], call.value.shape[3])
    known = next(each for each in (100, 90, 80) if capability >= each or each == 80)
    return _TILES[known, 128 if size <= 128 else 256][KERNELS.index(kernel)]
