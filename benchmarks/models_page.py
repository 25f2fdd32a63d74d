"""Writes what case `models` found as a page with a picture: `python -m benchmarks.models_page`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import write
from benchmarks.whole import ALONE, EAGER, OURS

RESULTS = Path("benchmarks/results/models.json")
PAGE = Path("docs/models.md")
PICTURE = Path("docs/figures/models.png")
COLOURS = {EAGER: "#999999", ALONE: "#0072B2", OURS: "#009E73"}
TITLE = """# Whole models

What a user of a whole model sees, beside eager mode and `torch.compile`. Written by `make models` from a run on {date}:
{machine}. Random weights; the three ways of a row take turns in one process, and a cell is the median of {rounds} runs.
Time on a CPU is processor time of one thread.

* **prefill**: a forward pass over {prompt} tokens, no cache.
* **decode**: {steps} tokens one after the other, from a cache of {prompt}.
* **train**: forward, backward and a step of AdamW over {prompt} tokens.

The models have {layers} layers of {hidden} channels and {heads} heads, {dtype} on {device}. FoX and GRAPE-AP are
written as in research code: dense, tokens by tokens. Memory is the peak of a run beyond what was there before it.

![Tokens per second against torch.compile](figures/models.png)
"""


def page(document: dict[str, Any]) -> str:
    """The page of a run: one row per family and activity."""
    scale = document["rows"][0]["scale"]
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    return (
        "\n".join([TITLE.format(date=document["date"], machine=machine, **scale), *_table(document["rows"])])
        + "\n"
    )


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| model | sites | "
        + " | ".join(f"{way}, tokens/s" for way in COLOURS)
        + " | ratio | "
        + (" | ".join(f"{way}, MiB" for way in COLOURS) + " |")
    )
    yield "|---|" + "---:|" * (2 + 2 * len(COLOURS))
    for row in rows:
        speed = (f"{row['tokens per second'][way]:,.0f}" for way in COLOURS)
        memory = ("" if row["peak MiB"][way] is None else f"{row['peak MiB'][way]:,.0f}" for way in COLOURS)
        yield f"| {row['name']} | {row['sites']} | {' | '.join(speed)} | {row['ratio']:.2f} x | {' | '.join(memory)} |"


def draw(document: dict[str, Any], path: Path) -> None:
    """Tokens per second of every way as a multiple of `torch.compile`'s, a panel per activity."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    activities = list(dict.fromkeys(row["activity"] for row in document["rows"]))
    figure, panels = plt.subplots(1, len(activities), figsize=(4 * len(activities), 3.6), squeeze=False)
    for panel, activity in zip(panels[0], activities, strict=True):
        rows = [row for row in document["rows"] if row["activity"] == activity]
        for place, (way, colour) in enumerate(COLOURS.items()):
            heights = [row["tokens per second"][way] / row["tokens per second"][ALONE] for row in rows]
            bars = panel.bar(
                [at + 0.27 * (place - 1) for at in range(len(rows))], heights, 0.25, color=colour, label=way
            )
            if way == OURS:
                panel.bar_label(bars, fmt="%.2f", fontsize=7)
        panel.axhline(1.0, color="#555555", linewidth=0.8)
        panel.set_xticks(range(len(rows)), [row["family"] for row in rows], rotation=30, fontsize=8)
        panel.set_title(activity)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens per second / torch.compile's")
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Write page and picture from the committed result."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(document, PICTURE)
    write(PAGE, page(document))


if __name__ == "__main__":
    main()
