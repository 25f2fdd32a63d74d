"""Tuning functions of TensorIR for a device of this machine or for a fleet of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from grape_compile.encoding import Encoding
from grape_compile.errors import GrapeError
from grape_compile.kernels.tensorir import bench, engine
from grape_compile.kernels.tensorir.replay import version_text
from grape_compile.records import Log, Place, Task, Trial, Winner
from grape_compile.tuning.fleet import Fleet
from grape_compile.tuning.running import Runner
from grape_compile.tuning.tasks import found_in
from grape_compile.tuning.trying import Search
from grape_compile.tuning.workloads import Workload


@dataclass(frozen=True)
class Progress:
    """How far a search is: `done` of `trials` of a task, its best seconds, what it is of a model's time, what is left.

    `share` is measured on the untuned programs, between 0 and 1; `left` is an estimate in seconds for all tasks.
    """

    task: Task
    done: int
    trials: int
    best: float
    share: float
    left: float


@dataclass(frozen=True)
class TunedProgram:
    """One task: its winner, its share of the time, what was tried now and before, and why it has no winner."""

    task: Task
    share: float
    winner: Winner | None
    tried: int
    recorded: int
    failed: int
    problem: str = ""

    def __str__(self) -> str:
        head = f"{self.task}: {100 * self.share:.0f} % of the time"
        counted = f"{self.tried} trials, {self.recorded} recorded before, {self.failed} failed"
        if self.winner is None:
            return f"{head}; {self.problem} ({counted})"
        words = " ".join(f"{name}={value}" for name, value in self.winner.candidate.items())
        gain = self.winner.untuned / self.winner.seconds
        took = f"{1e6 * self.winner.seconds:.1f} us, {gain:.2f} x as fast as untuned"
        return f"{head}; {words}, {took} ({counted})"


@dataclass(frozen=True)
class TuningReport:
    """What was tuned, for which place, and where it is recorded.

    `problems` tells of records that were not used, `left_out` of operators that TensorIR has no function for, `servers`
    how many trials ran on each server of a fleet.
    """

    tasks: tuple[TunedProgram, ...]
    place: Place
    path: Path
    problems: tuple[str, ...]
    left_out: tuple[str, ...]
    servers: Mapping[str, int]

    def __str__(self) -> str:
        ran = [f"{count} trials on {server}" for server, count in self.servers.items()]
        told = [*self.problems, *self.left_out, *map(str, self.tasks), *ran]
        return "\n".join([*told, f"device: {self.place.device}", f"records: {self.path}"])


def search(
    workloads: Sequence[Workload],
    target: engine.Target,
    log: Log,
    *,
    trials: int,
    fleet: Fleet | None = None,
    jobs: int | None = None,
    seconds: int = 60,
    progress: Callable[[Progress], None] | None = None,
    left_out: Sequence[str] = (),
) -> TuningReport:
    """Tune workloads, those first that take most of the time; each trial is recorded when it has ended."""
    folder = log.path.parent
    with Runner(str(target), folder, fleet, jobs or os.cpu_count() or 1, seconds) as runner:
        place = Place(runner.device(), str(target), version_text())
        searches = [Search(each, place, log, runner, trials) for each in workloads]
        told = _Told(searches, progress)
        for each in searches:
            each.measure_untuned(told.by(each))
        searches.sort(key=lambda each: each.weight, reverse=True)
        for each in searches:
            each.run(told.by(each))
    problems = dict.fromkeys(problem for each in searches for problem in each.problems)
    tasks = [_told_of(each, told.share(each)) for each in searches]
    return TuningReport(tuple(tasks), place, log.path, tuple(problems), tuple(left_out), told.servers)


def _told_of(search: Search, share: float) -> TunedProgram:
    failed = sum(each == float("inf") for each in search.times.values())
    tried = len(search.times) - search.recorded
    return TunedProgram(
        search.workload.task, share, search.winner, tried, search.recorded, failed, search.why_none
    )


class _Told:
    """Counts trials that have ended, and tells of progress."""

    def __init__(self, searches: Sequence[Search], progress: Callable[[Progress], None] | None) -> None:
        self.searches, self.progress = searches, progress
        self.servers: dict[str, int] = {}
        self.start, self.ended = time.monotonic(), 0

    def share(self, search: Search) -> float:
        """Return which part of the time of all untuned programs is this one's, as often as it is called."""
        whole = sum(each.weight for each in self.searches)
        return search.weight / whole if whole else 0.0

    def by(self, search: Search) -> Callable[[Trial], None]:
        """Return what counts the trials of one search."""

        def told(trial: Trial) -> None:
            self.ended += 1
            if trial.server:
                self.servers[trial.server] = self.servers.get(trial.server, 0) + 1
            if self.progress is not None:
                left = sum(max(each.goal - len(each.times), 0) for each in self.searches)
                each = (time.monotonic() - self.start) / self.ended
                done = len(search.times)
                task, share = search.workload.task, self.share(search)
                self.progress(Progress(task, done, search.goal, search.best, share, each * left))

        return told


def tune(
    model_or_encoding: nn.Module | ExportedProgram | Encoding,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Mapping[str, Any],
    trials: int,
    records: Path | str,
    tracker: str | None = None,
    key: str = "",
    jobs: int | None = None,
    seconds: int = 60,
    progress: Callable[[Progress], None] | None = None,
) -> TuningReport:
    """Find the fastest program of every operator of a model, and record it for this device and target.

    A model is taken at the sizes that it has on `args` and `kwargs`; an encoding in the causal layers whose `Shape`s
    are `args`. `trials` are for each distinct operator; those recorded in the directory `records` count, so that a
    search that was stopped, or killed, goes on where it was. `target` is a tag such as "nvidia/nvidia-h100", a dict, or
    "llvm", the CPU at hand. With the address of a `tracker`, "host:port", programs run on its devices called `key`,
    all at once; one that is lost costs the trials it was running, which others repeat. `jobs` programs are compiled at
    a time, by default one for each core; what takes longer than `seconds` has failed. The winner is compared with the
    definition in float64 before it is recorded. Raises EngineError without TVM or for an unknown target, GrapeError
    where nothing can be tuned.
    """
    place = engine.to_target(target)
    if trials < 1:
        raise GrapeError("tune", f"trials={trials}", "at least one trial for each operator")
    found = found_in(model_or_encoding, args, kwargs or {}, place)
    fleet = None if tracker is None else Fleet(tracker, key)
    if fleet is None:
        _require_device(place)
    with Log(records) as log:
        return search(
            found.workloads,
            place,
            log,
            trials=trials,
            fleet=fleet,
            jobs=jobs,
            seconds=seconds,
            progress=progress,
            left_out=found.left_out,
        )


def _require_device(target: engine.Target) -> None:
    """Raise GrapeError where programs for a target cannot run on this machine."""
    why = bench.why_not_here(str(target))
    if why:
        raise GrapeError(
            f"tune for {target.tag or target.kind.name} on this machine",
            why,
            'tracker="host:port" of a fleet with such devices',
        )
