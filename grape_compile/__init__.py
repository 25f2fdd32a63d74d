"""Position encodings of PyTorch models, found by what they compute and rewritten into GRAPE operators."""

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "Report",
    "grape_compile",
    "inspect",
    "parameter_groups",
    "report",
    "restore",
    "rewrite",
    "upgrade",
]

try:
    from grape_compile.compiler import grape_compile, report, restore
    from grape_compile.inspecting import inspect, rewrite
    from grape_compile.reporting import Report
    from grape_compile.upgrading import parameter_groups, upgrade
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise

    # Where torch is not, a library of `grape_compile.export.tvm` is still loaded and run.
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from grape_compile.errors import EngineError

        raise EngineError(f"grape_compile.{name}", "no package torch", "pip install 'torch>=2.11'")
