"""A directory of tuning records: one file that only grows, a whole line at a time, so that no kill can break it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from grape_compile.errors import GrapeError
from grape_compile.records.trials import Held, Record, Trial, Winner, line_of, record_of

#: The file of a directory of records.
FILE: Final = "trials.jsonl"
#: Lines that a sentence about corrupt ones names.
_NAMED: Final = 5


def read_log(directory: Path | str) -> Held:
    """Return what a directory holds: nothing for one that is not there; lines that are no records are told of."""
    return read_file(Path(directory) / FILE)


def read_file(path: Path) -> Held:
    """Return what a file of records holds."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Held()
    except OSError as failure:
        return Held(problems=(f"{path} cannot be read ({failure}); it is ignored",))
    trials: list[Trial] = []
    winners: list[Winner] = []
    wrong: dict[str, list[int]] = {}
    *lines, torn = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = record_of(line.decode("utf-8"))
        except ValueError as failure:
            why = "it is not text" if isinstance(failure, UnicodeDecodeError) else str(failure)
            wrong.setdefault(why, []).append(number)
            continue
        if isinstance(record, Trial):
            trials.append(record)
        else:
            winners.append(record)
    problems = [_told(path, why, numbers) for why, numbers in wrong.items()]
    if torn:
        problems.append(f"{path}: the last line was not written to its end; it is dropped")
    return Held(tuple(trials), tuple(winners), tuple(problems))


def _told(path: Path, why: str, numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:_NAMED])) + (" and more" if len(numbers) > _NAMED else "")
    return f"{path}: {len(numbers)} of its lines are skipped, {why} (line {named})"


class Log:
    """A directory of records, open for one process to append to; each record is on the disk when `append` returns.

    Raises GrapeError where another process appends to it.
    """

    def __init__(self, directory: Path | str) -> None:
        self.path = Path(directory) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if not self._locked():
            os.close(self._file)
            raise GrapeError(
                f"record tuning in {directory}",
                "another process records there",
                "a directory of its own for each process; grape-compile tune --merge puts them together",
            )
        self.held = read_file(self.path)
        self._drop_torn_line()

    def append(self, record: Record) -> None:
        """Write one record, and return when a loss of power would not lose it."""
        line = (line_of(record) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: the disk took only a part of a record")
        os.fsync(self._file)

    def close(self) -> None:
        """Let others append."""
        os.close(self._file)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locked(self) -> bool:
        """Take the file for this process alone; False where another has it, or has just replaced it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return os.fstat(self._file).st_ino == self.path.stat().st_ino

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.ftruncate(self._file, content.rfind(b"\n") + 1)
            os.fsync(self._file)


@dataclass(frozen=True)
class Merged:
    """What a merge put together, and sentences about what it left out."""

    path: Path
    trials: int
    winners: int
    twice: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        told = f"{self.trials} trials and {self.winners} winners in {self.path}"
        return "\n".join([*self.problems, told + (f"; {self.twice} were there twice" if self.twice else "")])


def merge(sources: Iterable[Path | str], into: Path | str) -> Merged:
    """Put the records of several directories into one, which keeps what it held.

    Each record is kept once, corrupt lines are left out and told of; the file is replaced as a whole or not at all.
    Raises GrapeError for a source without records.
    """
    lines: dict[str, Record] = {}
    problems: list[str] = []
    count = 0
    given = [Path(each) for each in sources]
    for source in given:
        if not (source / FILE).is_file():
            raise GrapeError(f"merge {source}", "no tuning records", f"a directory that holds {FILE}")
    with Log(into) as target:
        for held in (target.held, *map(read_log, given)):
            problems += held.problems
            records: list[Record] = [*held.trials, *held.winners]
            lines |= {line_of(record): record for record in records}
            count += len(records)
        unfinished = target.path.with_name(f".{FILE}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    winners = sum(isinstance(record, Winner) for record in lines.values())
    return Merged(target.path, len(lines) - winners, winners, count - len(lines), tuple(problems))
