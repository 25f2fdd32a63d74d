"""What was tuned, used without tuning: the recorded point of a space, and why a record is not used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from grape_compile.kernels.tensorir import bench, engine
from grape_compile.kernels.tensorir.space import Point, Space
from grape_compile.records import Held, Place, Task, Winner, read_log
from grape_compile.records.log import read_file

#: Winners that come with the package: they hold for CPUs whose target they name.
SHIPPED: Final = Path(__file__).with_name("shipped.jsonl")
#: Sizes that have names, and what they are: the task and the space of a function at those sizes.
At = Callable[[Mapping[str, int]], tuple[Task, Space]]


def hash_of(module: Any) -> str:
    """Return a hash of what a module says."""
    return sha256(module.script().encode()).hexdigest()[:16]


def version_text() -> str:
    """Return the releases that a record holds for."""
    return " ".join(f"{name} {version}" for name, version in engine.versions().items())


class Recorded:
    """The winners of a directory, and those that come with the package, for one target and device.

    `device` is this machine's where its CPU is the target, else the only one that has records for the target. `used`
    are the winners that points were taken from, by the task that asked; `problems` tell of records that are of another
    device, target or release, or of a program that is written differently now: they are not used.
    """

    def __init__(self, target: engine.Target, records: Path | str | None = None, device: str = "") -> None:
        self.target, self._asked = target, device
        self._held = Held() if records is None else read_log(records)
        self.used: dict[Task, Winner] = {}
        self.problems: list[str] = list(self._held.problems)

    def point(self, at: At) -> Point:
        """Return the fastest verified point of a function, or the one by hand.

        A function whose sizes have names takes the point of the largest sizes on record that they can have: block sizes
        are right for every size, and fast for those near by.
        """
        task, space = at({})
        for sizes in self._sizes(task):
            tuned, program = at(sizes)
            for winner in self._winners(tuned):
                if _is_point(winner, program):
                    self.used[task] = winner
                    return dict(winner.candidate)
                self._tell(
                    f"a record of {tuned} is of a program that is written differently now; it is not used"
                )
        return dict(space.hand)

    def _sizes(self, task: Task) -> Iterator[dict[str, int]]:
        """Yield what the named sizes of a task are in the tasks on record, the largest first."""
        if not _named(task):
            yield {}
            return
        known = {each.task for each in (*self._held.winners, *_shipped().winners)}
        fitting = [sizes for each in known if (sizes := bound(task, each)) is not None]
        yield from sorted(
            fitting, key=lambda sizes: (math.prod(sizes.values()), sorted(sizes.items())), reverse=True
        )

    def _winners(self, task: Task) -> Iterator[Winner]:
        found = self._held.of(task, Place(self._device, str(self.target), version_text()))
        for problem in found.problems:
            self._tell(problem)
        yield from found.winners
        for winner in _shipped().winners:
            place = replace(winner.place, device=self._device)
            if winner.task == task and place == Place(self._device, str(self.target), version_text()):
                yield winner

    @cached_property
    def _device(self) -> str:
        if self._asked:
            return self._asked
        if str(self.target) == str(engine.to_target("llvm")):
            return bench.device_here(str(self.target))
        devices = {each.place.device for each in self._held.winners if each.place.target == str(self.target)}
        return devices.pop() if len(devices) == 1 else "one that is named"

    def _tell(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def bound(task: Task, other: Task) -> dict[str, int] | None:
    """Return what the named sizes of a task are in another, whose sizes are known; None where it is not the same.

    >>> known = Task("rotate", "nope", "x[1,8,512,64]:float32", "float32")
    >>> bound(Task("rotate", "nope", "x[b,8,s0,64]:float32", "float32"), known)
    {'b': 1, 's0': 512}
    >>> bound(Task("rotate", "nope", "x[b,b,s0,64]:float32", "float32"), known) is None
    True
    """
    if (task.operator, task.encoding, task.dtype) != (other.operator, other.encoding, other.dtype):
        return None
    sizes: dict[str, int] = {}
    pieces, others = (_SIZES.split(each.sizes) for each in (task, other))
    if len(pieces) != len(others):
        return None
    for number, (piece, known) in enumerate(zip(pieces, others, strict=True)):
        if number % 2 == 0:
            if piece != known:
                return None
            continue
        names, values = piece.split(","), known.split(",")
        if len(names) != len(values):
            return None
        for name, value in zip(names, values, strict=True):
            if name == value:
                continue
            if name.isdecimal() or not value.isdecimal() or sizes.setdefault(name, int(value)) != int(value):
                return None
    return sizes


_SIZES: Final = re.compile(r"\[([^\]]*)\]")


def _named(task: Task) -> bool:
    shapes = _SIZES.findall(task.sizes)
    return any(size and not size.isdecimal() for shape in shapes for size in shape.split(","))


@lru_cache(maxsize=1)
def _shipped() -> Held:
    return read_file(SHIPPED)


def _is_point(winner: Winner, space: Space) -> bool:
    """Whether a winner is a point of a space, and still the program that was verified."""
    point = winner.candidate
    known = dict(point) == dict(space.hand) or (
        point.keys() == space.choices.keys()
        and all(point[name] in values for name, values in space.choices.items())
        and space.fits(point)
    )
    return known and hash_of(space.build(point)) == winner.program
