"""What passes that let rotations write into memory share: whether a kernel does, and `grape::rotate_into` put in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from grape_compile.encoding import Multiplicative, parse
from grape_compile.errors import GrapeError
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.turn_call import TurnCall
from grape_compile.passes.graph import Unreadable, op_name, require_fake
from grape_compile.passes.operands import fake_value

aten = torch.ops.aten


def results_of(node: fx.Node) -> dict[int, fx.Node]:
    """What reads each turned tensor of a `grape::rotate`, by number."""
    return {int(user.args[1]): user for user in node.users if op_name(user) == "getitem"}  # type: ignore[arg-type]


def operands_of(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensors and the slots of a `grape::rotate`."""
    tensors, slots = node.args[:2]
    assert isinstance(tensors, list | tuple)
    assert isinstance(slots, list | tuple)
    return list(tensors), list(slots)  # type: ignore[arg-type] # tensors are nodes


def takes(node: fx.Node, outputs: Mapping[int, fx.Node], places: Mapping[int, fx.Node]) -> bool:
    """Whether a kernel of the device turns the tensors into these outputs, and into new memory where there is none."""
    tensors, slots = operands_of(node)
    encoding = parse(str(node.args[2]))
    assert isinstance(encoding, Multiplicative)
    try:
        given = [require_fake(each) for each in tensors]
        targets = [
            require_fake(outputs[number])
            if number in outputs
            else torch.empty_like(each, memory_format=torch.contiguous_format)
            for number, each in enumerate(given)
        ]
        rows = tuple(
            require_fake(places[number]) if number in places else None for number in range(len(given))
        )
        named = dict(zip(encoding.slots, map(require_fake, slots), strict=True))
        call = TurnCall(tuple(given), encoding, named, places=rows)
        return call.device.type in choose_turn(call, targets).devices
    except (GrapeError, Unreadable):
        return False


def turn_into(
    graph: fx.Graph,
    node: fx.Node,
    before: fx.Node,
    outputs: Mapping[int, fx.Node],
    places: Mapping[int, fx.Node] | None = None,
) -> None:
    """Rotate in front of `before`: into these outputs, and into new memory for all other results."""
    tensors, slots = operands_of(node)
    results, rows = results_of(node), places or {}
    with graph.inserting_before(before):
        targets = []
        for number, tensor in enumerate(tensors):
            target = outputs.get(number)
            if target is None:
                form: dict[str, fx.node.Argument] = {"memory_format": torch.contiguous_format}
                target = graph.call_function(aten.empty_like.default, (tensor,), form)
                target.meta = {**results.get(number, node).meta, "val": fake_value(target)}
            targets.append(target)
        operands = (tensors, slots, node.args[2], targets, [rows.get(n) for n in range(len(tensors))])
        call = graph.call_function(torch.ops.grape.rotate_into.default, operands)
        call.meta = {**node.meta, "val": None}
    for number, result in results.items():
        result.replace_all_uses_with(targets[number])
    for each in [*node.users, node]:
        graph.erase_node(each)
