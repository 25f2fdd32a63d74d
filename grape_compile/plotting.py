"""Pictures of encodings: what turns together and how fast, what is added to the logits, how far a head looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Bias,
    Encoding,
    Learned,
    Multiplicative,
    NonCommuting,
    PathBias,
    Rank2,
    Rotation,
    Spectrum,
    Table,
    Tables,
)
from grape_compile.errors import GrapeError
from grape_compile.nn import TrainableEncoding
from grape_compile.operators import reference_bias, reference_rotate
from grape_compile.operators.prepare import parts
from grape_compile.passes.site import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Slots = Mapping[str, Tensor]

#: Heads of which the bias is drawn.
SHOWN: Final = 4
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BEFORE: Final = "#999999"


@dataclass(frozen=True)
class _Row:
    """One part of an encoding with its tensors, now and before."""

    part: Encoding
    slots: Slots
    before: Slots | None
    length: int


def plot_encoding(
    what: Site | Encoding | TrainableEncoding,
    slots: Slots | None = None,
    *,
    before: Slots | None = None,
    length: int = 96,
) -> Figure:
    """Draw an encoding: of a site, of a module that trains, or alone; one row for each of its parts.

    A rotation shows its planes, its spectrum in radians per position, its basis, and how the product of a vector with
    itself falls with the distance, averaged over the coordinates. A bias shows the logits it adds, for up to four
    heads, and the effective window of each head: exp of the entropy of the softmax of the last query's bias. `slots`
    are the tensors of the encoding, such as `module(hidden, query, key)`; a module that reads no content fills its own.
    `before` holds those of an earlier state, drawn in grey. Of a batch the first sequence is drawn; `length` is the
    number of tokens where the tensors leave it open. Needs matplotlib, the extra `docs`. Raises GrapeError for
    missing tensors.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise GrapeError(
            "to draw an encoding", "matplotlib is not installed", "pip install 'grape-compile[docs]'"
        ) from missing
    encoding = what if isinstance(what, Encoding) else what.encoding
    given = _given(what, slots)
    named = [("slots", given)] if before is None else [("slots", given), ("before", before)]
    for name, tensors in named:
        absent = [slot for slot in encoding.slots if slot not in tensors]
        if absent:
            raise GrapeError(
                f"to draw {encoding}",
                f"no tensor for {', '.join(absent)}",
                f"`{name}` with {', '.join(encoding.slots)}, such as module(hidden, query, key)",
            )
    found = parts(encoding)
    figure = Figure(figsize=(11, 3.1 * max(len(found), 1)), layout="constrained")
    if not found:
        figure.text(0.5, 0.5, "no position", ha="center")
        return figure
    rows = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for place, part in zip(rows, found, strict=True):
        row = _Row(part, _double(given), None if before is None else _double(before), length)
        place.suptitle(_short(str(part)), fontsize=9, family="monospace")
        (_draw_rotation if isinstance(part, Multiplicative) else _draw_bias)(place, row)
    return figure


def _given(what: Site | Encoding | TrainableEncoding, slots: Slots | None) -> Slots:
    if slots is None and isinstance(what, TrainableEncoding) and not (what.reads_hidden or what.reads_heads):
        filled: Slots = what(torch.zeros(0))
        return filled
    return {} if slots is None else slots


def _double(slots: Slots) -> Slots:
    return {name: tensor.detach().cpu().double() for name, tensor in slots.items()}


def _short(text: str) -> str:
    return text if len(text) < 120 else text[:117] + "..."


