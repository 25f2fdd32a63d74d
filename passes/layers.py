"""Find the layers of a model whose position encoding can be exchanged: what turns in them, what attends, by what.

What: every attention layer whose queries and keys turn, or whose logits have a bias, with the module that holds all of
    it; rotations without an attention that can be read belong to the module whose code they are.
Leaves alone: layers without a position encoding. The program is changed: it is looked at and never run.
Cost: that of all passes that find and replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.encoding import (
    Absolute,
    Bias,
    Encoding,
    Nope,
    Positions,
    Rotation,
    Signed,
    Steps,
    Table,
    Tables,
)
from grape_compile.operators.operands import parse_encoding
from grape_compile.passes.graph import Program, Role, Unreadable, module_path, require_fake
from grape_compile.passes.marks import Made, tokens_last
from grape_compile.passes.pipeline import find_sites
from grape_compile.passes.replay import Replay
from grape_compile.passes.scores import DEAD
from grape_compile.passes.site import Refusal, Site
from grape_compile.passes.table_clocks import table_frequencies


@dataclass(frozen=True, eq=False)
class Layer:
    """An attention layer: `module` holds all of its code.

    `turned` tensors turn by `rotation` (the first one's; `alike` where all have its planes) and its `frequencies`
    [planes]; logits have the ALiBi `slopes` [heads]. `heads` and `head_dim` are those of its queries, None where its
    attention cannot be read; the keys that turn have `key_heads`. An `obstacle` says why its encoding has to stay,
    `unread` why its rotation can only be taken out.
    """

    module: str
    turned: int = 0
    rotation: Rotation | None = None
    alike: bool = True
    frequencies: Tensor | None = None
    slopes: Tensor | None = None
    heads: int | None = None
    head_dim: int | None = None
    key_heads: int | None = None
    is_causal: bool = False
    obstacle: str = ""
    unread: str = ""


def find_layers(program: Program) -> tuple[list[Layer], list[Refusal]]:
    """The layers of a captured model that encode positions, and what was refused."""
    found = find_sites(program)
    return _Finder(program).layers(), found.refusals


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program, self.replay = program, Replay(program)
        self.turned = [value for value in program.graph.nodes if value in program.rotated]
        self.made = Made(program.graph, set(self.turned))

    def layers(self) -> list[Layer]:
        layers: list[Layer] = []
        left = dict.fromkeys(self.turned)
        for call, site in self.program.attended.items():
            query, key, value = call.args[:3]
            assert isinstance(query, fx.Node)
            assert isinstance(key, fx.Node)
            turned = [each for each in self.turned if each in self.made.of(query) | self.made.of(key)]
            if not turned and isinstance(site.encoding, Nope):
                continue
            for each in turned:
                left.pop(each, None)
            layers.append(self._layer(turned, call, site))
        by_module: dict[str, list[fx.Node]] = {}
        for value in left:
            by_module.setdefault(self.program.rotated[value].module, []).append(value)
        layers += [self._layer(turned, None, None) for turned in by_module.values()]
        return _apart(layers)

    def _layer(self, turned: Sequence[fx.Node], call: fx.Node | None, site: Site | None) -> Layer:
        sites = [self.program.rotated[value] for value in turned]
        paths = [each.module for each in sites] + ([module_path(call)] if call is not None else [])
        facts: dict[str, Any] = {"module": _common(paths), "turned": len(turned)}
        try:
            if call is not None:
                facts |= self._attention(call, turned)
            if site is not None and call is not None and not isinstance(site.encoding, Nope):
                facts["slopes"] = self._slopes(call, site.encoding, facts["is_causal"])
        except Unreadable as reason:
            facts["obstacle"] = str(reason)
        try:
            facts |= self._rotation(turned) if turned else {}
        except Unreadable as reason:
            facts["unread"] = str(reason)
        return Layer(**facts)

    def _attention(self, call: fx.Node, turned: Sequence[fx.Node]) -> dict[str, Any]:
        query, _, value = call.args[:3]
        assert isinstance(query, fx.Node)
        assert isinstance(value, fx.Node)
        if self.made.of(value) & set(turned):
            raise Unreadable("its values turn as well as its queries and keys")
        _, heads, _, size = require_fake(query).shape
        return {"heads": int(heads), "head_dim": int(size), "is_causal": self._is_causal(call)}

    def _is_causal(self, call: fx.Node) -> bool:
        """Whether no query sees a later key in this example."""
        mask = call.kwargs.get("mask")
        if call.kwargs.get("is_causal"):
            return True
        if not isinstance(mask, fx.Node):
            return False
        hidden = self.replay.tensor(mask) <= DEAD
        queries, keys = hidden.shape[-2:]
        return queries == keys > 1 and bool(
            (hidden | torch.ones(queries, keys, dtype=torch.bool).tril()).all()
        )

    def _rotation(self, turned: Sequence[fx.Node]) -> dict[str, Any]:
        read = [self._one(value) for value in turned]
        (rotation, frequencies), *others = read
        if any(not torch.equal(each, frequencies) for _, each in others):
            raise Unreadable("its queries and keys turn by different frequencies")
        pairs = {(each.planes.pairs(), each.output.pairs(), each.head_dim) for each, _ in read}
        facts = {"rotation": rotation, "frequencies": frequencies, "alike": len(pairs) == 1}
        return {**facts, "key_heads": min(map(self._heads, turned))}

    def _heads(self, value: fx.Node) -> int:
        """How many heads a tensor has that turns."""
        call = value.args[0]
        assert isinstance(call, fx.Node)
        slots, text = call.args[1:]
        rotation = parse_encoding(str(text))
        assert isinstance(slots, list | tuple)
        given: dict[str, Any] = dict(zip(rotation.slots, slots, strict=True))
        clock = getattr(rotation, "clock", None)
        places: Sequence[Any] = ()
        if isinstance(clock, Positions):
            places = require_fake(given[clock.slot]).shape
        elif isinstance(clock, Tables):
            places = require_fake(given[clock.cos]).shape[:-1]
        shape = require_fake(value).shape
        return int(shape[1 if tokens_last(value, places) else 2]) if len(shape) == 4 else 1

    def _one(self, value: fx.Node) -> tuple[Rotation, Tensor]:
        """A rotation as called, and its frequencies; Unreadable where nothing says that they stay the same."""
        call = value.args[0]
        assert isinstance(call, fx.Node)
        _, slots, text = call.args
        rotation = parse_encoding(str(text))
        assert isinstance(slots, list | tuple)
        given: dict[str, Any] = dict(zip(rotation.slots, slots, strict=True))
        if not isinstance(rotation, Rotation):
            raise Unreadable(f"it has {rotation} already")
        if isinstance(rotation.clock, Tables):
            tables = given[rotation.clock.cos], given[rotation.clock.sin]
            theta = table_frequencies(self.program, self.replay, *tables)
            known = replace(rotation, spectrum=Table("inv_freq"), clock=Positions("positions"))
            return known, theta
        assert rotation.spectrum is not None
        if not rotation.spectrum.slots:
            return rotation, torch.tensor(rotation.spectrum.frequencies(rotation.planes.count))
        node = given[rotation.spectrum.slots[0]]
        if not _is_fixed(self.program, node):
            raise Unreadable(
                "its frequencies are computed from inputs, so they are not the same in every call"
            )
        theta = self.replay.tensor(node)
        if theta.numel() != rotation.planes.count:
            raise Unreadable(f"its frequencies differ along more than its planes: {tuple(theta.shape)}")
        return rotation, theta.flatten()

    def _slopes(self, call: fx.Node, encoding: Encoding, is_causal: bool) -> Tensor:
        """The slopes of ALiBi, which falls with the distance of every key; Unreadable for another bias."""
        if (
            not isinstance(encoding, Bias)
            or encoding.gate is not None
            or not isinstance(encoding.clock, Steps)
            or not isinstance(encoding.distance, Signed | Absolute)
        ):
            raise Unreadable(f"it has {encoding} already")
        if isinstance(encoding.distance, Signed) and not is_causal:
            raise Unreadable("its attention is not causal in this example, and its bias rises for later keys")
        operator = parse_encoding(str(call.args[4]))
        assert isinstance(operator, Bias)
        heads = int(require_fake(call.args[0]).shape[1])  # type: ignore[arg-type] # a node
        if not operator.slopes.slots:
            return torch.tensor(operator.slopes.values()).expand(heads)
        slots: dict[str, Any] = dict(zip(operator.slots, call.args[3], strict=True))  # type: ignore[arg-type]
        slopes = self.replay.tensor(slots[operator.slopes.slots[0]])
        if slopes.numel() not in (1, heads):
            raise Unreadable("its slopes differ along the batch")
        return slopes.flatten().expand(heads)


def _is_fixed(program: Program, node: fx.Node) -> bool:
    """Whether a value is made of what the model keeps alone."""
    stack, seen = [node], {node}
    while stack:
        each = stack.pop()
        if program.roles.get(each) is Role.INPUT:
            return False
        stack += [operand for operand in each.all_input_nodes if operand not in seen]
        seen.update(each.all_input_nodes)
    return True


def _common(paths: Iterable[str]) -> str:
    """The module that holds all of some modules."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _apart(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, those that share a module with another hindered by it."""
    names = [layer.module for layer in layers]
    inside = [
        any(_holds(layer.module, other) for other in names if other != layer.module) for layer in layers
    ]
    return [
        replace(layer, obstacle=f"{layer.module or 'the model'} holds more than this layer")
        if not layer.obstacle and (held or names.count(layer.module) > 1)
        else layer
        for layer, held in zip(layers, inside, strict=True)
    ]


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner.startswith(f"{outer}.")
