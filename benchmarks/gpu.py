"""GPU benchmarks, from a clone without an installation: `python -m benchmarks.gpu rotation --out benchmarks/results/`.

Each case yields rows of JSON; every row has its baselines, timed in the same process after one another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_attention import attention
from benchmarks.gpu_rotation import rotation
from benchmarks.gpu_timing import gpu

CASES: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {"attention": attention, "rotation": rotation}


def run(name: str, folder: Path, *, quick: bool) -> bool:
    """Run one case, print its rows as they come, keep them in `folder/gpu_name.json`; whether all promises hold."""
    rows = []
    for row in CASES[name](quick):
        rows.append(row)
        verdict = {None: "", True: "  holds", False: "  DOES NOT HOLD"}[row["holds"]]
        print(f"{name}: {row['name']}: {row['told']}{verdict}", flush=True)
        document = {
            "case": name,
            "gpu": gpu(),
            "date": time.strftime("%Y-%m-%d"),
            "quick": quick,
            "rows": rows,
        }
        _write(folder / f"gpu_{name}.json", json.dumps(document, indent=1) + "\n")
    return all(row["holds"] is not False for row in rows)


def _write(path: Path, text: str) -> None:
    """All of the file or nothing, after every row: a run that is stopped leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def main() -> None:
    """Run the cases named on the command line; exit 1 where a promise does not hold, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="time the kernels on the GPU at hand")
    parser.add_argument("cases", nargs="+", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("GPU benchmarks need a CUDA device, and there is none", file=sys.stderr)
        raise SystemExit(2)
    warnings.filterwarnings("ignore")
    print(", ".join(f"{key} {value}" for key, value in gpu().items()))
    kept = [run(name, arguments.out, quick=arguments.quick) for name in arguments.cases]
    raise SystemExit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
