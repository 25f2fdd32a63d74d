"""Run a file against the model it came from and hold it to the error of the model itself (the error contract)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grape_compile.errors import GrapeError
from grape_compile.export.capturing import Captured
from grape_compile.export.cases import Case
from grape_compile.export.comparison import Comparison
from grape_compile.export.contract import Run, compared, hold_to_contract
from grape_compile.export.onnx.in_buffers import in_buffers
from grape_compile.export.onnx.runtime import CPU, session


def verify(
    path: Path,
    captured: Captured,
    draw: Callable[[int], Iterable[Case]],
    *,
    providers: Sequence[str] = (CPU,),
    is_shared: bool = False,
    plain: Callable[[], Path] | None = None,
) -> tuple[Comparison, ...]:
    """Hold a file to the contract, beside the original and the file that `plain` writes; see `hold_to_contract`.

    `is_shared`: its caches are buffers of fixed size.
    """
    other = None if plain is None else lambda: running(session(plain(), providers), captured)
    ways = _ways(session(path, providers), captured, is_shared=is_shared)
    return hold_to_contract("an ONNX file", ways, captured, draw, plain=other)


def measure(
    path: Path,
    captured: Captured,
    draw: Callable[[int], Iterable[Case]],
    providers: Sequence[str] = (CPU,),
    *,
    is_shared: bool = False,
) -> tuple[Comparison, ...]:
    """Return the errors of a file and of the original by case, over three draws of each."""
    return compared(_ways(session(path, providers), captured, is_shared=is_shared), captured, draw)


def _ways(made: Any, captured: Captured, *, is_shared: bool) -> dict[str, Run]:
    return in_buffers(made, captured) if is_shared else {"": running(made, captured)}


def running(made: Any, captured: Captured) -> Run:
    """Run a session on the inputs of a case."""
    asked = [each.name for each in made.get_inputs()]
    names = [each.name for each in made.get_outputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = dict(zip(captured.input_names, inputs, strict=True))
        missing = [name for name in asked if name not in feeds]
        if missing:
            raise GrapeError(
                "run an ONNX file", f"its inputs are {', '.join(asked)}", ", ".join(captured.input_names)
            )
        results = made.run(names, {name: feeds[name].numpy() for name in asked})
        return [torch.from_numpy(each) for each in results]

    return run
