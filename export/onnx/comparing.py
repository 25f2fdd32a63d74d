"""Run a written file again, on another provider or another machine, against the model it came from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from grape_compile.errors import GrapeError
from grape_compile.export.capturing import capture
from grape_compile.export.cases import drawn_cases
from grape_compile.export.comparison import Comparison
from grape_compile.export.kv_cache import SHARED, cached_cases, with_cache
from grape_compile.export.onnx.runtime import CPU
from grape_compile.export.onnx.verify import measure


def compare(
    path: str | PathLike[str],
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    kv_cache: bool | str = False,
    providers: Sequence[str] = (CPU,),
) -> tuple[Comparison, ...]:
    """Return the errors of a file on `providers` and of the model, both against the model in float64; see `export`.

    It judges nothing. Raises GrapeError where the file does not load there, or is no file of such a model.
    """
    place = Path(path)
    if not place.is_file():
        raise GrapeError(f"compare {place} with its model", "no such file", "the path that export wrote")
    if kv_cache:
        captured = with_cache(model)
        cases = partial(cached_cases, captured)
        return measure(place, captured, cases, providers, is_shared=kv_cache == SHARED)
    captured = capture(model, args, kwargs or {}, dynamic_shapes)
    return measure(place, captured, partial(drawn_cases, captured), providers)
