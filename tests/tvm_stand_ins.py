"""What stands for compilers and devices where a test is about the search alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from grape_compile.encoding import rope
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.bench import Array, Library
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.records import Place
from grape_compile.tuning.running import Outcome
from grape_compile.tuning.workloads import Program, Workload, rotation_workload

PLACE = Place("a CPU, 1 thread", "llvm", "TVM of a test")
Candidate = Mapping[str, int]


def small(tokens: int = 128) -> Workload:
    """The rotation of one head: with 128 tokens, no two candidates are the same program."""
    return rotation_workload(rope(64), Operand((1, 1, tokens, 64)), {}, engine.to_target("llvm"))


class Machine:
    """Stands for a `Runner`: `seconds` says how long a candidate takes, or how it fails; `wrong` ones compute zero."""

    fleet = None

    def __init__(
        self,
        workload: Workload,
        seconds: Callable[[Candidate], float | str],
        wrong: Callable[[Candidate], bool] = lambda candidate: False,
        pause: float = 0.0,
    ) -> None:
        self.workload, self.seconds, self.wrong, self.pause = workload, seconds, wrong, pause
        self.points = {workload.program(each).text: each for each in workload.candidates}
        self.measured: list[Candidate] = []
        self.saved: list[Sequence[Array]] = []

    def build(self, programs: Sequence[Program]) -> list[Library | str]:
        return [Library(each.text, each.function) for each in programs]

    def save(self, arguments: Sequence[Array]) -> Path:
        self.saved.append(arguments)
        return Path(str(len(self.saved) - 1))

    def measure(self, libraries: Sequence[Library], arguments: Path) -> Iterator[tuple[int, Outcome]]:
        for at, library in enumerate(libraries):
            time.sleep(self.pause)
            point = self.points[library.path]
            self.measured.append(point)
            found = self.seconds(point)
            yield at, Outcome((), found) if isinstance(found, str) else Outcome((found, 2 * found, found))

    def compare(self, libraries: Sequence[Library], arguments: Path, rounds: int) -> list[list[float]] | str:
        times = [self.seconds(self.points[each.path]) for each in libraries]
        return [[each] * rounds for each in times if not isinstance(each, str)]

    def compute(self, library: Library, arguments: Path) -> list[Array] | str:
        inputs = self.workload.draw(int(str(arguments)))
        result = self.workload.define(inputs).numpy()
        return [*self.saved[int(str(arguments))][:-1], result * (not self.wrong(self.points[library.path]))]


def product(candidate: Candidate) -> float:
    """Seconds that depend on every choice: the fastest candidate is the one of most tokens and lanes."""
    return float(1e-3 / np.prod(list(candidate.values())))
