"""The report: what was found in a model and what was left alone, as a table and as JSON."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from torch import nn

from grape_compile.encoding import parse
from grape_compile.errors import GrapeError
from grape_compile.passes.site import Refusal, Site

WIDTH = 116
HEADER = ("module", "sites", "encoding", "evidence", "error", "lowering")
_FORMAT = 1
_ENCODING = HEADER.index("encoding")
_MODULE_WIDTH = 34
_ENCODING_WIDTH = 45
# Where a cell may be broken: a module name after a comma or a single dot, an encoding after a space.
_AFTER_NAME = re.compile(r"(?<=,)|(?<=[^.]\.)(?=[^.])")
_AFTER_SPACE = re.compile(r"(?<= )")
_PLURALS = {"rotation": "rotations", "bias": "biases", "refusal": "refusals"}

_Found = TypeVar("_Found", Site, Refusal)


@dataclass(frozen=True)
class Report:
    """What detection found: `sites` that are position encodings, `refusals` with the reason for each.

    `str(report)` is a table of at most 120 columns in which identical layers share a row; its error column
    holds the largest error of the row. `Report.from_json(report.to_json()) == report`. A sum holds what both
    reports hold.
    """

    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def __add__(self, other: Report) -> Report:
        return Report(self.sites + other.sites, self.refusals + other.refusals)

    def __str__(self) -> str:
        parts = [summary(self)]
        if self.sites:
            parts.append(_table([HEADER, *site_cells(self.sites)]))
        parts.extend(refusal_paragraphs(self.refusals))
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """JSON text `{"format": 1, "sites": [...], "refusals": [...]}`, each encoding in its text form."""
        document = {
            "format": _FORMAT,
            "sites": [_plain(site) for site in self.sites],
            "refusals": [_plain(refusal) for refusal in self.refusals],
        }
        return json.dumps(document, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises `GrapeError` where the text is something else."""
        asked, works = "read a report from JSON", f"the text Report.to_json writes, format {_FORMAT}"
        try:
            document = json.loads(text)
            version, sites, refusals = document["format"], document["sites"], document["refusals"]
            if version != _FORMAT:
                raise GrapeError(asked, f"format {version!r}", works)
            return cls(tuple(_site(**site) for site in sites), tuple(Refusal(**each) for each in refusals))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise GrapeError(asked, f"{type(error).__name__}: {error}", works) from error


@dataclass(frozen=True)
class Row(Generic[_Found]):
    """Findings that differ only in the numbers in their module names, folded as in `model.layers.{0..31}`."""

    modules: str
    members: tuple[_Found, ...]


def summary(report: Report) -> str:
    """The counts in one line, such as `64 rotations, 1 refusal`."""
    counts = Counter(site.kind for site in report.sites)
    counts["refusal"] = len(report.refusals)
    told = [f"{n} {kind if n == 1 else _PLURALS.get(kind, kind)}" for kind, n in counts.items() if n]
    return ", ".join(told) or "no position encodings found"


def site_cells(sites: Iterable[Site]) -> list[tuple[str, ...]]:
    """One row of text per group of identical sites, in the columns of `HEADER`."""
    rows = _fold(sites, lambda site: (site.kind, site.encoding, site.evidence, site.lowering))
    return [_cells(row) for row in rows]


def refusal_paragraphs(refusals: Iterable[Refusal]) -> Iterator[str]:
    """One paragraph per group of identical refusals: where, why, the nearest encoding, the model's line."""
    rows = _fold(refusals, lambda refusal: (refusal.rule, refusal.reason, refusal.source, refusal.nearest))
    for row in rows:
        refusal = row.members[0]
        lines = [f"refused  {row.modules}  x{len(row.members)}  ({refusal.rule})"]
        lines.extend(textwrap.wrap(refusal.reason, WIDTH - 4))
        if refusal.nearest:
            lines.extend(textwrap.wrap(f"nearest: {refusal.nearest}", WIDTH - 4, subsequent_indent="  "))
        lines.append(f"at {refusal.source}" if refusal.source else f"at graph node {refusal.node}")
        yield "\n    ".join(lines)


def _cells(row: Row[Site]) -> tuple[str, ...]:
    site = row.members[0]
    errors = [member.error for member in row.members if member.error is not None]
    return (
        row.modules,
        f"x{len(row.members)}",
        str(site.encoding),
        site.evidence,
        _error(max(errors)) if errors else "-",
        site.lowering,
    )


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _fold(found: Iterable[_Found], key: Callable[[_Found], Hashable]) -> list[Row[_Found]]:
    """Findings of the same key and the same module name up to its numbers, in order of appearance."""
    groups: dict[Hashable, dict[tuple[int, ...], list[_Found]]] = {}
    for each in found:
        words = each.module.split(".")
        numbers = tuple(int(word) for word in words if word.isdecimal())
        pattern = tuple("*" if word.isdecimal() else word for word in words)
        groups.setdefault((pattern, key(each)), {}).setdefault(numbers, []).append(each)
    rows = []
    for members in groups.values():
        words = next(iter(members.values()))[0].module.split(".")
        for block in _blocks(frozenset(members)):
            covered = (each for numbers, many in members.items() if _within(numbers, block) for each in many)
            rows.append(Row(_folded_name(words, block), tuple(covered)))
    return rows


_Block = tuple[tuple[int, ...], ...]


