"""How a rotation is cut into programs: what was recorded for this GPU, else what is shipped for its kind.

Nothing is tried at run time; `grape_compile.tuning.tune_kernels` writes the records.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch

from grape_compile.kernels.layouts import width
from grape_compile.records import Key, Records, read

#: Names a file of records in place of the one in the user's cache.
VARIABLE: Final = "GRAPE_COMPILE_RECORDS"


@dataclass(frozen=True)
class Configuration:
    """`block` tokens and `group` heads of one program, run by `warps`."""

    block: int
    group: int
    warps: int

    def fitting(self, tokens: int, heads: int, lanes: int) -> Configuration:
        """Return the configuration for a call with few tokens or heads: no idle heads, and no warp without a lane."""
        # A number of tokens that is a symbol may be any.
        block = min(self.block, width(tokens)) if type(tokens) is int else self.block
        warps = max(1, min(self.warps, block * lanes // 64))
        return Configuration(block, max(1, min(self.group, heads)), 1 << (warps.bit_length() - 1))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Configuration | None:
        """Return the configuration of a record, or None for numbers that no kernel can have."""
        block, group, warps = (_count(record.get(field.name)) for field in fields(cls))
        powers = all(value & (value - 1) == 0 for value in (block, warps))
        possible = powers and 0 < block <= 4096 and 0 < group <= 4096 and 0 < warps <= 32
        return cls(block, group, warps) if possible else None


def _count(value: object) -> int:
    return value if type(value) is int else 0


#: Lanes, heads and warps of a program by compute capability: eight planes a thread, so that one load has 128 bits of
#: 16 bit numbers, and each angle used for four heads.
DEFAULTS: Final[Mapping[int, tuple[int, int, int]]] = {80: (1024, 4, 4), 90: (1024, 4, 4), 100: (1024, 4, 4)}

#: The same on the way back with gradients of angles, where a thread keeps a sum beside each cosine and sine and reads
#: two tensors: four planes a thread.
BACK: Final[Mapping[int, tuple[int, int, int]]] = {80: (512, 1, 4), 90: (1024, 1, 8), 100: (1024, 1, 8)}


def default_configuration(lanes: int, capability: int = 90, kind: str = "turn") -> Configuration:
    """Return what is launched without a record, by the newest known GPU that is not newer than this one."""
    shipped = BACK if kind == "back" else DEFAULTS
    known = max((each for each in shipped if each <= capability), default=min(shipped))
    size, group, warps = shipped[known]
    return Configuration(max(1, size // lanes), group, warps)


def configuration_for(case: str, lanes: int, device: torch.device) -> Configuration:
    """Return the configuration of a case on a device."""
    kind = case.partition(" ")[0]
    if device.type != "cuda":
        return default_configuration(lanes, kind=kind)
    recorded = Configuration.of(record_of(case, device))
    return recorded or default_configuration(lanes, capability_of(device), kind)


def record_of(case: str, device: torch.device) -> Mapping[str, Any]:
    """Return what was recorded of a case for a GPU; nothing where it was not tuned."""
    return _records_of(device.index or 0).cases.get(case, {})


def capability_of(device: torch.device) -> int:
    """Return the compute capability as one number, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=16)
def _records_of(index: int) -> Records:
    key = key_of(torch.device("cuda", index))
    found = read(records_path(key.gpu), key)
    if found.problem:
        warnings.warn(found.problem, stacklevel=4)
    return found


def forget_records() -> None:
    """Read the files of records again at the next call."""
    _records_of.cache_clear()


def records_path(gpu: str) -> Path:
    """Return where records of a GPU are kept."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    plain = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    return cache / "grape_compile" / f"kernels-{plain}.json"


def key_of(device: torch.device) -> Key:
    """Return what records of a device hold for."""
    import triton

    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return Key(torch.cuda.get_device_name(device), capability, triton.__version__, source_hash())


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Return a hash of the text of all kernels."""
    bodies = files("grape_compile.kernels.bodies")
    texts = sorted((each.name, each.read_bytes()) for each in bodies.iterdir() if each.name.endswith(".py"))
    return sha256(b"\0".join(name.encode() + b"\0" + text for name, text in texts)).hexdigest()[:16]
