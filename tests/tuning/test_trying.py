"""The search itself, without compilers and devices: what is kept, what is left out, what wins, what a kill costs."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("tvm")

from tvm_stand_ins import PLACE, Candidate, Machine, product, small

from grape_compile.encoding import rope
from grape_compile.kernels.tensorir import replay
from grape_compile.kernels.tensorir.engine import to_target
from grape_compile.records import Log, Winner, read_log
from grape_compile.records.trials import candidate_key
from grape_compile.tuning.proposals import propose
from grape_compile.tuning.trying import Search

WORKLOAD = small()
FASTEST = max(WORKLOAD.candidates, key=lambda each: each["tokens"] * each["lanes"])


def searched(directory: Path, machine: Machine, trials: int) -> Search:
    with Log(directory) as log:
        search = Search(machine.workload, PLACE, log, cast(Any, machine), trials)
        search.measure_untuned(lambda trial: None)
        search.run(lambda trial: None)
    return search


def test_the_untuned_program_comes_first_and_nothing_is_tried_twice() -> None:
    candidates = WORKLOAD.candidates
    times: dict[str, float] = {}
    assert propose(candidates, times, 8, random.Random(0)) == [candidates[0]]
    while len(times) < len(candidates):
        for each in propose(candidates, times, 8, random.Random(len(times))):
            assert candidate_key(each) not in times
            times[candidate_key(each)] = product(each)
    assert propose(candidates, times, 8, random.Random(0)) == []


def test_the_model_finds_the_fastest_of_many_sooner_than_chance() -> None:
    """4096 candidates whose times are a product of four factors: 64 draws find one of the best 16 with 22 % chance."""
    space = [
        {"a": a, "b": b, "c": c, "d": d}
        for a in range(8)
        for b in range(8)
        for c in range(8)
        for d in range(8)
    ]
    ranks = sorted(space, key=lambda each: sum((value - 5) ** 2 for value in each.values()))
    best = [candidate_key(each) for each in ranks[:16]]
    found = 0
    for seed in range(5):
        times: dict[str, float] = {}
        while len(times) < 64:
            for each in propose(space, times, 8, random.Random(f"{seed} {len(times)}")):
                times[candidate_key(each)] = 1e-3 * 1.2 ** sum((value - 5) ** 2 for value in each.values())
        found += any(key in times for key in best)
    assert found >= 4


def test_the_fastest_wins_and_is_replayed(tmp_path: Path) -> None:
    search = searched(tmp_path, Machine(WORKLOAD, product), len(WORKLOAD.candidates))
    assert search.winner is not None
    assert product(search.winner.candidate) == product(FASTEST)
    assert search.winner.error <= search.winner.allowed < 1e-5
    again = searched(tmp_path, machine := Machine(WORKLOAD, product), len(WORKLOAD.candidates))
    assert again.winner == search.winner
    assert not machine.measured


def test_candidates_that_are_the_same_program_are_measured_once(tmp_path: Path) -> None:
    """Tiles of 8 tokens and more are the same where there are 8 tokens."""
    workload = small(tokens=8)
    search = searched(tmp_path, machine := Machine(workload, product), len(workload.candidates))
    assert {workload.program(each).hash for each in workload.candidates} == {
        each.program for each in read_log(tmp_path).trials
    }
    assert len(machine.measured) == len(read_log(tmp_path).trials) < len(workload.candidates)
    assert search.winner is not None


def test_what_fails_is_recorded_once_and_never_wins(tmp_path: Path) -> None:
    def seconds(candidate: Candidate) -> float | str:
        return "it crashed" if candidate["tokens"] == FASTEST["tokens"] else product(candidate)

    search = searched(tmp_path, Machine(WORKLOAD, seconds), len(WORKLOAD.candidates))
    assert search.winner is not None
    assert search.winner.candidate["tokens"] != FASTEST["tokens"]
    failed = [each for each in read_log(tmp_path).trials if each.failure]
    assert failed
    assert {each.candidate["tokens"] for each in failed} == {FASTEST["tokens"]}
    again = searched(tmp_path, machine := Machine(WORKLOAD, seconds), len(WORKLOAD.candidates))
    assert not machine.measured
    assert again.winner == search.winner


def test_a_fast_program_that_computes_something_else_is_no_winner(tmp_path: Path) -> None:
    """The winner is held to the definition: the fastest is wrong here, and the next one wins."""

    def wrong(candidate: Candidate) -> bool:
        return product(candidate) == product(FASTEST)

    search = searched(tmp_path, Machine(WORKLOAD, product, wrong), len(WORKLOAD.candidates))
    assert search.winner is not None
    assert not wrong(search.winner.candidate)
    assert any("its error is" in each.failure for each in read_log(tmp_path).trials)
    nothing = searched(tmp_path / "all", Machine(WORKLOAD, product, lambda each: True), 4)
    assert nothing.winner is None
    assert "wrong" in nothing.why_none
    assert not read_log(tmp_path / "all").winners


def test_trials_of_programs_that_changed_are_told_of_and_repeated(tmp_path: Path) -> None:
    searched(tmp_path, Machine(WORKLOAD, product), 6)
    old = read_log(tmp_path)
    with Log(tmp_path / "other") as log:
        for trial in old.trials:
            log.append(replace(trial, program="of another text"))
        for winner in old.winners:
            log.append(replace(winner, program="of another text"))
    search = searched(tmp_path / "other", machine := Machine(WORKLOAD, product), 6)
    assert len(machine.measured) == 6
    assert any("written differently now" in problem for problem in search.problems)


@pytest.fixture
def recorded(tmp_path: Path) -> Winner:
    """A directory with a winner for the CPU at hand."""
    target = to_target("llvm")
    place = replace(PLACE, device="here", target=str(target), versions=replay.version_text())
    with Log(tmp_path) as log:
        search = Search(WORKLOAD, place, log, cast(Any, Machine(WORKLOAD, product)), 28)
        search.run(lambda trial: None)
    assert search.winner is not None
    return search.winner


def replayed(directory: Path | None, device: str = "here") -> tuple[dict[str, int], replay.Recorded]:
    recorded = replay.Recorded(to_target("llvm"), directory, device)
    return dict(recorded.point(lambda sizes: (WORKLOAD.task, WORKLOAD.space))), recorded


def test_a_record_is_replayed(tmp_path: Path, recorded: Winner) -> None:
    point, found = replayed(tmp_path)
    assert (point, found.used, found.problems) == (recorded.candidate, {WORKLOAD.task: recorded}, [])


def test_a_record_serves_every_length(tmp_path: Path, recorded: Winner) -> None:
    """A function of open length takes the point of a known one; another head is another function."""
    from grape_compile.kernels.tensorir.operands import Operand
    from grape_compile.kernels.tensorir.rotation import rotation_space
    from grape_compile.kernels.tensorir.tasks import rotation_task, sized

    def at(heads: int) -> replay.At:
        def sizes_known(sizes: Any) -> Any:
            operand = sized(Operand(("batch", heads, "s0", 64)), sizes)
            return rotation_task(rope(64), operand, {}), rotation_space(
                rope(64), operand, {}, to_target("llvm")
            )

        return sizes_known

    found = replay.Recorded(to_target("llvm"), tmp_path, "here")
    assert dict(found.point(at(1))) == recorded.candidate
    assert list(found.used.values()) == [recorded]
    assert dict(found.point(at(2))) == dict(WORKLOAD.space.hand)


def test_what_does_not_hold_is_told_of_and_not_replayed(tmp_path: Path, recorded: Winner) -> None:
    def only(winner: Winner, name: str) -> Path:
        with Log(tmp_path / name) as log:
            log.append(winner)
        return tmp_path / name

    point, found = replayed(tmp_path, "another CPU")
    assert (point, found.used) == (WORKLOAD.space.hand, {})
    assert "'here', not 'another CPU'" in " ".join(found.problems)
    for name, change in {
        "stale": replace(recorded, program="of another text"),
        "no point": replace(recorded, candidate={"tokens": 3, "lanes": 5}),
        "version": replace(recorded, place=replace(recorded.place, versions="tvm 0.1")),
    }.items():
        point, found = replayed(only(change, name))
        assert (point, found.used) == (WORKLOAD.space.hand, {})
        assert "not used" in found.problems[0]
    assert not replayed(None)[1].used


def _search_for_ever(directory: Path) -> None:
    searched(directory, Machine(WORKLOAD, product, pause=0.01), len(WORKLOAD.candidates))


def killed_at(directory: Path, times: int, seed: int) -> None:
    """Kill a search `times` times at random moments; what was finished stays, in order, and is not repeated."""
    draws, before = random.Random(seed), 0
    for _ in range(times):
        process = multiprocessing.get_context("fork").Process(target=_search_for_ever, args=(directory,))
        process.start()
        end = time.monotonic() + 30
        while process.is_alive() and len(read_log(directory).trials) <= before and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(draws.random() * 0.03)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        held = read_log(directory)
        keys = [candidate_key(each.candidate) for each in held.trials]
        assert len(keys) == len(set(keys))
        assert len(keys) > before
        before = len(keys)
    assert before < len(WORKLOAD.candidates)
    search = searched(directory, machine := Machine(WORKLOAD, product), len(WORKLOAD.candidates))
    assert search.recorded >= before
    assert search.recorded + len(machine.measured) <= len(WORKLOAD.candidates)
    assert search.winner is not None
    assert product(search.winner.candidate) == product(FASTEST)


def test_kills_cost_what_was_running(tmp_path: Path) -> None:
    killed_at(tmp_path, 3, 0)
