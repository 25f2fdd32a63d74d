"""GPU benchmarks, from a clone without an installation: `python -m benchmarks.gpu rotation --out benchmarks/results/`.

Each case yields rows of JSON; every row has its baselines, timed in the same process after one another.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import gpu_attention, gpu_decoding, gpu_rotation
from benchmarks.cases import keep
from benchmarks.gpu_timing import gpu

CASES: Final = {"attention": gpu_attention, "decoding": gpu_decoding, "rotation": gpu_rotation}


def main() -> None:
    """Run the cases named on the command line; exit 1 where a promise does not hold, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="time the kernels on the GPU at hand")
    parser.add_argument("cases", nargs="+", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files"
    )
    parser.add_argument("--rows", default="", help="only rows whose name this regular expression finds")
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("GPU benchmarks need a CUDA device, and there is none", file=sys.stderr)
        raise SystemExit(2)
    warnings.filterwarnings("ignore")
    print(", ".join(f"{key} {value}" for key, value in gpu().items()))
    about = {"gpu": gpu(), "quick": arguments.quick}
    kept = [
        keep(
            name,
            _rows(name, arguments.rows, quick=arguments.quick),
            arguments.out / f"gpu_{name}.json",
            about,
        )
        for name in arguments.cases
    ]
    raise SystemExit(0 if all(kept) else 1)


def _rows(case: str, pattern: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the results of the rows of a case that are wanted."""
    wanted = [row for row in CASES[case].ROWS if re.search(pattern, row.name)]
    for row in dict.fromkeys(row.small() for row in wanted) if quick else wanted:
        yield from CASES[case].measured(row)
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
