"""The command line: `python -m benchmarks.coverage --only llama,gptj --out somewhere --jobs 2 --resume`."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import write
from benchmarks.coverage.architectures import Architecture, architectures
from benchmarks.coverage.doors import DOORS, SAMPLED
from benchmarks.coverage.page import line_of, page
from benchmarks.coverage.processes import ALWAYS, Record, Task, run_all, warm_up
from benchmarks.coverage.records import append, load
from benchmarks.measuring import machine

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/coverage.md")
COST = "cost.json"


def main() -> None:
    """Run what is asked for, then write the JSON and, for the usual folder, the page."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    lines = arguments.out / "coverage.jsonl"
    if not arguments.resume:
        lines.unlink(missing_ok=True)
    only = [name for name in arguments.only.split(",") if name]
    doors = tuple(door for door in DOORS if door in arguments.doors.split(","))
    start = time.monotonic()
    print("reading the architectures of transformers", flush=True)
    known = list(architectures(only))
    tasks = list(_tasks(known, doors, load(lines), arguments.retry))
    print(f"{len(known)} architectures, {len(tasks)} to do", flush=True)
    warm_up()
    for part in (tasks, None):
        # Which rows are in a sample is known when all rows are.
        part = list(sampled(known, doors, load(lines))) if part is None else part
        done = run_all(part, jobs=arguments.jobs, timeout=arguments.timeout)
        for number, record in enumerate(done, 1):
            append(lines, record)
            print(f"[{number}/{len(part)} {time.monotonic() - start:.0f} s] {line_of(record)}", flush=True)
    records = load(lines)
    document = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [records[name] for name in sorted(records)],
        "cost": _cost(arguments.out / COST),
    }
    write(arguments.out / "coverage.json", json.dumps(document, indent=1, sort_keys=True) + "\n")
    write(arguments.page or (PAGE if arguments.out == RESULTS else arguments.out / PAGE.name), page(document))


def _cost(path: Path) -> list[dict[str, Any]]:
    """What `python -m benchmarks.run cost` measured, where it ran."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if "seconds" in row]


def _tasks(
    known: Iterable[Architecture], doors: tuple[str, ...], done: dict[str, Record], retry: bool
) -> Iterator[Task]:
    for each in known:
        record = done.get(each.name)
        left = tuple(
            door for door in doors if door not in SAMPLED and (record is None or door not in record["doors"])
        )
        if record is not None and "unbuilt" in record and not retry:
            continue
        if record is not None and "truth" in record and not any(record["truth"].values()):
            left = tuple(door for door in left if door in ALWAYS)
        if left:
            yield Task(each, left)


def sampled(
    known: Iterable[Architecture],
    doors: tuple[str, ...],
    done: dict[str, Record],
    sizes: Mapping[str, int] = SAMPLED,
) -> Iterator[Task]:
    """The doors for a sample: one architecture a family, families evenly spaced."""
    families: dict[str, Architecture] = {}
    for each in sorted(known, key=lambda each: each.name):
        if any(done.get(each.name, {}).get("truth", {}).values()):
            families.setdefault(each.module, each)
    names = list(families)
    for door in doors:
        if door in sizes:
            size = min(sizes[door], len(names))
            chosen = (families[names[place * len(names) // size]] for place in range(size))
            yield from (Task(each, (door,)) for each in chosen if door not in done[each.name]["doors"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument(
        "--only", default="", help="model folders or names, with commas: llama,gptj,bloom@6heads"
    )
    parser.add_argument("--doors", default=",".join(DOORS), help="columns to fill, with commas")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of coverage.json and coverage.jsonl"
    )
    parser.add_argument(
        "--page", type=Path, help=f"the table; {PAGE} for the usual folder, else beside the JSON"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per model")
    parser.add_argument("--resume", action="store_true", help="keep the records there are and do the rest")
    parser.add_argument(
        "--retry", action="store_true", help="with --resume: try again what could not be built"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
