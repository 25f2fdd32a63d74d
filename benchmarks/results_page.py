"""Writes docs/results.md from what examples/train_tiny_lm.py measured: `python -m benchmarks.results_page`.

The figures need the extra `docs`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from benchmarks.cases import write

#: Seven-task average of the models of 355 million parameters (GRAPE 4, arXiv 2512.07805): what is better comes first.
PAPER: Final = {
    "grape-ap": 53.25,
    "grape-a-qk": 53.00,
    "fox": 52.96,
    "alibi": 52.87,
    "grape-m": 51.79,
    "rope": 51.73,
}
SHOWN: Final = {
    "rope": "RoPE",
    "alibi": "ALiBi",
    "fox": "FoX",
    "grape-a-qk": "GRAPE-A-QK",
    "grape-ap": "GRAPE-AP",
    "grape-m": "GRAPE-M",
    "nope": "NoPE",
}
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
PICTURES: Final = {
    "grape-m": "Spectrum of GRAPE-M in the middle layer",
    "fox": "Forget gates of FoX in the middle layer",
    "grape-ap": "Paths of GRAPE-AP in the middle layer",
}
TITLE: Final = """# Encodings compared by training

Language models of bytes, alike but for their position encoding, trained on the sources of Python's standard library
by [`examples/train_tiny_lm.py`](../examples/train_tiny_lm.py). This page is made by `make results`.

* {parameters} parameters: {layers} layers of {width} channels, {heads} heads; contexts of {length} bytes.
* {steps} steps of {batch} contexts, {read:.2f} million bytes read in all; AdamW, warm-up, then a cosine.
* Every tenth file, chosen by its name, is kept for validation. All lengths see the same bytes of them.
* Seeds {seeds}; runs of one seed read the same bytes in the same order and start from the same weights.
* Learning rate and size of a batch were chosen with RoPE and another seed.
* The {count} runs trained for {minutes:.0f} minutes together, each in a process of its own on one thread; {machine}.

"""


@dataclass(frozen=True)
class Measured:
    """The bits per byte of one encoding, by seed and multiple of the training length."""

    encoding: str
    by_seed: Mapping[int, Mapping[str, float]]

    def at(self, multiple: str) -> list[float]:
        """One number for each seed."""
        return [bits[multiple] for bits in self.by_seed.values()]

    def mean(self, multiple: str) -> float:
        return statistics.mean(self.at(multiple))

    def cell(self, multiple: str) -> str:
        """Mean and standard deviation over the seeds."""
        numbers = self.at(multiple)
        spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
        return f"{statistics.mean(numbers):.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results, draw the figures, write the page."""
    parser = argparse.ArgumentParser(description="write the page of the comparison by training")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/tiny_lm.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    chosen = parser.parse_args(arguments)
    document = json.loads(chosen.results.read_text(encoding="utf-8"))
    folder = chosen.page.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    draw(document["runs"], folder)
    write(chosen.page, text(document, folder))


