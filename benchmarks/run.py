"""Runs benchmark cases and writes what they found: `python -m benchmarks.run cost speed --out benchmarks/results/`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import keep
from benchmarks.cost import cost
from benchmarks.kin import kin
from benchmarks.measuring import machine
from benchmarks.speed import speed
from benchmarks.upgrading import upgrading
from benchmarks.whole import models

CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "cost": cost,
    "kin": kin,
    "models": models,
    "speed": speed,
    "upgrading": upgrading,
}


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
    kept = [
        keep(name, CASES[name](), arguments.out / f"{name}.json", {"machine": machine()})
        for name in arguments.cases
    ]
    raise SystemExit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
