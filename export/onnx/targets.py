"""The three kinds of file: what operators they may hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from grape_compile.errors import GrapeError


@dataclass(frozen=True)
class Target:
    """A kind of file: the opset of its standard operators, which fused ones it may hold, and whether loops.

    A loop leaves out what a mask hides: half of the work of causal attention on a CPU. The kernels of a GPU do that
    themselves, and lose by it.
    """

    name: str
    opset: int
    microsoft: bool = False
    loops: bool = False

    @property
    def fused(self) -> bool:
        """Whether ai.onnx itself has rotary embedding, attention and RMS normalization."""
        return self.opset >= 23


STANDARD: Final = Target("standard", 23)
ORT: Final = Target("ort", 20, microsoft=True)
PORTABLE: Final = Target("portable", 18)
TARGETS: Final = {target.name: target for target in (STANDARD, ORT, PORTABLE)}


def target_of(name: str, *, loops: bool = False) -> Target:
    """Return the target of this name, with loops or without; GrapeError for another name."""
    if name not in TARGETS:
        raise GrapeError(
            "an ONNX file", f"target={name!r}", " or ".join(f"target={each!r}" for each in TARGETS)
        )
    return replace(TARGETS[name], loops=loops)