def _draw_rotation(place: SubFigure, row: _Row) -> None:
    part = row.part
    matrix = _matrix(part, row.slots)
    axes = list(place.subplots(1, 3 if matrix is None else 4))
    if isinstance(part, Rotation):
        _draw_planes(axes[0], part)
    else:
        axes[0].axis("off")
    for slots, colours, label in _states(row):
        for line, colour in zip(_frequencies(part, slots), colours, strict=False):
            axes[1].plot(range(1, len(line) + 1), line.abs().tolist(), ".-", color=colour, label=label)
            label = None
        for line, colour in zip(_fall(part, slots, row.length), colours, strict=False):
            axes[2].plot(line.tolist(), color=colour, linewidth=1)
    _finish(axes[1], "spectrum", "plane", "radians per position")
    if not axes[1].lines:
        axes[1].axis("off")
    if any(max(line.get_ydata()) > 0 for line in axes[1].lines):
        axes[1].set_yscale("log")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    _finish(axes[2], "a vector with itself", "distance", "mean product")
    if row.before is not None:
        axes[1].legend(fontsize=7, frameon=False)
    if matrix is not None:
        largest = float(matrix.abs().max())
        axes[3].imshow(matrix.tolist(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        coordinate = "mixed coordinate" if isinstance(part, NonCommuting) else "coordinate of the head"
        _finish(axes[3], "generator" if isinstance(part, NonCommuting) else "basis", coordinate, "")


def _states(row: _Row) -> Iterable[tuple[Slots, Sequence[str], str | None]]:
    """Tensors with their colours, one for each head, and their name; what was before lies below."""
    if row.before is not None:
        yield row.before, (_BEFORE,) * 64, "before"
    yield row.slots, _COLOURS * 11, None if row.before is None else "now"


def _draw_planes(axes: Axes, rotation: Rotation) -> None:
    """Arcs between the coordinates that turn together; the fast planes are dark."""
    angles = torch.linspace(0, torch.pi, 40)
    pairs = rotation.planes.pairs()
    for number, (first, second) in enumerate(pairs):
        middle, radius = (first + second) / 2, (second - first) / 2
        alpha = 1.0 - 0.8 * number / len(pairs)
        x, y = middle + radius * angles.cos(), angles.sin() * abs(radius) ** 0.5
        axes.plot(x.tolist(), y.tolist(), color=_COLOURS[0], linewidth=1, alpha=alpha)
    still = set(range(rotation.head_dim)) - {coordinate for pair in pairs for coordinate in pair}
    axes.plot(sorted(still), [0.0] * len(still), ".", color=_BEFORE, markersize=3)
    _finish(axes, "planes", "coordinate of the head", "")
    axes.set_yticks([])


def _frequencies(part: Encoding, slots: Slots) -> Tensor:
    """Frequencies [lines, planes] in radians per position; no line where none is known."""
    if isinstance(part, NonCommuting):
        generator = slots[part.generator]
        skew = (generator - generator.mT) / 2
        found: Tensor = torch.linalg.eigvalsh(1j * skew).flip(-1)[..., : skew.shape[-1] // 2]
        return found.reshape(-1, found.shape[-1])
    if isinstance(part, Rank2):
        a, b = slots[part.a], slots[part.b]
        gram = a.square().sum(-1) * b.square().sum(-1) - (a * b).sum(-1).square()
        return (gram.clamp(min=0).sqrt().reshape(-1, 1) * _spectrum(part.spectrum, 1, slots)).reshape(-1, 1)
    assert isinstance(part, Rotation), "what turns is one of three"
    if part.spectrum is None:
        return torch.zeros(0, part.planes.count)
    return _spectrum(part.spectrum, part.planes.count, slots).reshape(-1, part.planes.count)


def _spectrum(spectrum: Spectrum, count: int, slots: Slots) -> Tensor:
    if isinstance(spectrum, Learned | Table):
        return slots[spectrum.slot]
    return torch.tensor(spectrum.frequencies(count), dtype=torch.float64)


def _fall(part: Encoding, slots: Slots, length: int) -> Tensor:
    """The product of a vector at place n with the same vector at place 0, averaged over the coordinates, [heads, n]."""
    assert isinstance(part, Multiplicative)
    own = dict(slots)
    several = isinstance(part, Rotation) and part.planes.axis_count > 1
    for name in part.clock.slots:
        # Tables run along their last axis but one, other clocks along the last; sequences lie two axes before.
        tokens = -2 if isinstance(part.clock, Tables) else -1
        length = slots[name].shape[tokens]
        if slots[name].dim() - several >= 2 - tokens:
            own[name] = slots[name].narrow(tokens - 2, 0, 1)
    ones = torch.eye(part.head_dim, dtype=torch.float64)[:, None, None].expand(-1, 1, length, -1)
    (turned,) = reference_rotate([ones], part, own)
    products: Tensor = (turned * turned[..., :1, :]).sum(-1).mean(0)
    return products


def _matrix(part: Encoding, slots: Slots) -> Tensor | None:
    """The basis of a rotation or the skew part of a generator, of the first head; None for neither."""
    if isinstance(part, NonCommuting):
        generator = slots[part.generator]
        return ((generator - generator.mT) / 2).reshape(-1, *generator.shape[-2:])[0]
    if isinstance(part, Rotation) and part.basis is not None:
        basis = slots[part.basis]
        return basis.reshape(-1, *basis.shape[-2:])[0]
    return None


def _draw_bias(place: SubFigure, row: _Row) -> None:
    now = _bias(row.part, row.slots, row.length)
    heads = len(now)
    shown = sorted(
        {round(at * (heads - 1) / max(min(SHOWN, heads) - 1, 1)) for at in range(min(SHOWN, heads))}
    )
    axes = list(place.subplots(1, len(shown) + 1, width_ratios=[1.0] * len(shown) + [1.3], squeeze=False)[0])
    picture: Any = None
    for panel, head in zip(axes, shown, strict=False):
        logits = now[head].masked_fill(now[head].isneginf(), torch.nan)
        picture = panel.imshow(logits.tolist(), vmin=-6, vmax=0, cmap="viridis", interpolation="nearest")
        _finish(panel, f"head {head + 1} of {heads}", "key j", "query t" if head == shown[0] else "")
    place.colorbar(picture, ax=axes[: len(shown)], label="bias", extend="both", shrink=0.8)
    numbers = list(range(1, heads + 1))
    if row.before is not None:
        earlier = effective_window(_bias(row.part, row.before, row.length))
        axes[-1].semilogy(numbers, earlier, "o-", color=_BEFORE, markersize=4, label="before")
    label = None if row.before is None else "now"
    axes[-1].semilogy(numbers, effective_window(now), "o-", color=_COLOURS[0], markersize=4, label=label)
    axes[-1].set_ylim(0.8, 1.25 * now.shape[-1])
    _finish(axes[-1], f"effective window of {now.shape[-1]} keys", "head", "keys")
    axes[-1].set_xticks(numbers if heads <= 16 else numbers[:: heads // 8])
    if row.before is not None:
        axes[-1].legend(fontsize=7, frameon=False)


def _bias(part: Encoding, slots: Slots, length: int) -> Tensor:
    """The causal bias [heads, T, T] of the first sequence; the future is minus infinity."""
    assert isinstance(part, Bias | PathBias)
    lengths = [slots[part.key].shape[-2]] if isinstance(part, PathBias) else []
    if isinstance(part, Bias):
        along = (*part.clock.slots, *(() if part.gate is None else part.gate.slots))
        lengths = [slots[name].shape[-1] for name in along]
    length = lengths[0] if lengths else length
    keys = torch.zeros(1, 1, length, 1, dtype=torch.float64)
    bias = reference_bias(part, slots, length, keys)
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))[0]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return bias.masked_fill(future, -torch.inf)


def effective_window(bias: Tensor) -> list[float]:
    """Return exp of the entropy of the softmax of the last row of each head of [heads, T, T]: T where it is flat."""
    entropy = torch.special.entr(bias[:, -1].softmax(-1)).sum(-1)
    found: list[float] = entropy.exp().tolist()
    return found


def _finish(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
