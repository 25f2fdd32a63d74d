"""Turn keys straight into their cache, where a kernel writes them there in the launch that turns them.

What: a rotation (`grape::rotate`, `rotate_normed`) one of whose results is only copied into memory that is there
    (`index_copy_`, `index_put_` along the tokens, `copy_` into a slice) becomes `grape::rotate_into`, at the place of
    the copy.
Leaves alone: devices without such a kernel, graphs that may be differentiated, results that something else reads or
    that are wanted before the copy, and memory that is written to in between.
Ensures: the same numbers in the same memory, written at the same place of the graph; other results stand where their
    tensors stood if nothing reads those any more, else in new memory.
Cost: one pass over the rotations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, op_name, require_fake
from grape_compile.passes.memory import owner, written
from grape_compile.passes.regions import may_differentiate
from grape_compile.passes.rewrite_rotations import mutation_between
from grape_compile.passes.turn_in_place import dying
from grape_compile.passes.turn_into import results_of, turn_into, turn_of, turns


@dataclass(frozen=True)
class TurnIntoCaches(Pass):
    """Rotations that end in a cache write there themselves."""

    def run(self, program: Program) -> Outcome:
        if may_differentiate(program.graph):
            return Outcome()
        for node in turns(program):
            copy = _copy(program, node)
            if copy is not None and _replace(program, node, copy):
                program.forget()
        return Outcome()


@dataclass(frozen=True)
class _Copy:
    """A copy of result `number` into `memory`: whole, or into the rows `place` along the tokens."""

    node: fx.Node
    number: int
    memory: fx.Node
    place: fx.Node | None


def _copy(program: Program, node: fx.Node) -> _Copy | None:
    """Return the copy that a rotation can make itself, or None where there is none, or where it is not the same."""
    results = results_of(node)
    found = [copy for number, result in results.items() if (copy := _copied(number, result)) is not None]
    turn = turn_of(node)
    if len(found) != 1 or len(node.users) != len(results):
        return None
    number, write, memory, place = found[0]
    order = program.order
    others = [result for at, result in results.items() if at != number]
    late = all(order[user] > order[write] for result in others for user in result.users)
    read = {
        owner(each)
        for each in (*turn.tensors, *turn.slots, *turn.weights, *(() if place is None else (place,)))
    }
    if not late or program.marks[write] is not program.marks[node] or owner(memory) in read:
        return None
    if mutation_between(program, [node], write) is not None or len(written(write)) != 1:
        return None
    return _Copy(write, number, memory, place)


def _copied(number: int, result: fx.Node) -> tuple[int, fx.Node, fx.Node, fx.Node | None] | None:
    """Return the write that alone reads a result, the memory it writes to, and the rows there, or None."""
    (write,) = result.users if len(result.users) == 1 else (None,)
    if write is None:
        return None
    memory, place = write.args[0], None
    name, rank = op_name(write), require_fake(result).dim()
    if name == "aten::copy_":
        same = write.args[1] is result
    elif name == "aten::index_copy_":
        memory, axis, place, source = write.args
        same = source is result and isinstance(axis, int) and axis % rank == rank - 2
    elif name == "aten::index_put_":
        memory, places, source, *rest = write.args
        assert isinstance(places, list | tuple)
        same = source is result and not any(rest) and len(places) == rank - 1 and not any(places[:-1])
        place = places[-1]
    else:
        return None
    if not same or not isinstance(memory, fx.Node) or not (place is None or isinstance(place, fx.Node)):
        return None
    return (number, write, memory, place) if _fits(result, memory, place) else None


def _fits(result: fx.Node, memory: fx.Node, place: fx.Node | None) -> bool:
    """Whether sizes and dtypes are those of a copy that converts and repeats nothing."""
    turned, there = require_fake(result), require_fake(memory)
    if turned.dtype != there.dtype or turned.dim() != there.dim():
        return False
    if place is None:
        return _sizes(turned) == _sizes(there)
    rows = require_fake(place)
    apart = _sizes(turned)[:-2] == _sizes(there)[:-2] and _sizes(turned)[-1] == _sizes(there)[-1]
    return apart and rows.dtype == torch.int64 and _sizes(rows) == _sizes(turned)[-2:-1]


def _sizes(tensor: Tensor) -> list[object]:
    """Sizes, symbols as their expressions: equal ones are equal at every size."""
    sizes: tuple[object, ...] = tuple(tensor.shape)
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


def _replace(program: Program, node: fx.Node, copy: _Copy) -> bool:
    """Rotate at the place of the copy, if a kernel does: into the memory, and over tensors that nothing reads later."""
    write = copy.node
    outputs = {copy.number: copy.memory}
    places = {} if copy.place is None else {copy.number: copy.place}
    over = {at: tensor for at, tensor in dying(program, node, write).items() if at != copy.number}
    for wanted in (outputs | over, outputs):
        if turn_of(node).takes(wanted, places):
            turn_into(program.graph, node, write, wanted, places)
            write.replace_all_uses_with(copy.memory)
            program.graph.erase_node(write)
            return True
    return False
