"""Run many programs of one seed. What must never happen stops the run: the program is shrunk and printed as code."""

from __future__ import annotations

import itertools

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from generated.grammar import programs
from generated.judge import Missed, Unusable, Wrong, judge
from generated.program import Program
from generated.tally import Tally

SETTINGS = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    print_blob=False,
)


BATCH = 10
"""Examples of one hypothesis run: beyond these it repeats parts of what it drew, and programs would be near copies."""


def run(seed: int, count: int, tally: Tally, *, misses_allowed: bool = False) -> None:
    """Judge `count` different programs and count them; a failure is raised with the smallest program that shows it."""
    judged: set[Program] = set()
    for batch in itertools.count():
        if tally.programs >= count:
            return
        _run_batch(seed * 10_000 + batch, tally, judged, misses_allowed)


def _run_batch(seed: int, tally: Tally, judged: set[Program], misses_allowed: bool) -> None:
    failed = False

    @hypothesis.seed(seed)
    @settings(SETTINGS, max_examples=BATCH)
    @given(programs())
    def each(program: Program) -> None:
        nonlocal failed
        if program in judged:
            return
        if not failed:
            judged.add(program)
        try:
            found = judge(program)
        except Unusable:
            tally.unusable += not failed
        except Missed as miss:
            if not failed:
                tally.add(miss.tally)
            if not misses_allowed:
                failed = True
                judged.discard(program)
                raise
        except Wrong:
            tally.wrong += not failed
            failed = True
            judged.discard(program)
            raise
        else:
            if not failed:
                tally.add(found)

    each()
