"""Runs benchmark cases and writes what they found: `python -m benchmarks.run cost speed --out benchmarks/results/`."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cost import cost
from benchmarks.kin import kin
from benchmarks.measuring import machine
from benchmarks.speed import speed

CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"cost": cost, "kin": kin, "speed": speed}


def run(name: str, folder: Path) -> bool:
    """Run one case, print its rows as they come and keep them in `folder/name.json`; whether all promises hold."""
    rows = []
    for row in CASES[name]():
        rows.append(row)
        verdict = {None: "", True: "  holds", False: "  DOES NOT HOLD"}[row["holds"]]
        print(f"{name}: {row['name']}: {row['told']}{verdict}", flush=True)
    document = {"case": name, "machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    _write(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
    return all(row["holds"] is not False for row in rows)


def _write(path: Path, text: str) -> None:
    """All of the file or nothing: a run that is interrupted leaves the old result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def main() -> None:
    """Run the cases named on the command line; exit 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description="time what the project claims")
    parser.add_argument("cases", nargs="+", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    kept = [run(name, arguments.out) for name in arguments.cases]
    raise SystemExit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
