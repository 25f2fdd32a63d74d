"""A generated program: a tree of words that renders itself as the source of a model and is run from that source."""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from generated import spoils
from generated.biases import BiasWord
from generated.clocks import LIMIT, Clock, Product
from generated.code import Function, collected
from generated.edits import Edit, apply
from generated.spoils import Spoil
from generated.turns import FROM_ANGLES, Turn
from grape_compile.encoding import Planes, planes_of

HIDDEN = 12
HEADER = "import math\nimport torch\nfrom torch import nn\nfrom torch.nn import functional\n"
GIVEN = {"positions": "arange(T)", "places": "arange(T) for each sample"}

Word = Callable[..., Any]


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
        return tuple(name for name in _parameters(self.angles.clock.function) if name in GIVEN)

    def source(self) -> str:
        """The program as Python."""
        return _Writer(self).source()

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


def _parameters(function: Word) -> list[str]:
    return list(inspect.signature(function).parameters)


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.functions: dict[str, Function] = {}
        self.setup: dict[str, Function] = {}
        self.init: list[str] = []

    def source(self) -> str:
        program = self.program
        for name, side in program.sides.items():
            self._side(name, side)
        methods = [*self._angles(), *self._forward()]
        body = ["def __init__(self):", *_indented(["super().__init__()", *self.init])]
        text = ["class Model(nn.Module):", *_indented([*body, *methods])]
        model = ast.parse("\n".join(text)).body[0]
        assert isinstance(model, ast.ClassDef)
        edited = [*self.functions.values(), *(step for step in model.body[1:] if isinstance(step, Function))]
        if program.spoil is not None:
            suffix = f"_{program.spoil.part}"
            own = [
                tree
                for name, tree in self.functions.items()
                if name.endswith(suffix) and name != f"turn{suffix}"
            ]
            spoils.apply(program.spoil, own)
        for edit in program.edits:
            apply(edit, edited)
        pieces: list[ast.AST] = [*(self.setup | self.functions).values(), model]
        texts = [ast.unparse(ast.fix_missing_locations(piece)) for piece in pieces]
        return "\n\n\n".join([HEADER + self._constants(texts), *texts])

    def _constants(self, texts: list[str]) -> str:
        shape = self.program.shape
        known = {
            "HIDDEN": HIDDEN,
            "HEADS": shape.heads,
            "KV_HEADS": shape.kv_heads,
            "DIM": shape.dim,
            "HEAD_DIM": shape.width,
            "HALF": shape.width // 2,
            "OFFSET": shape.offset,
            "END": shape.offset + shape.width,
            "LIMIT": LIMIT,
            "BASE": 10000.0,
        }
        used = {node.id for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        return "\n" + "\n".join(f"{name} = {value}" for name, value in known.items() if name in used)

    def _use(self, word: Word, suffix: str = "", *, setup: bool = False) -> str:
        (self.setup if setup else self.functions).update(collected(word, suffix))
        return word.__name__ + suffix

    # -- what turns ----------------------------------------------------------------------------------------------------

    def _side(self, name: str, side: Side) -> None:
        """A function `turn_<name>(x, <what angles give>)`."""
        suffix, turn, shape = f"_{name}", side.turn, self.program.shape
        word = self._use(turn.function, suffix)
        given = self._form()
        lines = []
        names = _NAMES[given]
        if given != turn.form:
            assert side.convert is not None
            lines.append(f"{', '.join(_NAMES[turn.form])} = {self._use(side.convert, suffix)}(angle)")
        arguments = ", ".join(_NAMES[turn.form])
        if shape.width == shape.dim:
            lines.append(f"return {word}(x, {arguments})")
        else:
            lines.append(f"turned = {word}(x[..., OFFSET:END], {arguments})")
            parts = ["x[..., 0:OFFSET]"] * (shape.offset > 0) + ["turned"]
            parts += ["x[..., END:DIM]"] * (shape.offset + shape.width < shape.dim)
            lines.append(f"return torch.cat(({', '.join(parts)}), dim=-1)")
        text = "\n".join([f"def turn{suffix}(x, {', '.join(names)}):", *_indented(lines)])
        tree = ast.parse(text).body[0]
        assert isinstance(tree, Function)
        self.functions[tree.name] = tree

    def _form(self) -> str:
        angles = self.program.angles
        assert angles is not None
        return "angle" if angles.table is None else angles.table.form

    # -- angles --------------------------------------------------------------------------------------------------------

    def _angles(self) -> list[str]:
        """The method `angles(x, ...)`: one tensor or two, with axes put where the heads are."""
        angles = self.program.angles
        if angles is None:
            return []
        lines = ["length = x.shape[1]"]
        if angles.table is None or "clock" in _parameters(angles.table.look_up):
            lines.append(f"clock = {self._use(angles.clock.function)}({self._given(angles.clock.function)})")
        names = list(_NAMES[self._form()])
        lines += self._computed(angles) if angles.table is None else self._looked_up(angles, angles.table)
        batched = angles.clock.batched and not (angles.table and angles.table.look_up.__name__ == "by_slice")
        for name in names:
            if self.program.shape.heads_last:
                lines.append(f"{name} = {name}.unsqueeze(-2)")
            elif batched:
                lines.append(f"{name} = {name}.unsqueeze(1)")
        lines.append(f"return {', '.join(names)}")
        if angles.without_gradient:
            lines = ["with torch.no_grad():", *_indented(lines)]
        return [f"def angles(self, {', '.join(('x', *self.program.inputs))}):", *_indented(lines)]

    def _computed(self, angles: Angles) -> Iterator[str]:
        setup = angles.holder != "forward"
        frequencies = f"{self._use(angles.frequencies, setup=setup)}()"
        value = "self.frequencies"
        if angles.holder == "buffer":
            self.init.append(f'self.register_buffer("frequencies", {frequencies})')
        elif angles.holder == "parameter":
            self.init.append(f"self.frequencies = nn.Parameter({frequencies})")
        elif angles.holder == "logarithm":
            self.init.append(f"self.logarithms = nn.Parameter(torch.log({frequencies}))")
            value = "torch.exp(self.logarithms)"
        else:
            value = f"{frequencies}.to(x.device)"
        yield f"frequencies = {value}"
        yield f"angle = {self._use(angles.product.function)}(clock, frequencies)"

    def _looked_up(self, angles: Angles, table: Table) -> Iterator[str]:
        rows = f"torch.outer(1.0 * torch.arange(LIMIT), {self._use(angles.frequencies, setup=True)}())"
        names = _NAMES[table.form]
        if table.convert is not None:
            rows = f"{self._use(table.convert, setup=True)}({rows})"
        self.init.append(f"{', '.join(names)} = {rows}")
        for name in names:
            self.init.append(f'self.register_buffer("all_{name}", {name})')
            given = ", ".join(
                {"table": f"self.all_{name}"}.get(each, each) for each in _parameters(table.look_up)
            )
            yield f"{name} = {self._use(table.look_up)}({given})"

    def _given(self, word: Word) -> str:
        """The arguments of a word, by the names of its parameters; what they need is put into `__init__`."""
        for name, line in _NEEDS.items():
            if name in _parameters(word) and line not in self.init:
                self.init.append(line)
        return ", ".join(_EXPRESSIONS.get(name, name) for name in _parameters(word))

    # -- the layer -----------------------------------------------------------------------------------------------------

    def _forward(self) -> list[str]:
        program, shape = self.program, self.program.shape
        lines = ["batch, length, _ = x.shape", *self._heads()]
        if shape.normed:
            lines += [f"{name} = functional.rms_norm({name}, (DIM,))" for name in ("query", "key")]
        if program.angles is not None:
            names = ", ".join(_NAMES[self._form()])
            lines.append(f"{names} = self.angles({', '.join(('x', *program.inputs))})")
            lines += [f"{name} = turn_{name}({name}, {names})" for name in program.sides]
        if shape.heads_last:
            lines += [f"{name} = {name}.transpose(1, 2)" for name in ("query", "key", "value")]
        if program.repeat is not None:
            times = "HEADS // KV_HEADS"
            lines += [f"{name} = {self._use(program.repeat)}({name}, {times})" for name in ("key", "value")]
        if program.bias is not None:
            lines += self._bias(program.bias)
        attention = self._use(program.attention)
        lines.append(f"mixed = {attention}({', '.join(_parameters(program.attention))})")
        lines.append("return self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * DIM))")
        self.init.append("self.out = nn.Linear(HEADS * DIM, HIDDEN, bias=False)")
        return [f"def forward(self, {', '.join(('x', *program.inputs))}):", *_indented(lines)]

    def _heads(self) -> Iterator[str]:
        shape = self.program.shape
        counts = {"query": "HEADS", "key": "KV_HEADS", "value": "KV_HEADS"}
        if shape.fused:
            self.init.append("self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, bias=False)")
            sizes = "[HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]"
            yield f"query, key, value = self.qkv(x).split({sizes}, dim=-1)"
        for name, count in counts.items():
            value = name
            if not shape.fused:
                self.init.append(f"self.{name} = nn.Linear(HIDDEN, {count} * DIM, bias=False)")
                value = f"self.{name}(x)"
            moved = "" if shape.heads_last else ".transpose(1, 2)"
            yield f"{name} = {value}.view(batch, length, {count}, DIM){moved}"

    def _bias(self, bias: BiasWord) -> Iterator[str]:
        """The bias, made of its slopes or cut out of a buffer that holds it for as many tokens as there may be."""
        word, named = self._use(bias.function, "_bias"), _parameters(bias.function)
        if self.program.slopes_holder == "finished" and set(named) == {"slopes", "length"}:
            assert self.program.slopes is not None
            made = f"{word}({self._use(self.program.slopes, setup=True)}(), LIMIT)"
            self.init.append(f'self.register_buffer("finished", {made}, persistent=False)')
            yield "bias = self.finished[..., :length, :length]"
            return
        if "slopes" in named:
            yield from self._slopes()
        yield f"bias = {word}({self._given(bias.function)})"

    def _slopes(self) -> Iterator[str]:
        slopes, holder = self.program.slopes, self.program.slopes_holder
        assert slopes is not None
        value = f"{self._use(slopes, setup=holder != 'forward')}()"
        if holder in ("buffer", "finished"):
            self.init.append(f'self.register_buffer("slopes", {value})')
            yield "slopes = self.slopes"
        elif holder == "logarithm":
            self.init.append(f"self.logarithms_of_slopes = nn.Parameter(torch.log({value}))")
            yield "slopes = self.logarithms_of_slopes.exp()"
        else:
            yield f"slopes = {value}"


_NAMES = {"angle": ("angle",), "tables": ("cos", "sin"), "wide": ("cos", "sin"), "complex": ("numbers",)}
_EXPRESSIONS = {
    "rate": "self.rate(x).squeeze(-1)",
    "rates": "self.rates(x)",
    "path": "self.path(x).unflatten(-1, (HEADS, 4)).transpose(1, 2)",
}
_NEEDS = {
    "rate": "self.rate = nn.Linear(HIDDEN, 1)",
    "rates": "self.rates = nn.Linear(HIDDEN, HEADS)",
    "path": "self.path = nn.Linear(HIDDEN, HEADS * 4, bias=False)",
}


def conversions(form: str, pairs: str) -> tuple[Word, ...]:
    """The words that make `form` of an angle."""
    return FROM_ANGLES[form, pairs]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def arguments(program: Program, batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the program."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64).to(program.dtype)
    steps = torch.arange(length)
    given = {"positions": steps, "places": steps + torch.arange(batch)[:, None]}
    return (x, *(given[name] for name in program.inputs))
