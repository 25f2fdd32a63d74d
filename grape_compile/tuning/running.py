"""Compiling and running candidates in processes of their own: one that hangs or crashes costs itself."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from subprocess import DEVNULL
from types import TracebackType
from typing import Any, Final, TypeVar

from grape_compile.errors import first_line
from grape_compile.kernels.tensorir import bench
from grape_compile.kernels.tensorir.bench import Array, Library, Session, Worker, library_ending
from grape_compile.tuning.fleet import Fleet
from grape_compile.tuning.workloads import Program

Result = TypeVar("Result")
#: Programs that one process compiles before another takes its place: compilers do not give all memory back.
USES: Final = 64
#: Devices that a trial is tried on before it counts as failed: the first may have been lost.
ATTEMPTS: Final = 2


@dataclass(frozen=True)
class Outcome:
    """The seconds of one library, one per repetition, or why there are none; and the server that it ran on."""

    seconds: tuple[float, ...] = ()
    failure: str = ""
    server: str = ""


class Processes:
    """Threads with a process each that a call can be given to; a process begins with `ready`."""

    def __init__(
        self, number: int, uses: int | None = None, ready: Callable[[], object] = bench.ready
    ) -> None:
        self._threads, self._uses, self._ready = ThreadPoolExecutor(number), uses, ready
        self._own = threading.local()
        self._all: list[Any] = []

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run a function in one of the threads."""
        return self._threads.submit(function, *args)

    def call(self, seconds: float, function: Callable[..., Result], *args: Any) -> Result:
        """Run a function in the process of this thread; raises what it raises, or how the process ended."""
        worker = self.start()
        worker.send(function, args, None, seconds)
        try:
            result: Result = worker.recv()
        except TimeoutError as failure:
            raise TimeoutError(f"it was not done after {seconds:g} seconds") from failure
        return result

    def start(self) -> Any:
        """Return the process of this thread, which has imported what it needs."""
        if not hasattr(self._own, "worker"):
            worker = Worker(self._ready, maximum_uses=self._uses, stdout=DEVNULL, stderr=DEVNULL)
            self._all.append(worker)
            self._own.worker = worker
            worker.send(self._ready)
            worker.recv()
        return self._own.worker

    def close(self) -> None:
        """End the processes; what still waits is not begun."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.kill()


class Runner:
    """Compiles programs for a target and runs them on this machine, or on the devices of a fleet.

    `jobs` programs are compiled at a time; one program runs on a device at a time. Libraries lie in `folder`,
    which no other runner uses.
    """

    def __init__(self, target: str, folder: Path, fleet: Fleet | None, jobs: int, seconds: int) -> None:
        self.target, self.fleet, self.seconds = target, fleet, seconds
        folder.mkdir(parents=True, exist_ok=True)
        # What a killed search left behind.
        for left in folder.glob("build-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="build-")
        self._ending = library_ending(target, is_here=fleet is None)
        self._numbers = count()
        self._compiling = Processes(jobs, USES)
        self._running = Processes(1 if fleet is None else max(len(fleet), 1))

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compiling.close()
        self._running.close()
        self._folder.cleanup()

    def build(self, programs: Sequence[Program]) -> list[Library | str]:
        """Compile programs; where one cannot be, say why."""

        def build(path: str, program: Program) -> Library | str:
            try:
                self._compiling.call(self.seconds, bench.build, program.text, self.target, path)
            except Exception as failure:
                return f"it cannot be compiled: {first_line(failure)}"
            return Library(path, program.function)

        if not programs:
            return []
        # While the first programs are compiled, what will run them starts.
        self._running.submit(self._running.start)
        waiting = [self._compiling.submit(build, self._path(self._ending), each) for each in programs]
        return [each.result() for each in waiting]

    def save(self, arguments: Sequence[Array]) -> Path:
        """Keep arguments for `measure`, `compare` and `compute`."""
        path = Path(self._path(".npz"))
        bench.save(arguments, path)
        return path

    def _path(self, ending: str) -> str:
        return str(Path(self._folder.name) / f"{next(self._numbers)}{ending}")

    def measure(self, libraries: Sequence[Library], arguments: Path) -> Iterator[tuple[int, Outcome]]:
        """Time each library once, and yield which one it was as soon as it is known."""

        def measure(at: int) -> tuple[int, Outcome]:
            try:
                (times,), server = self._on_a_device(bench.measure, [libraries[at]], str(arguments), 1)
            except _Failure as failure:
                return at, Outcome((), f"it does not run: {failure}", failure.server)
            return at, Outcome(tuple(times), "", server)

        waiting = [self._running.submit(measure, at) for at in range(len(libraries))]
        for each in as_completed(waiting):
            yield each.result()

    def compare(self, libraries: Sequence[Library], arguments: Path, rounds: int) -> list[list[float]] | str:
        """Time libraries in turn on one device; or say why that failed."""
        try:
            times: list[list[float]] = self._running.submit(
                self._on_a_device, bench.measure, list(libraries), str(arguments), rounds
            ).result()[0]
            return times
        except _Failure as failure:
            return str(failure)

    def compute(self, library: Library, arguments: Path) -> list[Array] | str:
        """Return the arguments of a library after one run; or say why that failed."""
        try:
            given = self._running.submit(self._on_a_device, bench.compute, library, str(arguments))
            arrays: list[Array] = given.result()[0]
            return arrays
        except _Failure as failure:
            return str(failure)

    def device(self) -> str:
        """Return what tells this kind of device from others: a GPU's name; a CPU's, or its key, and its threads."""
        if self.fleet is None:
            return bench.device_here(self.target)
        found, _ = self._running.submit(self._on_a_device, bench.device_of).result()
        return f"{self.fleet.key}, {found}" if found.endswith(("thread", "threads")) else found

    def _on_a_device(self, function: Callable[..., Result], *args: Any) -> tuple[Result, str]:
        """Call a function of `bench` in a session; on another device of a fleet where the first attempt fails."""
        # A device does not wait for its process.
        self._running.start()
        for left in reversed(range(1 if self.fleet is None else ATTEMPTS)):
            server = None if self.fleet is None else self.fleet.take()
            name = "" if server is None else str(server)
            session = Session(self.target, server, self.seconds)
            try:
                return self._running.call(self.seconds + 5, function, session, *args), name
            except Exception as failure:
                if not left:
                    raise _Failure(first_line(failure), name) from failure
        raise AssertionError("unreachable")


class _Failure(Exception):
    """What went wrong on the last device that was tried, and its address."""

    def __init__(self, reason: str, server: str) -> None:
        super().__init__(reason)
        self.server = server
