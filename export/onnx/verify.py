"""Run a file against the model it came from and hold it to the error of the model itself (the error contract)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.errors import GrapeError
from grape_compile.export.onnx.capturing import Captured
from grape_compile.export.onnx.cases import Case
from grape_compile.export.onnx.deviation import Deviation, Numbers
from grape_compile.export.onnx.oracle import Eager
from grape_compile.export.onnx.report import Comparison
from grape_compile.export.onnx.runtime import CPU, session

SEEDS: Final = 3
#: A file may be off by this much more than the original itself is, and by rounding near zero.
FACTOR, FLOOR = 1.25, 1e-7

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def verify(
    path: Path,
    captured: Captured,
    draw: Callable[[int], Iterable[Case]],
    *,
    providers: Sequence[str] = (CPU,),
    plain: Callable[[], Path] | None = None,
) -> tuple[Comparison, ...]:
    """Return the errors of a file and of the original, both against float64, over three draws of every case.

    GrapeError where the file's error is above 1.25 times that of the original or of `plain`, a file of the same model
    without this library (asked for only then), plus 1e-7.
    """
    comparisons = measure(path, captured, draw, providers)
    over = _over(comparisons)
    if over and plain is not None:
        other = _running(session(plain(), providers), captured)
        bound = _measured({"plain": other}, captured, draw)
        comparisons = tuple(
            Comparison(each.case, each.file, max(each.original, bound[each.case]["plain"].relative))
            for each in comparisons
        )
        over = _over(comparisons)
    if over:
        worst = max(over, key=lambda each: each.file)
        raise GrapeError(
            f"an ONNX file that computes what {type(captured.model).__name__} computes",
            f"{worst.case}: relative error {worst.file:.2e} where the original has {worst.original:.2e}",
            "another target, verify=False to look at the file, and a report of this",
        )
    return comparisons


def _over(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those that break the contract; an error that is no number breaks it, whatever the original's own is."""
    return [
        each
        for each in comparisons
        if not (math.isfinite(each.file) and each.file <= FACTOR * each.original + FLOOR)
    ]


def _check_numbers(captured: Captured, case: Case, right: Sequence[Tensor]) -> None:
    """GrapeError where the original itself has no numbers for a case: nothing could be compared with."""
    for each in right:
        counted = each if case.counted is None or each.shape[:2] != case.counted.shape else each[case.counted]
        if bool(counted.isnan().any()):
            raise GrapeError(
                f"verify a file of {type(captured.model).__name__}",
                f"{case.name}: the original in float64 returns nan",
                "example arguments on which the model returns numbers, or verify=False",
            )


def measure(
    path: Path, captured: Captured, draw: Callable[[int], Iterable[Case]], providers: Sequence[str] = (CPU,)
) -> tuple[Comparison, ...]:
    """Return the errors of a file and of the original by case, over three draws of each."""
    found = _measured({"file": _running(session(path, providers), captured)}, captured, draw)
    return tuple(
        Comparison(name, sums["file"].relative, sums["original"].relative) for name, sums in found.items()
    )


def _measured(
    runs: dict[str, Run], captured: Captured, draw: Callable[[int], Iterable[Case]]
) -> dict[str, dict[str, Deviation]]:
    """Return by case and run the errors against float64, those of the original among them."""
    eager, oracle = Eager(captured), Eager(captured, wide=True)
    found: dict[str, dict[str, Deviation]] = {}
    for seed in range(SEEDS):
        for case in draw(seed):
            own = found.setdefault(case.name, {name: Deviation() for name in (*runs, "original")})
            right = oracle(case.inputs)
            _check_numbers(captured, case, right)
            _add(own["original"], eager(case.inputs), right, case.counted)
            for name, run in runs.items():
                _add(own[name], run(case.inputs), right, case.counted)
    return found


def _add(total: Deviation, found: Sequence[Tensor], right: Sequence[Tensor], counted: Tensor | None) -> None:
    """Count the results of a call; of a mask over tokens, the tokens that count and results by token alone."""
    for one, other in zip(found, right, strict=True):
        if counted is None:
            total.add(_numbers(one), _numbers(other))
        elif other.shape[:2] == counted.shape:
            total.add(_numbers(one[counted]), _numbers(other[counted]))


def _numbers(result: Tensor) -> Numbers:
    numbers: Numbers = (result.double() if result.is_floating_point() else result).numpy()
    return numbers


def _running(made: Any, captured: Captured) -> Run:
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
