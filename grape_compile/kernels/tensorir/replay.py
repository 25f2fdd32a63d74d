"""What was tuned, used without tuning: the recorded point of a space, and why a record is not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from grape_compile.kernels.tensorir import bench, engine
from grape_compile.kernels.tensorir.space import Point, Space
from grape_compile.records import Held, Place, Task, Winner, read_log
from grape_compile.records.log import read_file

#: Winners that come with the package: they hold for the CPUs that have the features in their target.
SHIPPED: Final = Path(__file__).with_name("shipped.jsonl")


@dataclass(frozen=True)
class Replay:
    """The point to build, the record it is from (None: the point by hand), and what was not used."""

    point: Point
    winner: Winner | None
    problems: tuple[str, ...] = ()


def hash_of(module: Any) -> str:
    """Return a hash of what a module says."""
    return sha256(module.script().encode()).hexdigest()[:16]


def version_text() -> str:
    """Return the releases that a record holds for."""
    return " ".join(f"{name} {version}" for name, version in engine.versions().items())


def best(
    task: Task, space: Space, target: engine.Target, records: Path | str | None = None, device: str = ""
) -> Replay:
    """Return the fastest verified point that is recorded for a task on a device.

    `records` is a directory; without a record in it, or without it, what comes with the package. `device` is this
    machine's where its CPU is the target, else the only one that has records for the target. A record of another
    device, target or release, or of a program that is written differently now, is told of and not used.
    """
    held = Held() if records is None else read_log(records)
    wanted = device or _device(held, task, target)
    found = held.of(task, Place(wanted, str(target), version_text()))
    problems = list(found.problems)
    for winner in (*found.winners, *_shipped(task, target)):
        if _is_point(winner.candidate, space) and hash_of(space.build(winner.candidate)) == winner.program:
            return Replay(dict(winner.candidate), winner, tuple(problems))
        problems.append(f"a record of {task} is of a program that is written differently now; it is not used")
    return Replay(dict(space.hand), None, tuple(problems))


def _device(held: Held, task: Task, target: engine.Target) -> str:
    if str(target) == str(engine.to_target("llvm")):
        return bench.device_here(str(target))
    devices = {each.place.device for each in held.winners if each.task == task and each.place.target == str(target)}
    return devices.pop() if len(devices) == 1 else "a device that is named: several have records"


def _shipped(task: Task, target: engine.Target) -> Sequence[Winner]:
    return [each for each in _all_shipped().winners if each.task == task and each.place.target == str(target)
            and each.place.versions == version_text()]  # fmt: skip


@lru_cache(maxsize=1)
def _all_shipped() -> Held:
    return read_file(SHIPPED)


def _is_point(candidate: Point, space: Space) -> bool:
    return dict(candidate) == dict(space.hand) or (
        candidate.keys() == space.choices.keys()
        and all(candidate[name] in values for name, values in space.choices.items())
        and space.fits(candidate)
    )
