"""Say where tables of cosines and sines come into a graph from outside.

What: two inputs that hold the cosine and sine of one angle, one that holds both, or a complex one of modulus one, in
    this example. Nothing
    proves that they will in the next call, and nothing pairs their columns, so that whatever is turned by them is left
    alone; the refusal says so once per pair.
Leaves alone: the graph. Tables with a known origin (origins.py) are no such inputs.
Cost: one comparison per pair of floating inputs of one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, fx

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, Role, fake, module_path, source_line
from grape_compile.passes.replay import exact, has_value
from grape_compile.passes.site import Refusal

_LARGEST = 1 << 22
_REASON = (
    "tables of cosines and sines are inputs of the graph: nothing proves that they hold the same kind of values in the "
    "next call; compute them in the same graph, from positions and frequencies (a graph break between the two, or a "
    "frame that receives them ready made, takes them apart)"
)


@dataclass(frozen=True)
class NoteGivenTables(Pass):
    """Given tables become refusals."""

    def run(self, program: Program) -> Outcome:
        return Outcome(refusals=[_refusal(tables) for tables in _given(program)])


def _given(program: Program) -> Iterator[tuple[fx.Node, ...]]:
    known = set(program.stands.values())
    values: dict[fx.Node, Tensor] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = fake(node)
        if value is None or program.roles.get(node) is not Role.INPUT or not _is_used(node, program):
            continue
        if has_value(program, node) and 1 < program.values[node].numel() <= _LARGEST:
            held = program.values[node].detach()
            if value.is_floating_point():
                values[node] = held
            if node not in known and any(_turns(*parts) for parts in _both_in(held)):
                yield (node,)
    for one, other in combinations(values, 2):
        if known >= {one, other}:
            continue
        if values[one].shape == values[other].shape and _turns(values[one], values[other]):
            yield one, other


def _is_used(node: fx.Node, program: Program) -> bool:
    """Whether anything reads an input, or what stands for it."""
    return bool(node.users) or node in program.stands.values()


def _both_in(value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What may be cosines and sines in one tensor: real and imaginary parts, both ends of an axis of two, halves."""
    if value.is_complex():
        yield value.real, value.imag
    elif value.is_floating_point():
        for axis, size in enumerate(value.shape):
            if size == 2:
                yield value.select(axis, 0), value.select(axis, 1)
        if value.dim() and value.shape[-1] % 2 == 0:
            yield value.chunk(2, -1)  # type: ignore[misc]  # of two halves


def _turns(one: Tensor, other: Tensor) -> bool:
    """A modulus that is the same everywhere to the rounding of the tables, of parts that are not: more than marks."""
    modulus = torch.hypot(exact(one), exact(other))
    bound = 4 * max(torch.finfo(part.dtype).eps for part in (one, other)) * float(modulus.max())
    if float(modulus.max() - modulus.min()) > bound:
        return False
    return all(
        bool((part != part.flatten()[0]).any() and (part != part.round()).any()) for part in (one, other)
    )


def _refusal(tables: tuple[fx.Node, ...]) -> Refusal:
    user = next(iter(tables[0].users))
    return Refusal(
        "outside", _REASON, tables[0].name, module_path(user), source_line(user), "rotation by tables"
    )