def measured(runs: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """The encodings of a comparison, the best at the training length first."""
    found = [
        Measured(name, {run["seed"]: run["bits per byte"] for run in runs if run["encoding"] == name})
        for name in dict.fromkeys(run["encoding"] for run in runs)
    ]
    return sorted(found, key=lambda each: each.mean("1"))


def text(document: Mapping[str, Any], figures: Path) -> str:
    """The page; `figures` is the folder of pictures."""
    runs = document["runs"]
    settings, found = runs[0]["settings"], measured(runs)
    seeds = sorted({run["seed"] for run in runs})
    head = TITLE.format(
        **settings,
        parameters=f"{min(run['parameters'] for run in runs):,} to {max(run['parameters'] for run in runs):,}",
        read=settings["steps"] * settings["batch"] * settings["length"] / 1e6,
        seeds=", ".join(map(str, seeds)),
        count=len(runs),
        minutes=sum(run["seconds"] for run in runs) / 60,
        machine=", ".join(f"{key} {value}" for key, value in document["machine"].items()),
    )
    if len(runs) < document.get("planned", 0):
        head += f"**Not finished: {len(runs)} of {document['planned']} runs so far.**\n\n"
    # The mean of the cosine schedule is 0.55 of the largest rate.
    share = 0.55 * settings["steps"] * settings["rate"] / 16
    body = [
        *_table(found),
        "",
        *_figures(),
        "",
        *_order(found),
        "",
        *_lengths(found),
        "",
        *_learned(figures, share),
    ]
    return head + "\n".join(body).rstrip() + "\n"


def _learned(folder: Path, share: float) -> Iterator[str]:
    """Pictures that the comparison drew of its checkpoints."""
    pictures = {name: title for name, title in PICTURES.items() if (folder / f"tiny_lm_{name}.png").exists()}
    if not pictures:
        return
    yield "## What was learned"
    yield ""
    yield "Drawn by `plot_encoding` of seed 0, in grey before training; contents are those of a validation file."
    yield (
        "Adam moves a parameter by about its learning rate in a step, so that `log_theta / 16` moves by at most "
        f"{share:.0%} in all: in this budget GRAPE-M stays close to RoPE."
    )
    for name, title in pictures.items():
        yield ""
        yield f"![{title}](figures/tiny_lm_{name}.png)"


def _table(found: Sequence[Measured]) -> Iterator[str]:
    multiples = list(next(iter(found[0].by_seed.values())))
    yield "Bits per byte, mean and standard deviation over the seeds, at multiples of the training length:"
    yield ""
    yield "| encoding | runs | " + " | ".join(f"{multiple}x" for multiple in multiples) + " |"
    yield "|---|---:|" + "---:|" * len(multiples)
    for each in found:
        cells = " | ".join(each.cell(multiple) for multiple in multiples)
        yield f"| {SHOWN[each.encoding]} | {len(each.by_seed)} | {cells} |"


def _figures() -> Iterator[str]:
    yield "![Loss while training](figures/tiny_lm_curves.png)"
    yield ""
    yield "![Loss beyond the training length](figures/tiny_lm_lengths.png)"


def _order(found: Sequence[Measured]) -> Iterator[str]:
    """What the order at the training length has in common with the paper's."""
    by_name = {each.encoding: each for each in found}
    compared = [name for name in PAPER if name in by_name]
    verdicts: dict[str, list[str]] = {"agree": [], "disagree": [], "open": []}
    for better, worse in combinations(compared, 2):
        verdicts[_verdict(by_name[better], by_name[worse])].append(f"{SHOWN[better]} before {SHOWN[worse]}")
    yield "## Beside the paper"
    yield ""
    yield (
        "The authors train models of 355 million parameters on 50 billion tokens and rank them by seven tasks: "
        + ", ".join(f"{SHOWN[name]} {PAPER[name]:.2f}" for name in compared)
        + ". Here the order at the training length is "
        + ", ".join(SHOWN[each.encoding] for each in found)
        + "."
    )
    yield ""
    yield (
        f"Of the {sum(map(len, verdicts.values()))} pairs that the paper orders, {len(verdicts['agree'])} come out in "
        f"its order, {len(verdicts['disagree'])} the other way round, and {len(verdicts['open'])} differ by less than "
        "twice the standard error of their difference, taken seed by seed."
    )
    for verdict, title in (("disagree", "The other way round"), ("open", "Open")):
        if verdicts[verdict]:
            yield ""
            yield f"{title}: {'; '.join(verdicts[verdict])}."
    yield ""
    yield (
        "The budgets are five orders of magnitude apart, and the loss on source code of a model that has read about a "
        "megabyte is not the accuracy of a trained language model. The table shows what these encodings do at this "
        "size, and does not reproduce the paper."
    )


def _verdict(better: Measured, worse: Measured) -> str:
    seeds = better.by_seed.keys() & worse.by_seed.keys()
    gaps = [worse.by_seed[seed]["1"] - better.by_seed[seed]["1"] for seed in sorted(seeds)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    gap = statistics.mean(gaps) if gaps else 0.0
    return "open" if abs(gap) <= 2 * error else "agree" if gap > 0 else "disagree"


def _lengths(found: Sequence[Measured]) -> Iterator[str]:
    """Who reads on beyond the training length."""
    last = list(next(iter(found[0].by_seed.values())))[-1]
    ahead = [SHOWN[each.encoding] for each in found if each.mean(last) <= each.mean("1")]
    behind = sorted(
        (each for each in found if each.mean(last) > each.mean("1")),
        key=lambda each: each.mean(last) - each.mean("1"),
    )
    lost = [f"{SHOWN[each.encoding]} +{each.mean(last) - each.mean('1'):.2f}" for each in behind]
    yield "## Beyond the training length"
    yield ""
    yield (
        f"At {last} times the training length a byte costs no more bits with {_listed(ahead)}, and more with "
        f"{_listed(lost)}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def draw(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Loss while training, and loss at every length; bands are the smallest and the largest of the seeds."""
    from matplotlib.figure import Figure

    colours = dict(zip(SHOWN, COLOURS, strict=True))
    found = measured(runs)
    curves = Figure(figsize=(8, 4), layout="constrained")
    axes = curves.subplots()
    for each in found:
        lines = [run["validation"] for run in runs if run["encoding"] == each.encoding]
        steps = [step for step, _ in lines[0]]
        values = [[line[at][1] for line in lines] for at in range(len(steps))]
        _band(axes, steps, values, colours[each.encoding], SHOWN[each.encoding])
    _finish(axes, "step", "bits per byte of files kept out")
    axes.set_ylim(top=min(axes.get_ylim()[1], 4.0))
    curves.savefig(folder / "tiny_lm_curves.png", dpi=130, metadata={"Software": None})
    lengths = Figure(figsize=(8, 4), layout="constrained")
    axes = lengths.subplots()
    trained_at = runs[0]["settings"]["length"]
    multiples = list(runs[0]["bits per byte"])
    tokens = [trained_at * int(multiple) for multiple in multiples]
    for each in found:
        values = [each.at(multiple) for multiple in multiples]
        _band(axes, tokens, values, colours[each.encoding], SHOWN[each.encoding])
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        tokens, [f"{count}\n{multiple}x" for count, multiple in zip(tokens, multiples, strict=True)]
    )
    axes.axvline(trained_at, color="#bbbbbb", linewidth=0.8)
    _finish(axes, "bytes of context", "bits per byte")
    lengths.savefig(folder / "tiny_lm_lengths.png", dpi=130, metadata={"Software": None})


def _band(
    axes: Any, across: Sequence[int], values: Sequence[Sequence[float]], colour: str, name: str
) -> None:
    axes.plot(across, [statistics.mean(own) for own in values], "o-", color=colour, markersize=3, label=name)
    axes.fill_between(
        across, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0
    )


def _finish(axes: Any, across: str, up: str) -> None:
    axes.set(xlabel=across, ylabel=up)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
