"""Libraries that run without torch: `build` makes an `Artifact` of a model, `load` opens one that was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grape_compile.export.tvm.artifact import Artifact, load

if TYPE_CHECKING:
    from grape_compile.export.tvm.building import build

__all__ = ["Artifact", "build", "load"]


def __getattr__(name: str) -> Any:
    """Return `build`, which needs torch; opening and running a library does not."""
    if name == "build":
        from grape_compile.export.tvm.building import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
