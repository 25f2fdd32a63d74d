"""Writes docs/gpu.md from what `benchmarks.gpu` measured: `python -m benchmarks.gpu_page`.

A case without a file of results is said to have none; a run with `--quick` is no measurement. The figures need the
extra `docs`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.cases import write

Row = Mapping[str, Any]
Document = Mapping[str, Any]

CASES: Final = {
    "rotation": "Queries and keys of one layer turned, as a share of the measured copy rate.",
    "attention": "One layer of causal attention with each bias, forward and backward.",
    "decoding": "One query over a full cache, as a multiple of the time that reading the cache takes.",
}
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: Additions and multiplications for each coordinate that turns.
TURN_FLOPS: Final = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results, draw the figures, write the page."""
    parser = argparse.ArgumentParser(description="write the page of GPU measurements")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"))
    chosen = parser.parse_args(arguments)
    found = {case: read(chosen.results / f"gpu_{case}.json") for case in CASES}
    figures = draw(found, chosen.page.parent / "figures")
    write(chosen.page, text(found, figures))


def read(path: Path) -> Document | None:
    """Return the measurements of a file, or None where there is none, or only a run that checks whether it runs."""
    if not path.exists():
        return None
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return None if document.get("quick") else document


def text(found: Mapping[str, Document | None], figures: Sequence[str]) -> str:
    """Return the page."""
    lines = ["# Measured on a GPU", ""]
    lines += [
        "This page is made by `make gpu-page` from the files that `make bench-gpu` writes. `1.2 x other` says that"
    ]
    lines += ["ours is 1.2 times as fast as the other.", ""]
    for figure in figures:
        lines += [f"![{figure}](figures/gpu_{figure}.png)", ""]
    for case, about in CASES.items():
        lines += [f"## {case.capitalize()}", "", about, ""]
        document = found[case]
        if document is None:
            lines += [f"No measurements yet: `python -m benchmarks.gpu {case}` on a machine with a GPU.", ""]
        else:
            lines += [*_table(document), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(document: Document) -> Iterator[str]:
    gpu = document["gpu"]
    yield f"{gpu['name']}, torch {gpu['torch']}, Triton {gpu['triton']}, {document['date']}."
    yield ""
    yield "| layer | measured | promised |"
    yield "|---|---|---|"
    for row in document["rows"]:
        verdict = {None: "", True: "holds", False: "does not hold"}[row["holds"]]
        yield f"| {row['name']} | {row['told']} | {verdict} |"


def draw(found: Mapping[str, Document | None], folder: Path) -> list[str]:
    """Draw what there are measurements for, and return the names of the figures."""
    drawn: list[str] = []
    wanted: tuple[tuple[str, Callable[[Any, Mapping[str, Document | None]], None], tuple[str, ...]], ...] = (
        ("roofline", _roofline, ("rotation", "attention", "decoding")),
        ("scaling", _scaling, ("attention", "decoding")),
    )
    for name, function, cases in wanted:
        if not any(found[case] for case in cases):
            continue
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(10, 4.5), layout="constrained")
        function(figure, found)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"gpu_{name}.png", dpi=120)
        plt.close(figure)
        drawn.append(name)
    return drawn


def points(case: str, document: Document) -> list[tuple[float, float]]:
    """Return operations per byte that has to move, and TFLOP/s of our kernel, for each row of a case."""
    found = []
    for row in document["rows"]:
        batch, heads, key_heads, tokens, size = row["shape"]
        flops = row.get("flops", TURN_FLOPS * batch * tokens * (heads + key_heads) * size)
        # Queries and outputs, keys and values, once each in 16 bits.
        moved = row.get("bytes", 4 * batch * tokens * (heads + key_heads) * size)
        found.append((flops / moved, flops / row["ways"]["ours"]["us"] / 1e6))
    return found


def _roofline(figure: Any, found: Mapping[str, Document | None]) -> None:
    axes = figure.subplots()
    rates = [row["copy_gb_s"] for document in found.values() for row in (document or {"rows": ()})["rows"]
             if "copy_gb_s" in row]  # fmt: skip
    shown: list[float] = []
    for colour, (case, document) in zip(COLOURS, found.items(), strict=False):
        if document is not None:
            across, up = zip(*points(case, document), strict=True)
            axes.plot(across, up, "o", color=colour, label=case, markersize=4)
            shown += across
    if rates:
        ends = [min(shown), max(shown)]
        roof = [intensity * max(rates) / 1e3 for intensity in ends]
        axes.plot(ends, roof, "-", color="grey", label=f"measured copy rate, {max(rates):.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="Roofline")
    axes.legend()


def _scaling(figure: Any, found: Mapping[str, Document | None]) -> None:
    cases = [case for case in ("attention", "decoding") if found[case]]
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        document = found[case]
        assert document is not None, "chosen above"
        for colour, (bias, rows) in zip(COLOURS, _by_bias(document["rows"]).items(), strict=False):
            for style, way in (("-", "ours"), (":", "sdpa, no bias")):
                pairs = sorted(
                    (row["shape"][3], row["ways"][way]["us"]) for row in rows if way in row["ways"]
                )
                if pairs:
                    axes.plot(*zip(*pairs, strict=True), style, color=colour, label=f"{bias}, {way}")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title=case)
        axes.legend(fontsize=7)


def _by_bias(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return rows that differ in their tokens alone, and not in what they do: forward, of the largest head."""
    size = max(row["shape"][4] for row in rows)
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["shape"][4] == size and "backward" not in row["name"]:
            bias, batch = row["name"].split()[0], row["shape"][0]
            # Attention keeps batch times tokens; decoding is drawn for each batch.
            fixed = f" x {batch}" if "over_floor" in row else ""
            found.setdefault(bias + fixed, []).append(row)
    return found


if __name__ == "__main__":
    main()
