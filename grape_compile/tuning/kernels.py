"""Tuning Triton kernels: compile every configuration, drop what cannot be good, time the rest, keep the best."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from grape_compile.encoding import Encoding, Half, Positions, Rotation, Table
from grape_compile.errors import GrapeError
from grape_compile.kernels.ahead import Usage, usage
from grape_compile.kernels.configuration import capability_of, forget_records, key_of, records_path
from grape_compile.kernels.gates import SHARED_LIMIT
from grape_compile.kernels.launch import missing_triton
from grape_compile.kernels.tunable import MODULES, Case, Family, Shape
from grape_compile.records import Key, read, write
from grape_compile.tuning.timing import microseconds

#: Registers of one multiprocessor, and of one thread at most.
REGISTERS: Final = 65536
#: Bytes that a thread may spill: the fastest tiles of the backward kernels of attention on an H100 spill up to 312.
SPILLED: Final = 512

Timer = Callable[[Case, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Tuned:
    """One case: its best configuration and microseconds, those without a record, and what became of the others."""

    case: str
    configuration: Mapping[str, Any]
    microseconds: float
    default_microseconds: float
    timed: int
    dropped: Mapping[str, int]
    from_record: bool = False


@dataclass(frozen=True)
class KernelReport:
    """What was tuned, and where it is recorded."""

    cases: tuple[Tuned, ...]
    path: Path
    problem: str = ""

    def __str__(self) -> str:
        lines = [self.problem] if self.problem else []
        for tuned in self.cases:
            gain = tuned.default_microseconds / tuned.microseconds
            words = " ".join(f"{name}={value}" for name, value in tuned.configuration.items())
            how = "recorded before" if tuned.from_record else f"best of {tuned.timed}"
            dropped = ", ".join(f"{count} dropped: {why}" for why, count in tuned.dropped.items())
            lines.append(
                f"{tuned.case}: {words}, {tuned.microseconds:.1f} us, {gain:.2f} x as fast as without ({how})"
            )
            lines += [f"  {dropped}"] if dropped else []
        return "\n".join([*lines, f"records: {self.path}"])


def tune_kernels(
    shapes: Sequence[Shape],
    encodings: Sequence[Encoding] = (),
    *,
    records: Path | str | None = None,
    device: torch.device | str = "cuda",
    fresh: bool = False,
) -> KernelReport:
    """Find the fastest configuration of every kernel that these layers need, and record it for this GPU.

    `encodings` are those of the layers; without any, the rotation of halves that most models have. The file, by default
    the one that kernels read, is written after every case, so that a search that was stopped goes on where it was;
    `fresh` starts over. Configurations that spill much, or want more shared memory or registers than there are, are
    dropped before they run. Raises GrapeError without Triton or a GPU.
    """
    if absent := missing_triton():
        raise GrapeError("tune kernels", absent, "Triton and a CUDA device")
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        raise GrapeError(
            f"tune kernels on {place}",
            "no CUDA device",
            "a machine with one: what is timed elsewhere says nothing about it",
        )
    key, capability = key_of(place), capability_of(place)

    def timed(case: Case, configuration: Mapping[str, Any]) -> float:
        return microseconds(case.launch(configuration, place))

    path = records_path(key.gpu) if records is None else Path(records)
    report = search(all_cases(shapes, encodings), key, capability, path, timed, fresh=fresh)
    forget_records()
    return report


def all_cases(shapes: Sequence[Shape], encodings: Sequence[Encoding] = ()) -> list[Case]:
    """Return what these layers need tuned, each case once."""
    found: dict[str, Case] = {}
    for shape in shapes:
        for encoding in encodings or (_usual(shape.head_dim),):
            for family in families():
                found |= {case.name: case for case in family.cases(shape, encoding)}
    return list(found.values())


def families() -> Iterator[Family]:
    """Yield the families of all modules."""
    for module in MODULES:
        yield from import_module(module).FAMILIES


def search(
    cases: Sequence[Case], key: Key, capability: int, path: Path, timed: Timer, *, fresh: bool = False
) -> KernelReport:
    """Tune cases that have no record yet, and write the file after each."""
    before = read(path, key)
    kept = {} if fresh else {name: dict(row) for name, row in before.cases.items()}
    results = []
    for case in cases:
        if case.name in kept and (known := _known(case, kept[case.name])) is not None:
            results.append(known)
            continue
        tuned = _tune(case, capability, timed)
        results.append(tuned)
        kept[case.name] = {
            **tuned.configuration,
            "microseconds": tuned.microseconds,
            "default_microseconds": tuned.default_microseconds,
            "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write(path, key, kept)
    return KernelReport(tuple(results), path, before.problem)


def _known(case: Case, row: Mapping[str, Any]) -> Tuned | None:
    """Return what a row of the records says, or None for one that this case cannot have."""
    configuration = {name: row.get(name) for name in case.space[0]}
    times = [row.get(name) for name in ("microseconds", "default_microseconds")]
    if configuration not in case.space or not all(isinstance(each, float) and each > 0 for each in times):
        return None
    return Tuned(
        case.name, configuration, float(row["microseconds"]), float(row["default_microseconds"]), 0, {}, True
    )


def _tune(case: Case, capability: int, timed: Timer) -> Tuned:
    dropped: Counter[str] = Counter()
    default = case.default(capability)
    times: dict[int, float] = {}
    for at, configuration in enumerate(case.space):
        why = unfit(
            usage(case.launch(configuration, torch.device("meta")), capability), configuration, capability
        )
        if why:
            dropped[why] += 1
        else:
            times[at] = timed(case, configuration)
    without = timed(case, default)
    best = min(times, key=times.__getitem__, default=None)
    if best is None or without <= times[best]:
        return Tuned(case.name, default, without, without, len(times), dict(dropped))
    return Tuned(case.name, case.space[best], times[best], without, len(times), dict(dropped))


def unfit(needs: Usage, configuration: Mapping[str, Any], capability: int) -> str:
    """Return why a configuration is not worth running, or nothing."""
    known = max((each for each in SHARED_LIMIT if each <= capability), default=min(SHARED_LIMIT))
    if needs.stack > SPILLED:
        return f"it spills more than {SPILLED} bytes"
    if needs.shared > SHARED_LIMIT[known]:
        return "it needs more shared memory than a block has"
    if needs.registers * 32 * int(configuration.get("warps", 1)) > REGISTERS:
        return "it needs more registers than a multiprocessor has"
    return ""


def _usual(head_dim: int) -> Rotation:
    return Rotation(Half(head_dim), Table("inv_freq"), Positions("positions"))
