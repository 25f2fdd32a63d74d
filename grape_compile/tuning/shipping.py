"""Writes the winners that come with the package, for the CPU at hand: `python -m grape_compile.tuning.shipping`.

They hold wherever the target "llvm" reads the same: on CPUs of one kind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch

from grape_compile.encoding import Bias, Encoding, Half, Positions, Rotation, Steps, Table, nope
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.replay import SHIPPED
from grape_compile.kernels.tunable import Shape
from grape_compile.records import Log, Winner
from grape_compile.records.trials import line_of
from grape_compile.tuning.display import shown
from grape_compile.tuning.programs import search
from grape_compile.tuning.tasks import of_encoding

#: Heads and coordinates of a head of the layers of small and of large models, in rows of so many tokens.
HEADS: Final = ((12, 64), (32, 128))
TOKENS: Final = 512


def layers() -> list[tuple[Encoding, Shape]]:
    """Return RoPE by positions and frequencies, ALiBi by slopes, and attention without a bias, as models have them."""
    found: list[tuple[Encoding, Shape]] = []
    for heads, size in HEADS:
        shape = Shape(1, TOKENS, heads, heads, size, torch.float32)
        turned = Rotation(Half(size), Table("inv_freq"), Positions("positions"))
        found += [(each, shape) for each in (turned, Bias(Table("slopes"), Steps()), nope())]
    return found


def main() -> None:
    """Tune the layers and write their winners into the package."""
    parser = argparse.ArgumentParser(description="winners that come with the package")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--records", help="a directory of records to go on with; none: a new one")
    arguments = parser.parse_args()
    target = engine.to_target("llvm")
    works = [
        each for encoding, shape in layers() for each in of_encoding(encoding, [shape], target).workloads
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        Log(arguments.records or folder) as log,
        shown() as progress,
    ):
        report = search(works, target, log, trials=arguments.trials, progress=progress)
    winners = [each.winner for each in report.tasks if each.winner is not None]
    write(winners, SHIPPED)
    sys.stdout.write(f"{report}\n{len(winners)} winners in {SHIPPED}\n")


def write(winners: list[Winner], path: Path) -> None:
    """Replace a file by these winners."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text("".join(f"{line}\n" for line in sorted(map(line_of, winners))), encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
