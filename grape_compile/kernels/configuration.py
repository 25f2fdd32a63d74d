"""How a rotation is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass

from grape_compile.kernels.layouts import width


@dataclass(frozen=True)
class Configuration:
    """`block` tokens and `group` heads of one program, run by `warps`."""

    block: int
    group: int
    warps: int

    def fitting(self, tokens: int, heads: int, lanes: int) -> Configuration:
        """Return the configuration for a call with few tokens or heads: no idle heads, and no warp without a lane."""
        block = min(self.block, width(tokens))
        warps = max(1, min(self.warps, block * lanes // 64))
        return Configuration(block, max(1, min(self.group, heads)), 1 << (warps.bit_length() - 1))


def default_configuration(lanes: int) -> Configuration:
    """Return what is launched without a tuning record: about 1024 planes a program, four heads for each angle."""
    return Configuration(max(1, 1024 // lanes), 4, 4)
