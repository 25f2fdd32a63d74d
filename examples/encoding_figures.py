"""Draws the figures of docs/encodings.md from the encodings themselves.

Planes and frequencies come from the values, biases from their definition in `grape_compile.operators`. Needs the
extra `docs`:

    python examples/encoding_figures.py docs/figures
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from grape_compile.encoding import (
    Encoding,
    Geometric,
    Half,
    Interleaved,
    Linear,
    Llama3,
    Ntk,
    Partial,
    Planes,
    Scaled,
    Spectrum,
    Yarn,
    alibi,
    fox,
    gated_alibi,
    grape_ap,
)
from grape_compile.operators import reference_bias

HEADS, HEAD_DIM, PATH_DIM = 8, 64, 8
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
FOUND = (
    ("ALiBi", alibi(HEADS)),
    ("FoX", fox()),
    ("GRAPE-A-QK", gated_alibi(HEADS)),
    ("GRAPE-AP", grape_ap(HEADS)),
)


def content(length: int) -> dict[str, Tensor]:
    """Random tensors for the slots of `FOUND`, one sample: what a model just initialised would give.

    Gates are softplus of dot products of unit variance, forget gates sigmoid(4 + n) with n standard normal.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, HEADS, length, *shape, generator=generator, dtype=torch.float64)

    return {
        "log_forget": F.logsigmoid(4.0 + normal()),
        "gate_query": F.softplus(normal()),
        "gate_key": F.softplus(normal()),
        "path_query": (path := normal(PATH_DIM)),
        "path_key": path,
    }


def bias_of(encoding: Encoding, length: int) -> Tensor:
    """The causal bias [H, T, T]; the future is -inf."""
    tensors = content(length)
    keys = torch.zeros(1, HEADS, length, HEAD_DIM, dtype=torch.float64)
    bias = reference_bias(encoding, {name: tensors[name] for name in encoding.slots}, length, keys)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return bias.expand(1, HEADS, length, length)[0].masked_fill(future, -torch.inf)


def draw_planes() -> Figure:
    """Which coordinates of a head turn together, and how fast each plane turns."""
    figure: Figure
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.15))
    kinds: tuple[Planes, ...] = (Half(16), Interleaved(16), Partial(Half(8), 0, 16))
    for row, planes in enumerate(kinds):
        _draw_pairs(left, planes, height=-2.6 * row)
    left.set(xlim=(-0.8, 15.8), ylim=(-6.4, 2.5), title="planes: which coordinates turn together")
    left.set_xlabel("coordinate of the head")
    left.set_yticks([])
    left.spines[["left", "top", "right"]].set_visible(False)
    _draw_spectra(right)
    figure.tight_layout()
    return figure


def _draw_pairs(axes: Axes, planes: Planes, height: float) -> None:
    angles = torch.linspace(0, torch.pi, 40)
    inside = {coordinate for pair in planes.pairs() for coordinate in pair}
    for first, second in planes.pairs():
        middle, radius = (first + second) / 2, (second - first) / 2
        x = middle + radius * angles.cos()
        y = height + 0.3 + 1.1 * (radius / 4) ** 0.5 * angles.sin()
        axes.plot(x.tolist(), y.tolist(), color=COLOURS[0], linewidth=1)
    for coordinate in range(planes.head_dim):
        filled = COLOURS[0] if coordinate in inside else "white"
        axes.plot(coordinate, height + 0.3, "o", markersize=4, color="#555555", markerfacecolor=filled)
    axes.text(-0.4, height - 0.55, str(planes), fontsize=8, family="monospace")


def _draw_spectra(axes: Axes) -> None:
    base = Geometric(10000.0)
    spectra: tuple[Spectrum, ...] = (
        base,
        Scaled(Linear(8.0), base),
        Scaled(Ntk(8.0), base),
        Scaled(Yarn(8.0, 4096), base),
        Scaled(Llama3(8.0, 1.0, 4.0, 8192), base),
    )
    styles = ("-", "-", "-", "--", ":")
    for spectrum, colour, style in zip(spectra, COLOURS, styles, strict=True):
        axes.semilogy(spectrum.frequencies(32), color=colour, linestyle=style, label=str(spectrum))
    axes.set(xlabel="plane j of 32", title="spectrum: radians per position")
    axes.legend(fontsize=7, frameon=False, loc="lower left", prop={"family": "monospace", "size": 7})
    axes.spines[["top", "right"]].set_visible(False)


def draw_biases(length: int = 96, head: int = 3) -> Figure:
    """The bias of one head for every query and key."""
    figure: Figure
    figure, row = plt.subplots(1, len(FOUND), figsize=(11, 3.2), sharey=True, layout="constrained")
    shades = mpl.cm.ScalarMappable(mpl.colors.Normalize(-6, 0), "viridis")
    for axes, (name, encoding) in zip(row, FOUND, strict=True):
        bias = bias_of(encoding, length)[head]
        bias = bias.masked_fill(bias.isneginf(), torch.nan)
        axes.imshow(bias.tolist(), norm=shades.norm, cmap=shades.cmap, interpolation="nearest")
        axes.set(title=name, xlabel="key j")
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel("query t")
    figure.colorbar(shades, ax=row, label=f"bias of head {head + 1} of {HEADS}", extend="min", shrink=0.85)
    return figure


def draw_windows(length: int = 1024) -> Figure:
    """How many keys each head looks at when the bias alone decides."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    heads = list(range(1, HEADS + 1))
    for (name, encoding), colour, marker in zip(FOUND, COLOURS, "os^D", strict=False):
        axes.semilogy(
            heads, effective_window(encoding, length), color=colour, marker=marker, markersize=5, label=name
        )
    axes.set(xlabel=f"head of {HEADS}", ylabel=f"effective window of {length} keys")
    axes.set_xticks(heads)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def effective_window(encoding: Encoding, length: int) -> list[float]:
    """exp of the entropy of the softmax of the last query's bias, for each head: `length` where it is flat."""
    weights = bias_of(encoding, length)[:, -1].softmax(-1)
    entropy = torch.special.entr(weights).sum(-1)
    found: list[float] = entropy.exp().tolist()
    return found


FIGURES: dict[str, Callable[[], Figure]] = {
    "planes.png": draw_planes,
    "biases.png": draw_biases,
    "windows.png": draw_windows,
}


def main() -> None:
    """Write every figure into the folder that is named."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw()
        # Without the version of matplotlib in the file, the same picture is the same bytes.
        figure.savefig(folder / name, dpi=130, metadata={"Software": None})
        plt.close(figure)
        print(folder / name)


if __name__ == "__main__":
    main()
