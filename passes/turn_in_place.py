"""Turn queries and keys where they are, if nothing reads them as they were.

What: a rotation (`grape::rotate`, `rotate_normed`) of what a projection left becomes a `grape::rotate_into` that
    writes over its own tensors.
Leaves alone: devices without such a kernel, graphs that may be differentiated, inputs, parameters and buffers, memory
    that is read later by any name or was written to, tensors that share theirs, and rows that meet in memory
    (`expand`); such a result of the same call has new memory as before.
Ensures: the same numbers; what followed the result follows the tensor.
Cost: one pass over the rotations and the names of their tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, op_name, require_fake
from grape_compile.passes.memory import aliases, is_fresh, owner, viewed
from grape_compile.passes.regions import may_differentiate
from grape_compile.passes.turn_into import results_of, turn_into, turn_of, turns

#: Views whose elements are each a place of their own, if those of what they are views of are.
_APART = {
    f"aten::{name}"
    for name in (
        "view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "slice", "select", "narrow",
        "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "alias", "detach", "contiguous", "to",
    )
} | {"getitem"}  # fmt: skip


@dataclass(frozen=True)
class TurnInPlace(Pass):
    """Rotations write over tensors that die with them."""

    def run(self, program: Program) -> Outcome:
        if may_differentiate(program.graph):
            return Outcome()
        for node in turns(program):
            over = dying(program, node, node)
            if over and turn_of(node).takes(over, {}):
                turn_into(program.graph, node, node, over)
                program.forget()
        return Outcome()


def dying(program: Program, node: fx.Node, place: fx.Node) -> dict[int, fx.Node]:
    """The tensors that a rotation may write over if it runs at `place`, by number."""
    turn, results = turn_of(node), results_of(node)
    roots, kept = (
        [owner(each) for each in turn.tensors],
        {owner(each) for each in (*turn.slots, *turn.weights)},
    )
    return {
        number: tensor
        for number, (tensor, root) in enumerate(zip(turn.tensors, roots, strict=True))
        if number in results
        and roots.count(root) == 1
        and root not in kept
        and _is_alike(tensor, results[number])
        and program.marks[root] is program.marks[place]
        and _dies(program, tensor, node, place)
    }


def _is_alike(tensor: fx.Node, result: fx.Node) -> bool:
    one, two = require_fake(tensor), require_fake(result)
    return one.dtype == two.dtype and tuple(map(str, one.shape)) == tuple(map(str, two.shape))


def _dies(program: Program, tensor: fx.Node, node: fx.Node, place: fx.Node) -> bool:
    """Whether memory was made in this graph, each element once, and is never written to, nor read behind `place`."""
    root = owner(tensor)
    if not is_fresh(root) or not _is_apart(tensor):
        return False
    names = aliases(root)
    users = {user for name in names for user in name.users}
    # What is neither a name nor new memory could hand the memory on, or write into it.
    known = all(user is node or user in names or is_fresh(user) for user in users)
    return known and all(program.order[user] <= program.order[place] for user in users)


def _is_apart(tensor: fx.Node) -> bool:
    while (source := viewed(tensor)) is not None:
        if op_name(tensor) not in _APART:
            return False
        tensor = source
    return True
