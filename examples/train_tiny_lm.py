"""Compares position encodings: byte-level language models trained alike on the sources of the standard library.

Every run has the same budget; runs of one seed have the same bytes in the same order and the same start of all
weights that they share. A killed comparison goes on where it was.

    python examples/train_tiny_lm.py --preset cpu --jobs 2

"cpu" is a million parameters and 21 runs; "gpu" is larger; "quick" shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tiny_lm import MULTIPLES, PRESETS, Settings, TinyLM, checkpoint, corpus, train
from torch import Tensor, nn

from grape_compile.nn import TrainableEncoding
from grape_compile.plotting import plot_encoding

ENCODINGS = ("rope", "alibi", "fox", "grape-a-qk", "grape-ap", "grape-m", "nope")
SEEDS = (0, 1, 2)
#: Encodings of which the middle layer is drawn.
PICTURED = {"grape-m", "fox", "grape-ap"}
Run = tuple[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each of them on one thread of a CPU")
    parser.add_argument("--work", type=Path, default=Path("build/tiny_lm"), help="folder of checkpoints")
    parser.add_argument(
        "--results", type=Path, default=None, help="file of results, tiny_lm.json in the folder"
    )
    parser.add_argument("--figures", type=Path, default=None, help="folder for pictures of what was learned")
    parser.add_argument("--encodings", nargs="+", default=ENCODINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    chosen = parser.parse_args(arguments)
    settings = PRESETS[chosen.preset]
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"preset {chosen.preset!r} trains on a GPU, and torch sees none here")
    results = chosen.results or chosen.work / "tiny_lm.json"
    runs = [(encoding, seed) for seed in chosen.seeds for encoding in chosen.encodings]
    found = [document for run in runs if (document := read(done(run, settings, chosen.work))) is not None]
    about = {"machine": machine(settings.device), "preset": chosen.preset, "planned": len(runs)}
    finished = {(document["encoding"], document["seed"]) for document in found}
    console = Console(stderr=True)
    for document in compared(
        [run for run in runs if run not in finished], settings, chosen.work, chosen.jobs, console
    ):
        found.append(document)
        write(results, about | {"runs": found})
    write(results, about | {"runs": found})
    Console().print(table(found))
    if chosen.figures is not None:
        for encoding in PICTURED & set(chosen.encodings):
            draw_learned((encoding, chosen.seeds[0]), settings, chosen.work, chosen.figures)


def compared(
    runs: Sequence[Run], settings: Settings, work: Path, jobs: int, console: Console
) -> Iterator[dict[str, Any]]:
    """Train all runs in processes of their own; yield what each measured when it is done."""
    if not runs:
        return
    spawn = multiprocessing.get_context("spawn")
    heard: Any = spawn.SimpleQueue()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, TextColumn("{task.fields[bits]} bits per byte"), console=console) as progress,
        ProcessPoolExecutor(jobs, spawn, initializer=prepare, initargs=(heard, settings.device)) as pool,
    ):
        tasks = {
            run: progress.add_task(f"{run[0]}, seed {run[1]}", total=settings.steps, start=False, bits="-")
            for run in runs
        }
        listener = threading.Thread(target=listen, args=(heard, progress, tasks), daemon=True)
        listener.start()
        waiting = [pool.submit(one, run, settings, work) for run in runs]
        for future in as_completed(waiting):
            document = future.result()
            bits = document["bits per byte"]["1"]
            console.log(f"{document['encoding']}, seed {document['seed']}: {bits:.4f} bits per byte")
            yield document
        heard.put(None)
        listener.join()


def listen(heard: Any, progress: Progress, tasks: dict[Run, Any]) -> None:
    """Show what the processes tell until there is nothing more."""
    while (told := heard.get()) is not None:
        run, step, bits = told
        progress.start_task(tasks[run])
        progress.update(tasks[run], completed=step, bits=f"{bits:.3f}")


class Worker:
    """What a process that trains knows: where to tell of its progress, and whose child it is."""

    heard: Any = None
    parent = 0


def prepare(heard: Any, device: str) -> None:
    """Make a process ready for runs."""
    Worker.heard, Worker.parent = heard, os.getppid()
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_float32_matmul_precision("high")


def one(run: Run, settings: Settings, work: Path) -> dict[str, Any]:
    """Train one run in this process and leave its result beside its checkpoint; end when the parent has."""

    def tell(step: int, bits: float) -> None:
        if os.getppid() != Worker.parent:
            # An exception would be caught by the pool, whose processes then wait for a parent that is not there.
            os._exit(1)
        if step % 10 == 0 or step == settings.steps:
            Worker.heard.put((run, step, bits))

    document = train(*run, settings, work, tell)
    write(done(run, settings, work), document)
    return document


def done(run: Run, settings: Settings, work: Path) -> Path:
    return checkpoint(*run, settings, work).with_suffix(".json")


def read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a file beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(rounded(document), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def rounded(value: Any) -> Any:
    """Numbers to four digits behind the point, and lists of numbers in one piece: what a curve needs."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def machine(device: str) -> dict[str, str]:
    chip = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"chip": chip, "torch": torch.__version__, "python": sys.version.split()[0]}


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Mean and spread over the seeds at every length, the best at the training length first."""
    shown = Table("encoding", "seeds", *(f"{multiple}x" for multiple in MULTIPLES), title="bits per byte")
    rows = {}
    for encoding in dict.fromkeys(document["encoding"] for document in found):
        own = [document["bits per byte"] for document in found if document["encoding"] == encoding]
        rows[encoding] = [[bits[str(multiple)] for bits in own] for multiple in MULTIPLES]
    for encoding, columns in sorted(rows.items(), key=lambda row: statistics.mean(row[1][0])):
        cells = [
            f"{statistics.mean(own):.3f} ± {statistics.stdev(own) if len(own) > 1 else 0.0:.3f}"
            for own in columns
        ]
        shown.add_row(encoding, str(len(columns[0])), *cells)
    return shown


def draw_learned(run: Run, settings: Settings, work: Path, folder: Path) -> None:
    """Draw the encoding of the middle layer, before and after training, on the start of the validation text."""
    encoding, seed = run
    torch.manual_seed(seed)
    model = TinyLM(settings, encoding)
    model.start(seed)
    attention = model.blocks[settings.layers // 2].get_submodule("attention")
    seen: list[dict[str, Tensor]] = []

    def look(module: nn.Module, given: tuple[Tensor, ...], slots: dict[str, Tensor]) -> None:
        seen.append({name: slot.detach().clone() for name, slot in slots.items()})

    grape = attention.get_submodule("grape")
    grape.register_forward_hook(look)
    tokens = corpus()[1][None, : settings.length].long()
    with torch.no_grad():
        model(tokens)
        state = torch.load(checkpoint(*run, settings, work), map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        model(tokens)
    assert isinstance(grape, TrainableEncoding)
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot_encoding(grape, seen[1], before=seen[0])
    figure.savefig(folder / f"tiny_lm_{encoding}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
