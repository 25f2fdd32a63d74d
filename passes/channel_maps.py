"""Read how the channels of one value are made of those of another, token by token, and classify the matrix.

What: the linear map from `source` to `output` at sampled tokens, for all channels, whichever axis they are; a map that
    mixes channels goes on to be named by its planes (planes.py).
Leaves alone: maps that differ from token to token in more than their coefficients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from grape_compile.passes.elements import Reader
from grape_compile.passes.graph import Program, Unreadable, fake, require_fake
from grape_compile.passes.planes import name_rotation
from grape_compile.passes.plans import Entry, Miss, Reading, RotationPlan
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Factor, Index, Term

_SAMPLES = 48


class ChannelMap:
    """One candidate: the map from `source` to `output`, read at sampled tokens for all channels."""

    def __init__(
        self, program: Program, replay: Replay, source: fx.Node, output: fx.Node, region: tuple[fx.Node, ...]
    ) -> None:
        self.program, self.replay = program, replay
        self.source, self.output, self.region = source, output, region
        self.reader = Reader(program, replay)

    def plan(self) -> RotationPlan | Miss:
        shape = self.reader.shape(self.output)
        if len(shape) < 2 or self.reader.shape(self.source) != shape:
            return Miss("shape", "input and output differ in shape", 0)
        if not _same_shape(self.source, self.output):
            return Miss("shape", "input and output have different symbolic shapes", 0)
        if 0 in shape:
            return Miss("shape", "the example has no elements", 0)
        terms = self._read(len(shape) - 1)
        channel = self._mixed_axis(terms)
        if channel is not None and channel != len(shape) - 1:
            terms = self._read(channel)
        if self.width < 2:
            return Miss("shape", "there is one channel", 0)
        entries = self._entries(terms)
        if isinstance(entries, Miss):
            return entries
        return self._classify(entries)

    def _read(self, channel: int) -> list[Term]:
        """The terms of all channels, on this axis, at sampled tokens."""
        shape = self.reader.shape(self.output)
        self.order = (*(axis for axis in range(len(shape)) if axis != channel), channel)
        self.shape = tuple(shape[axis] for axis in self.order)
        self.width = self.shape[-1]
        self.lead, self.index = _sample(self.shape)
        self.rows = torch.arange(self.index[-1].numel())
        where = tuple(self.index[self.order.index(axis)] for axis in range(len(shape)))
        terms = self.reader.linear(self.output, self.source, where, self.rows)
        return [
            term
            if term.source is None
            else replace(term, source=(term.source[0], tuple(term.source[1][axis] for axis in self.order)))
            for term in terms
        ]

    def _mixed_axis(self, terms: list[Term]) -> int | None:
        """The one axis, of a size known beforehand, along which elements are made of others."""
        axes = {
            axis
            for term in terms
            if term.source is not None
            for axis, at in enumerate(term.source[1])
            if not torch.equal(at, self.index[axis][term.rows])
        }
        alone = len(axes) == 1 and isinstance(require_fake(self.output).shape[min(axes)], int)
        return axes.pop() if alone else None

    def _entries(self, terms: list[Term]) -> list[list[Entry]] | Miss:
        """The per-token matrix, one list of entries per output channel, the same for every sampled token."""
        columns: list[list[Entry]] = [[] for _ in range(self.width)]
        samples = self.rows.numel() // self.width
        for term in terms:
            if term.source is None:
                return Miss("linear", "a position-dependent constant is added", 0)
            if any(
                not torch.equal(axis, at[term.rows])
                for axis, at in zip(term.source[1][:-1], self.index[:-1], strict=True)
            ):
                return Miss("token-local", "an output token is made of several tokens", 0)
            if bool((term.coefficient.imag != 0).any()):
                return Miss("real", "a coefficient is not real", 0)
            miss = self._columns(term, samples, columns)
            if miss is not None:
                return miss
        return columns

    def _columns(self, term: Term, samples: int, columns: list[list[Entry]]) -> Miss | None:
        assert term.source is not None
        channel = self.index[-1][term.rows]
        order = torch.argsort(channel, stable=True)
        channels, counts = torch.unique_consecutive(channel[order], return_counts=True)
        if bool((counts != samples).any()):
            return Miss("token-local", "tokens are treated differently", 0)
        by_channel = order.reshape(len(channels), samples)
        sources, numbers = term.source[1][-1][by_channel], term.coefficient.real[by_channel]
        if bool((sources != sources[:, :1]).any()) or bool((numbers != numbers[:, :1]).any()):
            return Miss("token-local", "tokens are treated differently", 0)
        for position, out in enumerate(channels.tolist()):
            number = float(numbers[position, 0])
            if number != 0:
                factors = term.take(by_channel[position]).factors
                _merge(columns[out], Entry(out, int(sources[position, 0]), number, factors))
        return None

    def _classify(self, columns: list[list[Entry]]) -> RotationPlan | Miss:
        through: dict[int, int] = {}
        mixed: dict[int, list[Entry]] = {}
        factors = [entry.factors for column in columns for entry in column]
        if len(factors) > 1 and all(_equal(each, factors[0]) for each in factors[1:]):
            return Miss("mixing", "all channels are scaled alike", 0)
        for out, entries in enumerate(columns):
            if len(entries) == 2 and entries[0].source != entries[1].source:
                mixed[out] = sorted(entries, key=lambda entry: entry.source)
            elif len(entries) == 1 and not entries[0].factors and entries[0].number == 1.0:
                through[out] = entries[0].source
            elif not any(len(column) > 1 for column in columns):
                return Miss("mixing", "channels are only scaled", 0)
            else:
                return Miss(
                    "planes", f"output channel {out} is not a combination of exactly two input channels", 1
                )
        if not mixed:
            return Miss("mixing", "no two channels are mixed", 0)
        constant = [not entry.factors for pair in mixed.values() for entry in pair]
        if any(constant):
            return Miss("planes", "channels are mixed with constant coefficients", 0 if all(constant) else 1)
        reading = Reading(
            self.program,
            self.replay,
            self.reader,
            self.source,
            self.output,
            self.region,
            self.lead,
            self.shape,
            self.order,
        )
        try:
            return name_rotation(reading, mixed, through)
        except Unreadable as reason:
            told = f"channels are mixed two by two, but by what cannot be read: {reason}"
            return Miss("readable", told, 1, "a rotation by tables")


def _merge(column: list[Entry], entry: Entry) -> None:
    """Add an entry to a column; a second coefficient with the same factors adds up with the first."""
    for position, held in enumerate(column):
        if held.source == entry.source and _equal(held.factors, entry.factors):
            column[position] = replace(held, number=held.number + entry.number)
            return
    column.append(entry)


def _equal(one: tuple[Factor, ...], other: tuple[Factor, ...]) -> bool:
    return len(one) == len(other) and all(
        a.node is b.node
        and a.part == b.part
        and all(torch.equal(x, y) for x, y in zip(a.index, b.index, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Equal for every value of the symbols, not only at the captured sizes."""
    first, second = fake(one), fake(other)
    return (
        first is not None
        and second is not None
        and list(map(str, first.shape)) == list(map(str, second.shape))
    )


def _sample(shape: tuple[int, ...]) -> tuple[Index, Index]:
    """Sampled target positions (one row each) and the index of all their channels."""
    choices = [sorted({0, 1, size // 2, size - 1} & set(range(size))) for size in shape[:-1]]
    grid = torch.cartesian_prod(*(torch.tensor(choice) for choice in choices)).reshape(-1, len(choices))
    if len(grid) > _SAMPLES:
        generator = torch.Generator().manual_seed(0)
        inner = torch.randperm(len(grid) - 2, generator=generator)[: _SAMPLES - 2] + 1
        grid = torch.cat([grid[:1], grid[inner.sort().values], grid[-1:]])
    lead = tuple(grid[:, axis] for axis in range(len(choices)))
    width = shape[-1]
    channel = torch.arange(width).repeat(len(grid))
    return lead, (*(axis.repeat_interleave(width) for axis in lead), channel)