def _blocks(indices: frozenset[tuple[int, ...]]) -> list[_Block]:
    """Index tuples as disjoint full products: a folded name never claims a layer that is not there."""
    axes = tuple(tuple(sorted(set(axis))) for axis in zip(*indices, strict=True))
    if math.prod(map(len, axes)) == len(indices):
        return [axes]
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in axes[0]:
        rest = frozenset(index[1:] for index in indices if index[0] == first)
        firsts.setdefault(rest, []).append(first)
    return [(tuple(values), *block) for rest, values in firsts.items() for block in _blocks(rest)]


def _within(index: tuple[int, ...], block: _Block) -> bool:
    return all(number in axis for number, axis in zip(index, block, strict=True))


def _folded_name(words: Sequence[str], block: _Block) -> str:
    axes = iter(block)
    name = ".".join(_numbers(next(axes)) if word.isdecimal() else word for word in words)
    return name or "(the model itself)"


def _numbers(values: tuple[int, ...]) -> str:
    """Ascending numbers with their runs shortened: `7`, `{0..31}`, `{0..4,6..10}`."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns two spaces apart; a long module or encoding continues below itself."""
    wrapped = [[[cell] for cell in row] for row in rows]
    for cells in wrapped:
        cells[0] = _wrap(_AFTER_NAME.split(cells[0][0]), _MODULE_WIDTH)
    rest = sum(_widest(wrapped, column) + 2 for column in range(len(HEADER)) if column != _ENCODING)
    for cells in wrapped:
        cells[_ENCODING] = _wrap(_AFTER_SPACE.split(cells[_ENCODING][0]), max(WIDTH - rest, _ENCODING_WIDTH))
    widths = [_widest(wrapped, column) for column in range(len(HEADER))]
    lines = []
    for cells in wrapped:
        for texts in zip_longest(*cells, fillvalue=""):
            aligned = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
            lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _widest(rows: Sequence[Sequence[Sequence[str]]], column: int) -> int:
    return max(len(line) for cells in rows for line in cells[column])


def _wrap(pieces: Sequence[str], width: int) -> list[str]:
    """Pieces joined into lines of at most `width`, the second and later ones indented by two."""
    lines = [""]
    for piece in pieces:
        if lines[-1].strip() and len(lines[-1] + piece.rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _plain(found: Site | Refusal) -> dict[str, Any]:
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    if isinstance(found, Site):
        values["encoding"] = str(found.encoding)
        # JSON has no infinity and no NaN; Python's float reads their names.
        if found.error is not None and not math.isfinite(found.error):
            values["error"] = str(found.error)
    return values


def _site(*, encoding: str, error: float | str | None, **rest: str) -> Site:
    return Site(encoding=parse(encoding), error=None if error is None else float(error), **rest)


_MOST_SERVED = 1 << 12


@dataclass
class GraphReport:
    """What was found in one graph of `torch.compile`, and the parameters it ran with: one graph may serve many layers.

    `paths` are those of its parameters, by their place among its arguments, in the module whose code the graph is.
    """

    report: Report
    paths: Mapping[int, str] = field(default_factory=dict)
    served: set[tuple[int, ...]] = field(default_factory=set)

    def watched(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph; each call tells which parameters it was given."""
        if not self.paths or not (self.report.sites or self.report.refusals):
            return compiled

        def call(*args: Any) -> Any:
            if len(self.served) < _MOST_SERVED:
                self.served.add(tuple(id(args[place]) for place in self.paths))
            return compiled(*args)

        return call

    def within(self, names: Mapping[int, str]) -> Report:
        """The report once for every module the graph ran for; `names` are those of the model's parameters by id."""
        found = [
            [names[each] for each in given] for given in self.served if all(each in names for each in given)
        ]
        bases = sorted({self._base(full) for full in found}) or [""]
        return Report(
            tuple(
                replace(site, module=_joined(base, site.module))
                for base in bases
                for site in self.report.sites
            ),
            tuple(
                replace(each, module=_joined(base, each.module))
                for base in bases
                for each in self.report.refusals
            ),
        )

    def _base(self, full: Sequence[str]) -> str:
        """The module whose code the graph is, from the names of its parameters in the model."""
        for name, path in zip(full, self.paths.values(), strict=True):
            if name.endswith(path):
                return name.removesuffix(path).rstrip(".")
        return full[0].rpartition(".")[0] if len(self.served) > 1 else ""


def _joined(base: str, module: str) -> str:
    return ".".join(part for part in (base, module) if part)


def over_graphs(graphs: Iterable[GraphReport], model: nn.Module) -> Report:
    """What runs in a compiled model: every place of every module once."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    return merged([graph.within(names) for graph in graphs])


def merged(reports: Sequence[Report]) -> Report:
    """Every place once, although a model compiled for several shapes has several graphs of the same code."""
    return Report(_union([each.sites for each in reports]), _union([each.refusals for each in reports]))


def _union(groups: Sequence[Sequence[_Found]]) -> tuple[_Found, ...]:
    """Multiset union by place: q and k on one line stay two, the same line in a second graph adds nothing."""
    merged: list[_Found] = []
    held: Counter[object] = Counter()
    for group in groups:
        seen: Counter[object] = Counter()
        for item in group:
            key = (type(item), item.module, item.source, getattr(item, "kind", getattr(item, "rule", "")))
            seen[key] += 1
            if seen[key] > held[key]:
                held[key] += 1
                merged.append(item)
    return tuple(merged)
