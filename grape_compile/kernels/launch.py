"""One launch of a kernel as a value: what runs, on what, in which configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Launch:
    """A Triton kernel with all of its arguments: run on a GPU, interpreted, or compiled for a GPU that is absent.

    `arguments` go by name; those that the kernel declares `tl.constexpr` are compiled in. `options` are those of the
    compiler: `num_warps`, `num_stages`, `maxnreg`.
    """

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Start the kernel; an empty grid has nothing to do."""
        if all(self.grid):
            self.function[self.grid](**self.arguments, **self.options)
