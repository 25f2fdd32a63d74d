"""What passes that let rotations write into memory share: whether a kernel does, and `grape::rotate_into` put in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import fx

import grape_compile.operators  # noqa: F401 - registers torch.ops.grape
from grape_compile.encoding import Multiplicative, parse
from grape_compile.errors import GrapeError
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.turn_call import Norm, Place, TurnCall
from grape_compile.passes.graph import Program, Unreadable, op_name, require_fake
from grape_compile.passes.operands import fake_value

aten = torch.ops.aten

#: Rotations into new memory.
TURNS: Final = (torch.ops.grape.rotate.default, torch.ops.grape.rotate_normed.default)


def turns(program: Program) -> list[fx.Node]:
    """The rotations of a program."""
    return [node for target in TURNS for node in program.graph.find_nodes(op="call_function", target=target)]


def results_of(node: fx.Node) -> dict[int, fx.Node]:
    """What reads each tensor that one of `TURNS` turned, by number."""
    return {int(user.args[1]): user for user in node.users if op_name(user) == "getitem"}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Turn:
    """The operands of a rotation, and of the RMSNorm beside it where `weights` are given."""

    tensors: list[fx.Node]
    slots: list[fx.Node]
    text: str
    weights: list[fx.Node] = field(default_factory=list)
    norm: str = ""
    epsilon: float = 0.0
    offset: float = 0.0

    def takes(self, outputs: Mapping[int, fx.Node], places: Mapping[int, fx.Node]) -> bool:
        """Whether a kernel of the device turns into these outputs, and into new memory where there is none."""
        encoding = parse(self.text)
        assert isinstance(encoding, Multiplicative)
        try:
            given = [require_fake(each) for each in self.tensors]
            targets = [
                require_fake(outputs[number])
                if number in outputs
                else torch.empty_like(each, memory_format=torch.contiguous_format)
                for number, each in enumerate(given)
            ]
            rows = [
                require_fake(places[number]) if number in places else None for number in range(len(given))
            ]
            named = dict(zip(encoding.slots, map(require_fake, self.slots), strict=True))
            norm = None
            if self.weights:
                weights = tuple(map(require_fake, self.weights))
                norm = Norm(weights, self.epsilon, cast(Place, self.norm), self.offset)
            call = TurnCall(tuple(given), encoding, named, norm, tuple(rows))
            return call.device.type in choose_turn(call, targets).devices
        except (GrapeError, Unreadable):
            return False


def turn_of(node: fx.Node) -> Turn:
    """The operands of one of `TURNS`."""
    arguments: Any = node.args
    if node.target is torch.ops.grape.rotate.default:
        tensors, slots, text = arguments
        return Turn(list(tensors), list(slots), text)
    tensors, weights, slots, text, norm, epsilon, offset = arguments
    return Turn(list(tensors), list(slots), text, list(weights), norm, epsilon, offset)


def turn_into(
    graph: fx.Graph,
    node: fx.Node,
    before: fx.Node,
    outputs: Mapping[int, fx.Node],
    places: Mapping[int, fx.Node] | None = None,
) -> None:
    """Rotate in front of `before`: into these outputs, and into new memory for all other results."""
    turn, results, rows = turn_of(node), results_of(node), places or {}
    with graph.inserting_before(before):
        targets = []
        for number, tensor in enumerate(turn.tensors):
            target = outputs.get(number)
            if target is None:
                form: dict[str, fx.node.Argument] = {"memory_format": torch.contiguous_format}
                target = graph.call_function(aten.empty_like.default, (tensor,), form)
                target.meta = {**results.get(number, node).meta, "val": fake_value(target)}
            targets.append(target)
        to_rows = [rows.get(number) for number in range(len(targets))]
        norm = (turn.weights, turn.norm, turn.epsilon, turn.offset)
        operands: Any = (turn.tensors, turn.slots, turn.text, targets, to_rows, *norm)
        call = graph.call_function(torch.ops.grape.rotate_into.default, operands)
        call.meta = {**node.meta, "val": None}
    for number, result in results.items():
        result.replace_all_uses_with(targets[number])
    for each in [*node.users, node]:
        graph.erase_node(each)
