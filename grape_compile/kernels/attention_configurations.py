"""Sizes of tiles, warps and stages of the attention kernels for each GPU, size of head and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grape_compile.operators.call import AttendCall


@dataclass(frozen=True)
class Configuration:
    """Queries and keys of a tile, warps of a program, and tiles that are fetched ahead."""

    query_block: int
    key_block: int
    warps: int
    stages: int

    @property
    def options(self) -> Mapping[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def forward_tiles(call: AttendCall) -> Configuration:
    return Configuration(16, 16, 4, 1)


def by_query(call: AttendCall) -> Configuration:
    return Configuration(16, 16, 4, 1)


def by_key(call: AttendCall) -> Configuration:
    return Configuration(16, 16, 4, 1)
