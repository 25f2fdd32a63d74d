"""Runs benchmark cases and writes what they found: `python -m benchmarks.run cost speed --out benchmarks/results/`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import keep, left_over
from benchmarks.cost import cost
from benchmarks.kin import kin
from benchmarks.measuring import machine
from benchmarks.speed import speed
from benchmarks.upgrading import upgrading
from benchmarks.whole import models

CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "cost": cost,
    "kin": kin,
    "speed": speed,
    "upgrading": upgrading,
}
#: Cases of many minutes, which are told the names of the results that are there.
LONG: dict[str, Callable[[Collection[str]], Iterator[dict[str, Any]]]] = {"models": models}


def main() -> None:
    """Run the cases named on the command line; exit 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description="time what the project claims")
    parser.add_argument(
        "cases", nargs="+", choices=sorted(CASES | LONG), metavar="CASE", help=", ".join(CASES | LONG)
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    kept = [_run(name, arguments.out / f"{name}.json") for name in arguments.cases]
    raise SystemExit(0 if all(kept) else 1)


def _run(name: str, path: Path) -> bool:
    """Run a case; a long one that was stopped on this machine goes on where it was."""
    about = {"machine": machine()}
    if name in CASES:
        return keep(name, CASES[name](), path, about)
    before = left_over(path, about)
    if before:
        print(f"{name}: {len(before)} results of a run that was stopped are kept", flush=True)
    return keep(name, LONG[name]([row["name"] for row in before]), path, about, before)


if __name__ == "__main__":
    main()
