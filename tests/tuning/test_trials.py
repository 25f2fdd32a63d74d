"""Records of trials: whole lines that check themselves, read past every damage, merged without loss."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from grape_compile.errors import GrapeError
from grape_compile.records import Log, Place, Task, Trial, Winner, merge, read_log
from grape_compile.records.log import FILE
from grape_compile.records.trials import _canonical, line_of, record_of

TASK = Task("rotate", "rotation(half(8), geometric(10000.0), steps)", "x[1,2,4,8]:float32", "float32")
PLACE = Place("a CPU, 1 thread", '{"kind":"llvm"}', "tvm 1")
TRIAL = Trial(
    TASK, PLACE, {"tokens": 4, "lanes": 8}, "abc", (1.5e-05, 1.25e-05), "", "", "2026-11-26T00:00:00Z"
)
FAILED = replace(TRIAL, candidate={"tokens": 8, "lanes": 8}, seconds=(), failure="it crashed")
WINNER = Winner(TASK, PLACE, {"tokens": 4, "lanes": 8}, "abc", 1.25e-05, 2.5e-05, 1e-8, 1e-7, 2, "")


def written(directory: Path, *records: Trial | Winner) -> Path:
    with Log(directory) as log:
        for record in records:
            log.append(record)
    return directory / FILE


@pytest.mark.parametrize("record", [TRIAL, FAILED, WINNER], ids=["trial", "failed", "winner"])
def test_a_line_reads_back(record: Trial | Winner) -> None:
    assert record_of(line_of(record)) == record
    assert "\n" not in line_of(record)


def test_what_was_appended_is_held(tmp_path: Path) -> None:
    written(tmp_path / "deep", TRIAL, FAILED)
    written(tmp_path / "deep", WINNER)
    held = read_log(tmp_path / "deep")
    assert (held.trials, held.winners, held.problems) == ((TRIAL, FAILED), (WINNER,), ())
    assert read_log(tmp_path / "none") == replace(held, trials=(), winners=())


def test_a_line_cut_anywhere_is_dropped_told_of_and_written_over(tmp_path: Path) -> None:
    """A kill can cut the last line at any byte: the lines before it stay, and the next one is whole."""
    last = len(line_of(FAILED))
    for cut in {1, 2, last // 2, last - 1, last}:
        path = written(tmp_path / str(cut), TRIAL)
        with path.open("a") as file:
            file.write(line_of(FAILED)[:cut])
        assert read_log(path.parent).trials == (TRIAL,)
        with Log(path.parent) as log:
            (problem,) = log.held.problems
            assert "not written to its end" in problem
            log.append(WINNER)
        held = read_log(path.parent)
        assert (held.trials, held.winners, held.problems) == ((TRIAL,), (WINNER,), ())


def changed(**fields: Any) -> str:
    """A line with other fields, and the checksum that fits them."""
    content = json.loads(line_of(TRIAL)) | fields
    del content["check"]
    return _canonical({**content, "check": crc32(_canonical(content).encode())})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[]", "not a record"),
        (line_of(TRIAL).replace("1.5e-05", "1.4e-05"), "checksum"),
        (line_of(TRIAL).replace("abc", "abd"), "checksum"),
        (changed(form=2), "form 2"),
        (changed(kind="other"), "kind 'other'"),
        (changed(seconds=[1e10]), "times"),
        (changed(seconds=[-1.0]), "times"),
        (changed(seconds=[]), "neither times nor a failure"),
        (changed(extra=1), "field"),
        (changed(task={}), "field"),
    ],
)
def test_a_line_that_is_no_record_is_skipped_and_told_of(tmp_path: Path, line: str, why: str) -> None:
    path = written(tmp_path, TRIAL)
    with path.open("a") as file:
        file.write(f"{line}\n{line_of(WINNER)}\n")
    held = read_log(tmp_path)
    assert (held.trials, held.winners) == ((TRIAL,), (WINNER,))
    (problem,) = held.problems
    assert "line 2" in problem
    assert why in problem


def test_bytes_that_are_no_text_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, TRIAL)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\n")
    assert read_log(tmp_path).trials == (TRIAL,)
    assert "not text" in read_log(tmp_path).problems[0]


def test_a_wrong_winner_is_no_record() -> None:
    with pytest.raises(ValueError, match="error"):
        record_of(line_of(replace(WINNER, error=2e-7)))
    with pytest.raises(ValueError, match="not JSON compliant"):
        line_of(replace(WINNER, error=math.nan))


@pytest.mark.parametrize("field", ["device", "target", "versions"])
def test_records_of_another_place_are_told_of_and_not_used(tmp_path: Path, field: str) -> None:
    change: dict[str, Any] = {field: "another"}
    other = replace(PLACE, **change)
    written(tmp_path, TRIAL, replace(TRIAL, place=other), replace(WINNER, place=other))
    held = read_log(tmp_path).of(TASK, PLACE)
    assert (held.trials, held.winners) == ((TRIAL,), ())
    (problem,) = held.problems
    assert f"{field} 'another'" in problem
    assert problem.startswith("2 records")
    assert read_log(tmp_path).of(replace(TASK, dtype="float16"), PLACE).problems == ()


def test_the_fastest_winner_comes_first(tmp_path: Path) -> None:
    fast = replace(WINNER, seconds=1e-06)
    written(tmp_path, WINNER, fast)
    assert read_log(tmp_path).of(TASK, PLACE).winners == (fast, WINNER)


def test_one_process_appends(tmp_path: Path) -> None:
    with Log(tmp_path), pytest.raises(GrapeError, match="another process"):
        Log(tmp_path)
    Log(tmp_path).close()


def test_merged_records_are_there_once(tmp_path: Path) -> None:
    written(tmp_path / "a", TRIAL, WINNER)
    path = written(tmp_path / "b", TRIAL, FAILED)
    with path.open("a") as file:
        file.write("{}\n")
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert (merged.trials, merged.winners, merged.twice) == (2, 1, 1)
    assert "line 3" in str(merged)
    held = read_log(tmp_path / "c")
    assert (set(map(line_of, held.trials)), held.winners) == ({line_of(TRIAL), line_of(FAILED)}, (WINNER,))
    again = merge([tmp_path / "a"], tmp_path / "c")
    assert (again.trials, again.winners) == (2, 1)
    assert os.listdir(tmp_path / "c") == [FILE]


def test_a_directory_without_records_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(GrapeError, match="no tuning records"):
        merge([tmp_path / "none"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
