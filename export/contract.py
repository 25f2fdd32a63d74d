"""The error contract: what was exported may be off by little more than the model it came from is itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from torch import Tensor

from grape_compile.errors import GrapeError
from grape_compile.export.capturing import Captured
from grape_compile.export.cases import Case
from grape_compile.export.comparison import Comparison
from grape_compile.export.deviation import Deviation, Numbers
from grape_compile.export.oracle import Eager

SEEDS: Final = 3
#: A file may be off by this much more than the original itself is, and by rounding near zero.
FACTOR, FLOOR = 1.25, 1e-7

_ORIGINAL: Final = "original"
#: Inputs of a case in, tensors of the result out.
Run = Callable[[Sequence[Tensor]], list[Tensor]]


def hold_to_contract(
    kind: str,
    ways: Mapping[str, Run],
    captured: Captured,
    draw: Callable[[int], Iterable[Case]],
    *,
    plain: Callable[[], Run] | None = None,
) -> tuple[Comparison, ...]:
    """Return the errors of what was exported and of the original, both against float64, over three draws of every case.

    `ways` are the ways of running it, by what is said of them behind the name of a case. GrapeError where the errors of
    one are above 1.25 times those of the original or of `plain`, the same model exported without this library (asked
    for only then), plus 1e-7; the message calls it a `kind`.
    """
    comparisons = compared(ways, captured, draw)
    over = _over(comparisons)
    if over and plain is not None:
        bound = measured({"plain": plain()}, captured, draw)
        others = [own["plain"].relative for own in bound.values() for _ in ways]
        comparisons = tuple(
            Comparison(each.case, each.file, max(each.original, other))
            for each, other in zip(comparisons, others, strict=True)
        )
        over = _over(comparisons)
    if over:
        worst = max(over, key=lambda each: each.file)
        raise GrapeError(
            f"{kind} that computes what {captured.kind} computes",
            f"{worst.case}: relative error {worst.file:.2e} where the original has {worst.original:.2e}",
            "another target, verify=False to look at the file, and a report of this",
        )
    return comparisons


def compared(
    ways: Mapping[str, Run], captured: Captured, draw: Callable[[int], Iterable[Case]]
) -> tuple[Comparison, ...]:
    """Return the errors of what was exported and of the original by case and way, over three draws of each."""
    found = measured(ways, captured, draw)
    return tuple(
        Comparison(f"{name}{way}", sums[way].relative, sums[_ORIGINAL].relative)
        for name, sums in found.items()
        for way in ways
    )


def measured(
    runs: Mapping[str, Run], captured: Captured, draw: Callable[[int], Iterable[Case]]
) -> dict[str, dict[str, Deviation]]:
    """Return by case and run the errors against float64, those of the original among them."""
    eager, oracle = Eager(captured), Eager(captured, wide=True)
    found: dict[str, dict[str, Deviation]] = {}
    for seed in range(SEEDS):
        for case in draw(seed):
            own = found.setdefault(case.name, {name: Deviation() for name in (*runs, _ORIGINAL)})
            right = oracle(case.inputs)
            _check_numbers(captured, case, right)
            _add(own[_ORIGINAL], eager(case.inputs), right, case.counted)
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
                f"verify a file of {captured.kind}",
                f"{case.name}: the original in float64 returns nan",
                "example arguments on which the model returns numbers, or verify=False",
            )
