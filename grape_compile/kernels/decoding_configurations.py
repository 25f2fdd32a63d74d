"""How decoding is cut into programs: tiles of keys, and how many parts the keys are split into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Final

import torch

from grape_compile.kernels import attention_configurations, path_configurations
from grape_compile.kernels.configuration import capability_of, record_of
from grape_compile.operators.call import AttendCall
from grape_compile.operators.path import Path

#: Parts that one merge reads at most.
MOST_SPLITS: Final = 128
#: Programs for each multiprocessor: enough loads in flight while others wait.
WAVES: Final = 4
#: Multiprocessors by compute capability, where no GPU is at hand: A100, H100, B200.
MULTIPROCESSORS: Final[Mapping[int, int]] = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Configuration:
    """Keys of a tile, parts of all keys, warps of a program, and tiles that are fetched ahead."""

    key_block: int
    splits: int
    warps: int
    stages: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Configuration | None:
        """Return the configuration of a record, or None for numbers that no kernel can have."""
        numbers = [record.get(field.name) for field in fields(cls)]
        if not all(type(number) is int for number in numbers):
            return None
        key_block, splits, warps, stages = (int(number or 0) for number in numbers)
        powers = all(number & (number - 1) == 0 for number in (key_block, warps))
        possible = powers and 16 <= key_block <= 256 and 0 < splits <= MOST_SPLITS
        return (
            cls(key_block, splits, warps, stages)
            if possible and 0 < warps <= 32 and 0 < stages <= 8
            else None
        )

    @property
    def options(self) -> Mapping[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


#: Where kernels are interpreted every tile costs the same.
_INTERPRETED: Final = Configuration(16, 3, 4, 1)


def case_of(call: AttendCall) -> str:
    """Return what a call is called in the records: as for attention, and how many key heads there are in all.

    What hides the future of few queries, a mask or their place, is the same to them.
    """
    batch, key_heads = call.key.shape[:2]
    has_path = any(isinstance(bias, Path) for bias in call.biases)
    of_many = path_configurations if has_path else attention_configurations
    words = of_many.case_of("forward", call).split()[2:]
    told = " ".join(word for word in words if word != "causal")
    return f"decode {call.query.shape[2]} x {batch * key_heads} {told}"


def configuration(call: AttendCall, capability: int | None = None) -> Configuration:
    """Return how a call is cut on its device or for a compute capability; on a GPU as it was recorded, if it was."""
    on_gpu = capability is None and call.query.device.type == "cuda"
    if on_gpu and (recorded := Configuration.of(record_of(case_of(call), call.query.device))):
        return recorded
    if capability is None and not on_gpu:
        return _INTERPRETED
    device = call.query.device
    if capability is None:
        programs, capability = _multiprocessors(device) * WAVES, capability_of(device)
    else:
        known = max((each for each in MULTIPROCESSORS if each <= capability), default=min(MULTIPROCESSORS))
        programs = MULTIPROCESSORS[known] * WAVES
    size = max(call.query.shape[3], call.value.shape[3])
    key_block = 32 if size > 128 or call.query.dtype == torch.float32 else 64
    stages = 2 if size > 128 or capability < 90 else 3
    return Configuration(key_block, splits_of(call, key_block, programs), 4, stages)


def splits_of(call: AttendCall, key_block: int, programs: int) -> int:
    """Return into how many parts the keys are split, a power of two: for so many programs, each with a tile at least.

    By sizes alone, never by what is in a cache.
    """
    batch, key_heads, keys, _ = call.key.shape
    reached = (
        keys if call.window is None or not call.is_causal else min(keys, call.window + call.query.shape[2])
    )
    wanted = -(-programs // (batch * key_heads))
    return 1 << (max(1, min(wanted, -(-reached // key_block), MOST_SPLITS)).bit_length() - 1)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
