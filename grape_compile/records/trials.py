"""What tuning measured: trials of one candidate each and winners, as lines of text that check themselves."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypeVar
from zlib import crc32

#: Version of the form of a line.
FORM: Final = 1
#: From here on a time is none: TVM writes 1e10 seconds where a candidate could not be built or run.
NO_TIME: Final = 1e9


@dataclass(frozen=True)
class Task:
    """What is tuned: an operator with the text of its encoding, its sizes and its dtype."""

    operator: str
    encoding: str
    sizes: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.operator} {self.encoding} {self.sizes} {self.dtype}"


@dataclass(frozen=True)
class Place:
    """Where something was measured: another device, target or compiler may want another program."""

    device: str
    target: str
    versions: str


@dataclass(frozen=True)
class Trial:
    """One candidate, measured once: its `seconds`, one per repetition, or the `failure` that it has instead.

    `program` is the hash of the program that the candidate was when it was measured, `server` the address of the
    machine of a fleet, `when` a date in UTC.
    """

    task: Task
    place: Place
    candidate: Mapping[str, Any]
    program: str
    seconds: tuple[float, ...]
    failure: str = ""
    server: str = ""
    when: str = ""


@dataclass(frozen=True)
class Winner:
    """The candidate that is used: its seconds and those of the untuned program, measured side by side.

    `error` is the relative RMS error against the definition in float64, the largest over the seeds, and `allowed` what
    it may be.
    """

    task: Task
    place: Place
    candidate: Mapping[str, Any]
    program: str
    seconds: float
    untuned: float
    error: float
    allowed: float
    trials: int
    when: str = ""


Record = Trial | Winner
Kind = TypeVar("Kind", Trial, Winner)
_KINDS: Final[dict[str, type[Trial] | type[Winner]]] = {"trial": Trial, "winner": Winner}


def candidate_key(candidate: Mapping[str, Any]) -> str:
    """Return one text for candidates that are the same."""
    return _canonical(candidate)


def line_of(record: Record) -> str:
    """Return a record as one line, without its end."""
    content = {"form": FORM, "kind": type(record).__name__.lower(), **asdict(record)}
    return _canonical({**content, "check": crc32(_canonical(content).encode())})


def record_of(line: str) -> Record:
    """Return the record of a line, or raise ValueError with what is wrong."""
    try:
        content = json.loads(line)
    except ValueError as failure:
        raise ValueError("it is not JSON") from failure
    if not isinstance(content, dict):
        raise ValueError("it is not a record")
    check = content.pop("check", None)
    if check != crc32(_canonical(content).encode()):
        raise ValueError("its checksum does not fit")
    form, kind = content.pop("form", None), content.pop("kind", None)
    if form != FORM or kind not in _KINDS:
        raise ValueError(f"it has form {form!r} and kind {kind!r}, not form {FORM}")
    return _read(_KINDS[kind], content)


def _read(kind: type[Trial] | type[Winner], content: dict[str, Any]) -> Record:
    try:
        task, place = Task(**content.pop("task")), Place(**content.pop("place"))
        record: Record
        if kind is Trial:
            record = Trial(task, place, **{**content, "seconds": tuple(content["seconds"])})
        else:
            record = Winner(task, place, **content)
    except (TypeError, KeyError) as failure:
        raise ValueError("it lacks a field or has one too many") from failure
    # What the file holds may be of any type.
    times: Sequence[Any] = record.seconds if isinstance(record, Trial) else (record.seconds, record.untuned)
    if not all(isinstance(each, float) and 0 < each < NO_TIME for each in times):
        raise ValueError("its times are none")
    if isinstance(record, Trial) and bool(record.seconds) == bool(record.failure):
        raise ValueError("it has neither times nor a failure, or both")
    if isinstance(record, Winner) and not record.error <= record.allowed < math.inf:
        raise ValueError("its error is above what is allowed")
    return record


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Held:
    """What a directory of records holds, and sentences about what of it cannot be used."""

    trials: tuple[Trial, ...] = ()
    winners: tuple[Winner, ...] = ()
    problems: tuple[str, ...] = ()

    def of(self, task: Task, place: Place) -> Held:
        """Return what holds for a task in a place, and a sentence for each other place that has records of it."""
        trials, winners = list(_for(self.trials, task)), list(_for(self.winners, task))
        places = [each.place for each in trials] + [each.place for each in winners]
        others = Counter(each for each in places if each != place)
        told = [f"{count} records of {task} are for {_apart(other, place)}; they are not used"
                for other, count in others.items()]  # fmt: skip
        return Held(
            tuple(each for each in trials if each.place == place),
            tuple(sorted((each for each in winners if each.place == place), key=lambda each: each.seconds)),
            (*self.problems, *told),
        )


def _for(records: Sequence[Kind], task: Task) -> Iterator[Kind]:
    return (record for record in records if record.task == task)


def _apart(found: Place, wanted: Place) -> str:
    names = [each.name for each in fields(Place)]
    apart = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    return "; ".join(f"{name} {getattr(found, name)!r}, not {getattr(wanted, name)!r}" for name in apart)
