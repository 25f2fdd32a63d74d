"""The search for the fastest program of one workload, every trial of which is recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Final

from grape_compile.errors import first_line
from grape_compile.kernels.tensorir.bench import Library
from grape_compile.records import Held, Log, Place, Trial, Winner
from grape_compile.records.trials import candidate_key
from grape_compile.tuning.proposals import Candidate, propose
from grape_compile.tuning.running import Outcome, Runner
from grape_compile.tuning.workloads import Program, Workload, tensor_of

#: Candidates that are compiled together, for each device.
BATCH: Final = 8
#: Candidates that compete with the untuned program in the end, and rounds in which each has its turn.
FINALISTS: Final = 3
ROUNDS: Final = 5
#: Draws of the inputs that a winner is verified on.
SEEDS: Final = 3

Told = Callable[[Trial], None]


class Search:
    """The trials of one workload: those on record whose programs are still the same, and those to come.

    `times` are the seconds of the fastest repetition by candidate, as disturbances only add, infinite for one that
    failed; `winner` is what is recorded as fastest.
    """

    def __init__(self, workload: Workload, place: Place, log: Log, runner: Runner, trials: int) -> None:
        self.workload, self.place, self.log, self.runner = workload, place, log, runner
        self.times: dict[str, float] = {}
        self.problems: list[str] = []
        self.winner: Winner | None = None
        self.why_none = ""
        self._programs: dict[str, Program | str] = {}
        self._remember(log.held.of(workload.task, place))
        self.recorded = len(self.times)
        self.goal = min(trials, len(workload.candidates))
        self._saved: list[Path] = []

    @property
    def best(self) -> float:
        """Seconds of the fastest candidate so far."""
        return min(self.times.values(), default=math.inf)

    @property
    def weight(self) -> float:
        """Seconds of the untuned program in one call of the model."""
        seconds = self.times.get(candidate_key(self.workload.candidates[0]), math.inf)
        return self.workload.count * seconds if math.isfinite(seconds) else 0.0

    def measure_untuned(self, told: Told) -> None:
        """Time what runs without tuning, unless that is recorded."""
        self._try(
            [each for each in self.workload.candidates[:1] if candidate_key(each) not in self.times], told
        )

    def run(self, told: Told) -> None:
        """Try candidates until there are enough trials, then let the best compete and record the winner."""
        if self.winner is not None and len(self.times) >= self.goal:
            return
        at_once = BATCH * (1 if self.runner.fleet is None else max(len(self.runner.fleet), 1))
        while len(self.times) < self.goal:
            random = Random(f"{self.workload.task} {len(self.times)}")
            number = min(at_once, self.goal - len(self.times))
            self._try(propose(self.workload.candidates, self.times, number, random), told)
        self.winner = self._decide()

    def _remember(self, held: Held) -> None:
        self.problems += held.problems
        points = {candidate_key(each) for each in self.workload.candidates}

        def is_current(record: Trial | Winner) -> bool:
            return (
                candidate_key(record.candidate) in points and self._hash(record.candidate) == record.program
            )

        current = [each for each in held.trials if is_current(each)]
        stale = len(held.trials) - len(current)
        if stale:
            self.problems.append(
                f"{stale} trials of {self.workload.task} are of programs that are written differently now; "
                "they are not used"
            )
        for trial in current:
            seconds = min(trial.seconds, default=math.inf)
            key = candidate_key(trial.candidate)
            self.times[key] = max(seconds, self.times.get(key, 0.0))
        self.winner = next((each for each in held.winners if is_current(each)), None)

    def _program(self, candidate: Candidate) -> Program | str:
        """Return the program of a candidate, or why it cannot be written."""
        key = candidate_key(candidate)
        if key not in self._programs:
            try:
                self._programs[key] = self.workload.program(candidate)
            except Exception as failure:
                self._programs[key] = f"it cannot be written: {first_line(failure)}"
        return self._programs[key]

    def _hash(self, candidate: Candidate) -> str:
        program = self._program(candidate)
        return program.hash if isinstance(program, Program) else ""

    def _try(self, candidates: Sequence[Candidate], told: Told) -> None:
        """Measure candidates, and record each as soon as it is known how fast it is."""
        left = []
        for candidate in candidates:
            # Choices that a shape makes meaningless give the same program twice.
            known = self._seconds_of(self._hash(candidate))
            if known is None:
                left.append(candidate)
            else:
                self.times[candidate_key(candidate)] = known
        ready: list[tuple[Candidate, Library]] = []
        for candidate, library in zip(left, self._built(left), strict=True):
            if isinstance(library, str):
                self._record(candidate, Outcome((), library), told)
            else:
                ready.append((candidate, library))
        if ready:
            for at, outcome in self.runner.measure([library for _, library in ready], self._arguments(0)):
                self._record(ready[at][0], outcome, told)

    def _seconds_of(self, program: str) -> float | None:
        """Return the seconds of a program that another candidate had before."""
        for key, seconds in self.times.items():
            known = self._programs.get(key)
            if program and isinstance(known, Program) and known.hash == program:
                return seconds
        return None

    def _built(self, candidates: Sequence[Candidate]) -> list[Library | str]:
        """Compile candidates; say of each that cannot be why."""
        programs = [self._program(each) for each in candidates]
        built = iter(self.runner.build([each for each in programs if isinstance(each, Program)]))
        return [each if isinstance(each, str) else next(built) for each in programs]

    def _arguments(self, seed: int) -> Path:
        while len(self._saved) <= seed:
            inputs = self.workload.draw(len(self._saved))
            self._saved.append(self.runner.save(self.workload.arguments(inputs)))
        return self._saved[seed]

    def _record(self, candidate: Candidate, outcome: Outcome, told: Told) -> None:
        trial = Trial(
            self.workload.task,
            self.place,
            candidate,
            self._hash(candidate),
            outcome.seconds,
            outcome.failure,
            outcome.server,
            now(),
        )
        self.log.append(trial)
        self.times[candidate_key(candidate)] = min(trial.seconds, default=math.inf)
        told(trial)

    def _decide(self) -> Winner | None:
        """Let the fastest candidates and the untuned program run in turn; record the fastest that computes the same."""
        untuned, *others = self.workload.candidates
        ranked = sorted(others, key=lambda each: self._seconds(each))
        running = [untuned, *(each for each in ranked[:FINALISTS] if math.isfinite(self._seconds(each)))]
        libraries = self._built(running)
        failure = next((each for each in libraries if isinstance(each, str)), "")
        ready = [each for each in libraries if isinstance(each, Library)]
        times = failure or self.runner.compare(ready, self._arguments(0), ROUNDS)
        if isinstance(times, str):
            self.why_none = f"its fastest programs could not be compared: {times}"
            return None
        medians = [median(each) for each in times]
        for at in sorted(range(len(running)), key=medians.__getitem__):
            error, allowed, why = self._verified(ready[at])
            if why:
                self._record(running[at], Outcome((), why), lambda trial: None)
                self.why_none = f"its fastest program is wrong: {why}"
                continue
            candidate, trials = running[at], sum(map(math.isfinite, self.times.values()))
            winner = Winner(self.workload.task, self.place, candidate, self._hash(candidate), medians[at],
                            medians[0], error, allowed, trials, now())  # fmt: skip
            self.log.append(winner)
            return winner
        return None

    def _seconds(self, candidate: Candidate) -> float:
        return self.times.get(candidate_key(candidate), math.inf)

    def _verified(self, library: Library) -> tuple[float, float, str]:
        """Return the largest error over the seeds, what is allowed there, and what is wrong with it, if anything."""
        worst = (0.0, math.inf)
        for seed in range(SEEDS):
            inputs = self.workload.draw(seed)
            arrays = self.runner.compute(library, self._arguments(seed))
            if isinstance(arrays, str):
                return math.inf, 0.0, f"it does not run: {arrays}"
            error, allowed = self.workload.error(tensor_of(arrays[-1]), inputs)
            if not error <= allowed:
                return error, allowed, f"its error is {error:.3g} where {allowed:.3g} is allowed"
            if error >= worst[0]:
                worst = error, allowed
        return (*worst, "")


def now() -> str:
    """Return the time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
