"""Runs one benchmark case and keeps what it found, for every runner."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def keep(name: str, rows: Iterable[Row], path: Path, about: Row, before: Iterable[Row] = ()) -> bool:
    """Print the rows of a case as they come and keep them in `path`, with `about`; whether all promises hold.

    The file appears after the last row; until then what was measured is in `path` with `.part` behind it. Rows that an
    earlier run left there come `before`.
    """
    held = list(before)
    unfinished = _unfinished(path)
    for row in rows:
        held.append(row)
        verdict = {None: "", True: "  holds", False: "  DOES NOT HOLD"}[row["holds"]]
        print(f"{name}: {row['name']}: {row['told']}{verdict}", flush=True)
        document = {"case": name, **about, "date": time.strftime("%Y-%m-%d"), "rows": held}
        write(unfinished, json.dumps(document, indent=1) + "\n")
    if held:
        os.replace(unfinished, path)
    return all(row["holds"] is not False for row in held)


def left_over(path: Path, about: Row) -> list[Row]:
    """Return the rows that a run with the same `about` left behind when it was stopped; none where there was none."""
    return kept(_unfinished(path), about)


def kept(path: Path, about: Row) -> list[Row]:
    """Return the rows of a file that a run with the same `about` wrote; none where there is none."""
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    same = all(document.get(name) == value for name, value in about.items())
    return list(document["rows"]) if same else []


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write(path: Path, text: str) -> None:
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
