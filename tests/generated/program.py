"""A generated program: a tree of words that renders itself as the source of a model and is run from that source."""

from __future__ import annotations

import itertools
import linecache
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from generated.biases import BiasWord
from generated.clocks import Clock, Product
from generated.edits import Edit
from generated.spoils import Spoil
from generated.turns import FROM_ANGLES, Turn
from generated.writing import HIDDEN, Word, Writer, parameters
from grape_compile.encoding import Planes, planes_of

GIVEN = {"positions": "arange(T)", "places": "arange(T) for each sample"}


@dataclass(frozen=True)
class Side:
    """How one of queries, keys and values is turned: the word, and what makes cosines and sines of its angle."""

    turn: Turn
    convert: Word | None = None


@dataclass(frozen=True)
class Table:
    """A table of `form` kept in a buffer and looked up by position; `convert` made it of angles."""

    form: str
    look_up: Word
    convert: Word | None = None


@dataclass(frozen=True)
class Angles:
    """Where angles come from: clock times frequencies (`product`), or a `table`."""

    clock: Clock
    frequencies: Word
    holder: str
    product: Product
    table: Table | None = None
    without_gradient: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes and the order of axes; channels `offset` to `offset + width` of a head of `dim` are turned."""

    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    width: int = 8
    offset: int = 0
    heads_last: bool = False
    fused: bool = False
    normed: bool = False


@dataclass(frozen=True)
class Program:
    """One attention layer over x [B, T, HIDDEN], and what is done to its text and to its graph."""

    shape: Shape
    attention: Word
    angles: Angles | None = None
    query: Side | None = None
    key: Side | None = None
    value: Side | None = None
    bias: BiasWord | None = None
    slopes: Word | None = None
    slopes_holder: str = "buffer"
    repeat: Word | None = None
    spoil: Spoil | None = None
    edits: tuple[Edit, ...] = ()
    decomposed: str = ""
    shuffle: int | None = None
    dynamic: bool = False
    dtype: torch.dtype = torch.float64
    length: int = 7
    door: str = "export"
    gradients: bool = False

    @property
    def sides(self) -> dict[str, Side]:
        found = {"query": self.query, "key": self.key, "value": self.value}
        return {name: side for name, side in found.items() if side is not None}

    def planes(self, side: Side) -> Planes:
        """The planes of a side, and of what comes out of it."""
        return planes_of(self._pairs(side.turn.pairs), self.shape.dim)

    def planes_out(self, side: Side) -> Planes:
        return planes_of(self._pairs(side.turn.out or side.turn.pairs), self.shape.dim)

    def _pairs(self, kind: str) -> list[tuple[int, int]]:
        at, half = self.shape.offset, self.shape.width // 2
        if kind == "halves":
            return [(at + j, at + j + half) for j in range(half)]
        return [(at + 2 * j, at + 2 * j + 1) for j in range(half)]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs beside x."""
        if self.angles is None:
            return ()
        return tuple(name for name in parameters(self.angles.clock.function) if name in GIVEN)

    def source(self) -> str:
        """The program as Python."""
        return Writer(self).source()

    def __repr__(self) -> str:
        return f"\n{self.source()}\n# {self.options()}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """As hypothesis prints a failing example: the code."""
        printer.text(repr(self))

    def options(self) -> str:
        """What is done with the program besides running its text."""
        names = "door", "dtype", "length", "dynamic", "gradients", "decomposed", "shuffle"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


_numbers = itertools.count()


@dataclass(frozen=True)
class Loaded:
    """A program that was read in: its classes and functions."""

    source: str
    names: dict[str, Any]

    def model(self) -> nn.Module:
        model: nn.Module = self.names["Model"]()
        return model


def load(program: Program) -> Loaded:
    """Read the program's source in, so that tracebacks and reports show its lines."""
    source = program.source()
    file = f"<generated {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": file}
    exec(compile(source, file, "exec"), names)
    return Loaded(source, names)


def forget(loaded: Loaded) -> None:
    """Drop the lines that were kept for tracebacks."""
    linecache.cache.pop(loaded.names["__name__"], None)


def conversions(form: str, pairs: str) -> tuple[Word, ...]:
    """The words that make `form` of an angle."""
    return FROM_ANGLES[form, pairs]


def arguments(program: Program, batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the program."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64).to(program.dtype)
    steps = torch.arange(length)
    given = {"positions": steps, "places": steps + torch.arange(batch)[:, None]}
    return (x, *(given[name] for name in program.inputs))
