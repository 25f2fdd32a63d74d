"""Write a generated program as Python: its words as functions, and a class that calls them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from generated import spoils
from generated.biases import BiasWord
from generated.clocks import LIMIT
from generated.code import Function, collected
from generated.edits import apply

if TYPE_CHECKING:
    from generated.program import Angles, Program, Side, Table

HIDDEN = 12
HEADER = "import math\nimport torch\nfrom torch import nn\nfrom torch.nn import functional\n"

Word = Callable[..., Any]


def parameters(function: Word) -> list[str]:
    """Names of what a word takes."""
    return list(inspect.signature(function).parameters)


class Writer:
    """Writes one program."""

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
        if angles.table is None or "clock" in parameters(angles.table.look_up):
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
            # What a state dict may replace is not relied on.
            self.init.append(f'self.register_buffer("all_{name}", {name}, persistent=False)')
            given = ", ".join(
                {"table": f"self.all_{name}"}.get(each, each) for each in parameters(table.look_up)
            )
            yield f"{name} = {self._use(table.look_up)}({given})"

    def _given(self, word: Word) -> str:
        """The arguments of a word, by the names of its parameters; what they need is put into `__init__`."""
        for name, line in _NEEDS.items():
            if name in parameters(word) and line not in self.init:
                self.init.append(line)
        return ", ".join(_EXPRESSIONS.get(name, name) for name in parameters(word))

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
        lines.append(f"mixed = {attention}({', '.join(parameters(program.attention))})")
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
        word, named = self._use(bias.function, "_bias"), parameters(bias.function)
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


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
