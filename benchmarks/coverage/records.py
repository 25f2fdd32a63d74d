"""Records of a run: one line of JSON per finished model, so that a run that is killed loses only what it was doing."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.coverage.processes import Record


def load(path: Path) -> dict[str, Record]:
    """All records by name; a later line adds its doors to an earlier one. A line cut off by a kill is left out."""
    found: dict[str, Record] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record: Record = json.loads(line)
        except json.JSONDecodeError:
            continue
        doors = {**found.get(record["name"], {}).get("doors", {}), **record["doors"]}
        found[record["name"]] = {**record, "doors": doors}
    return found


def append(path: Path, record: Record) -> None:
    """Add one record and see that it reaches the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
