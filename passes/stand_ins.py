"""Read a graph that is given marked tables as if it had made them itself, and take the given ones again afterwards.

`graft` puts the operators behind each mark (origins.py) before the graph, each once: tables of several calls share what
was given to both. `settle` follows when all is rewritten. What was found holds for tensors with the same marks:
`marked_as` looks at them in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from grape_compile.passes.facts import keep
from grape_compile.passes.graph import Program, Role, Unreadable, fake, frozen
from grape_compile.passes.operands import fake_value
from grape_compile.passes.origins import Leaf, Mark, Part, alike, mark_on
from grape_compile.passes.sizes import Sizes


def graft(program: Program, marks: Mapping[fx.Node, Mark]) -> Program:
    """A program that seems to make its tables itself; `settle` has to follow when all is rewritten."""
    stock = _Stock(program, marks)
    stands: dict[fx.Node, fx.Node] = {}
    places = {node: place for place, node in enumerate(program.graph.find_nodes(op="placeholder"))}
    for given, mark in marks.items():
        try:
            end = stock.table(mark, (places[given],))
        except Unreadable:
            continue
        made, taken = end.meta["val"], given.meta["val"]
        if made.dtype == taken.dtype and list(made.shape) == [Sizes()(size) for size in taken.shape]:
            stands.setdefault(end, given)
            end.meta["val"] = taken
            given.replace_all_uses_with(end, delete_user_cb=lambda user: user.op != "output")
    outside = frozenset(stock.nodes - stands.keys())
    grafted = Program(
        program.module,
        stock.roles,
        stock.values,
        program.no_grad,
        outside=outside,
        stands=stands,
        ways=stock.ways,
    )
    keep(grafted, (*program.kept, *stock.ways))
    return grafted


class _Stock:
    """The copies made so far, each distinct one once."""

    def __init__(self, program: Program, marks: Mapping[fx.Node, Mark]) -> None:
        self.graph = program.graph
        self.roles, self.values = dict(program.roles), dict(program.values)
        self.first = next(node for node in self.graph.nodes if node.op != "placeholder")
        self.mode: Any = torch._guards.detect_fake_mode([node.meta.get("val") for node in marks])
        self.made: dict[object, fx.Node] = {}
        self.nodes: set[fx.Node] = set()
        self.ways: dict[fx.Node, tuple[int, ...]] = {}

    def table(self, mark: Mark, way: tuple[int, ...]) -> fx.Node:
        """The node that stands for a marked tensor, which is found on this way."""
        origin, copies = mark.origin, dict[fx.Node, fx.Node]()
        sizes = Sizes({symbol: size for (symbol, *_), size in zip(origin.symbols, mark.sizes, strict=True)})
        begins = enumerate(zip(origin.leaves, mark.parts, strict=True))
        for step in origin.graph.nodes:
            if step.op == "output":
                return copies[step.args[0]]
            if step in origin.sizes:
                copies[step] = self._size(origin.sizes[step], mark, sizes)
            elif step.op == "placeholder":
                place, (leaf, part) = next(begins)
                if isinstance(part, Mark):
                    copies[step] = self.table(part, (*way, place))
                    continue
                copies[step] = self._leaf(leaf, part, sizes)
                if leaf.is_kept:
                    self.ways.setdefault(copies[step], (*way, place))
            else:
                copies[step] = self._step(step, copies)
        raise Unreadable("a table without an end")

    def _leaf(self, leaf: Leaf, part: Part, sizes: Sizes) -> fx.Node:
        if (held := self.made.get(part.identity)) is not None:
            return held
        node = self._new(part.identity, lambda: self.graph.placeholder(leaf.name))
        shape, like = [sizes(size) for size in leaf.value.shape], leaf.value
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.roles[node] = leaf.role
        self.values[node] = part.value()
        return node

    def _step(self, step: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), copies.__getitem__)
        dtype = step.meta["dtype"]
        target: Any = step.target
        key = (target, frozen(args, _itself), frozen(kwargs, _itself), dtype)
        if (held := self.made.get(key)) is not None:
            return held
        node = self._new(key, lambda: self.graph.call_function(target, args, kwargs))
        node.meta.update(step.meta)
        with self.mode:
            node.meta["val"] = fake_value(node)
        if getattr(fake(node), "dtype", None) is not dtype:
            raise Unreadable("a table that is of another type under the autocast of its own graph")
        return node

    def _size(self, size: torch.SymInt, mark: Mark, sizes: Sizes) -> fx.Node:
        """A node for an open size: a constant of equal value is not the same."""
        key = ("size", mark.call, str(size))
        if (held := self.made.get(key)) is not None:
            return held
        node = self._new(key, lambda: self.graph.placeholder("size"))
        node.meta["val"] = sizes(size)
        self.roles[node] = Role.INPUT
        return node

    def _new(self, key: object, make: Callable[[], fx.Node]) -> fx.Node:
        with self.graph.inserting_before(self.first):
            node = self.made[key] = make()
        self.nodes.add(node)
        return node


def _itself(item: Any) -> object:
    return item


def settle(program: Program) -> None:
    """Take the given tables again, and nothing else of what made them."""
    for end, given in program.stands.items():
        end.replace_all_uses_with(given, delete_user_cb=lambda user: user not in program.outside)
    for node in reversed(list(program.graph.nodes)):
        if node in program.outside or node in program.stands:
            program.graph.erase_node(node)
    program.forget()
    program.graph.lint()
    program.module.recompile()


def found_on(way: Sequence[int], args: Sequence[Any]) -> Any:
    """What a kept tensor is in a call: an input, or a part of what one is made of; None where it is gone."""
    place, *parts = way
    if not parts:
        return args[place]
    found: Mark | Part | None = mark_on(args[place])
    for part in parts:
        found = found.parts[part] if isinstance(found, Mark) else None
    return found.value() if isinstance(found, Part) else None


def marked_as(examples: Sequence[Any]) -> Callable[[Sequence[Any]], bool]:
    """Whether the inputs of a call are marked as the examples are."""
    marks = [(place, mark) for place, example in enumerate(examples) if (mark := mark_on(example))]
    expected = alike(marks)

    def holds(args: Sequence[Any]) -> bool:
        return alike((place, mark) for place, _ in marks if (mark := mark_on(args[place]))) == expected

    return holds
