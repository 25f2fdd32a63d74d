"""Records hold for one machine and one code; broken files are told of, a killed write leaves the old one."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grape_compile.records import Key, read, write

KEY = Key("NVIDIA H100", "9.0", "3.7.1", "abc")
CASES = {"turn": {"block": 16, "group": 4, "warps": 4}}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.json"
    write(path, KEY, CASES)
    assert read(path, KEY).cases == CASES
    assert [each.name for each in path.parent.iterdir()] == ["records.json"]


def test_a_missing_file_is_no_problem(tmp_path: Path) -> None:
    found = read(tmp_path / "none.json", KEY)
    assert (found.cases, found.problem) == ({}, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"form": 1}',
        '{"form": 2, "cases": {}}',
        '{"form": 1, "cases": {"turn": 3}}',
        "\x00",
    ],
)
def test_a_broken_file_is_told_of(tmp_path: Path, text: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(text)
    found = read(path, KEY)
    assert not found.cases
    assert str(path) in found.problem
    assert "ignored" in found.problem


@pytest.mark.parametrize("field", ["gpu", "capability", "triton", "source"])
def test_a_foreign_file_is_told_of(tmp_path: Path, field: str) -> None:
    path = tmp_path / "records.json"
    write(path, KEY, CASES)
    change: dict[str, Any] = {field: "other"}
    found = read(path, replace(KEY, **change))
    assert not found.cases
    assert field in found.problem


def _write_for_ever(path: Path) -> None:
    for number in range(10**9):
        write(path, KEY, {f"case {at}": {"number": number} for at in range(200)})


def test_a_killed_write_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
        writer.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        rows = read(path, KEY).cases
        assert len({row["number"] for row in rows.values()}) == 1
        assert len(rows) == 200
        assert json.loads(path.read_text())["form"] == 1
