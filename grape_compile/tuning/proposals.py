"""Which candidates to try next: those that a model of the measured times expects to be fast, and some at random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Final

import numpy as np

from grape_compile.records.trials import candidate_key

Candidate = Mapping[str, Any]
#: Measured times from which on a model is fitted.
ENOUGH: Final = 8
#: One proposal in so many is drawn without asking the model.
EXPLORE: Final = 4
#: Trees, and what a failed candidate counts as: the slowest time so far, this many times.
TREES: Final = 60
FAILED: Final = 2.0


def propose(
    candidates: Sequence[Candidate], times: Mapping[str, float], number: int, random: Random
) -> list[Candidate]:
    """Return up to `number` candidates without a time; the first of all candidates always comes first.

    `times` are the seconds of those that were measured, by their keys, infinite for those that failed.
    """
    if candidate_key(candidates[0]) not in times:
        return [candidates[0]]
    left = [each for each in candidates if candidate_key(each) not in times]
    if len(left) <= number:
        return left
    random.shuffle(left)
    if sum(map(math.isfinite, times.values())) < ENOUGH:
        return left[:number]
    drawn = math.ceil(number / EXPLORE)
    chosen, rest = left[:drawn], left[drawn:]
    expected = _expected(candidates, times, rest)
    order = sorted(range(len(rest)), key=expected.__getitem__)
    return [rest[at] for at in order[: number - drawn]] + chosen


def _expected(
    candidates: Sequence[Candidate], times: Mapping[str, float], asked: Sequence[Candidate]
) -> list[float]:
    """Return the logarithms of seconds that boosted trees over the parameters expect."""
    import xgboost

    codes = _codes(candidates)
    known = [each for each in candidates if candidate_key(each) in times]
    seconds = [times[candidate_key(each)] for each in known]
    slowest = max(filter(math.isfinite, seconds))
    label = np.log([each if math.isfinite(each) else FAILED * slowest for each in seconds])
    table = xgboost.DMatrix(np.array([_features(each, codes) for each in known]), label=label)
    settings = {"max_depth": 6, "eta": 0.2, "min_child_weight": 0, "nthread": 1, "seed": 0, "verbosity": 0}
    trees = xgboost.train(settings, table, num_boost_round=TREES)
    rows = np.array([_features(each, codes) for each in asked])
    return [float(each) for each in trees.predict(xgboost.DMatrix(rows))]


def _codes(candidates: Sequence[Candidate]) -> dict[str, list[Any]]:
    """Return the values of every parameter, in order: trees need no more of them than their place."""
    names = sorted({name for each in candidates for name in each})
    return {name: sorted({each.get(name) for each in candidates}, key=_rank) for name in names}


def _rank(value: Any) -> tuple[float, str]:
    is_number = isinstance(value, int | float)
    return (float(value), "") if is_number else (math.inf, str(value))


def _features(candidate: Candidate, codes: Mapping[str, list[Any]]) -> list[float]:
    return [float(values.index(candidate.get(name))) for name, values in codes.items()]
