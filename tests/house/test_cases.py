"""What a benchmark run leaves behind when it is stopped, and what the next one makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cases import Row, keep, left_over

HERE, THERE = {"machine": "one"}, {"machine": "another"}


def row(name: str) -> Row:
    return {"name": name, "told": "1 s", "holds": True}


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "case.json"

    def stopped() -> Iterator[Row]:
        yield row("first")
        raise KeyboardInterrupt

    assert left_over(path, HERE) == []
    with pytest.raises(KeyboardInterrupt):
        keep("case", stopped(), path, HERE)
    assert not path.exists()
    assert left_over(path, THERE) == []
    before = left_over(path, HERE)
    assert before == [row("first")]
    assert keep("case", [row("second")], path, HERE, before)
    assert [each["name"] for each in json.loads(path.read_text())["rows"]] == ["first", "second"]
    assert left_over(path, HERE) == []
