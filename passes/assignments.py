"""Turn writes into a fresh tensor into values: `out[..., ::2] = x` becomes a scatter that returns `out`.

What: `copy_` into slices and selections of a tensor made in this graph: who reads it later, by whatever view, reads
    the scatter; and arithmetic in place (`omega /= 8`) on one that nothing has read before. Who reads the result of a
    `copy_` into a whole buffer (frequencies chosen by the length, LongRoPE) reads what was copied; the buffer is
    written all the same.
Leaves alone: every other write into an input, a buffer or a cache, and every tensor that is read later by a name that
    may be a view of it or a copy. What is read after such a write is stale (`Program.stale`): no pass looks through it.
Ensures: the same values at every later use.
Cost: one pass over the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, require_fake
from grape_compile.passes.memory import aliases, is_pure, op_name, owner, viewed, written
from grape_compile.passes.operands import fake_value

aten = torch.ops.aten
_FRESH = {
    "aten::empty_like",
    "aten::zeros_like",
    "aten::empty",
    "aten::zeros",
    "aten::new_empty",
    "aten::new_zeros",
}
_MADE = _FRESH | {
    "aten::arange",
    "aten::linspace",
    "aten::ones",
    "aten::ones_like",
    "aten::full",
    "aten::full_like",
}
_IN_PLACE = {
    f"aten::{name}_": getattr(aten, name) for name in ("add", "sub", "mul", "div", "neg", "exp", "reciprocal")
}
_RESULTS = {getattr(packet, name) for packet in _IN_PLACE.values() for name in packet.overloads()}
_CERTAIN_VIEWS = {
    f"aten::{name}"
    for name in (
        *("slice", "select", "view", "unsqueeze", "squeeze", "transpose", "permute", "t", "mT", "narrow"),
        *("expand", "unflatten", "view_as", "detach", "alias", "movedim", "swapaxes"),
    )
}
_SCATTERS = {"aten::slice": aten.slice_scatter.default, "aten::select": aten.select_scatter.default}


@dataclass(frozen=True)
class FunctionalAssignments(Pass):
    """Writes into fresh tensors become the operators that return what was written."""

    def run(self, program: Program) -> Outcome:
        for node in program.graph.nodes:
            if op_name(node) in _IN_PLACE:
                _out_of_place(program.graph, node)
        for node in program.graph.find_nodes(op="call_function", target=aten.copy_.default):
            _functionalise(program.graph, node)
            _read_what_was_copied(program, node)
        return Outcome()


def _out_of_place(graph: fx.Graph, write: fx.Node) -> None:
    """Arithmetic in place on a tensor made here whose first reader it is: no view of it can be waiting."""
    base = write.args[0]
    if not isinstance(base, fx.Node) or (op_name(base) not in _MADE and base.target not in _RESULTS):
        return
    function = getattr(_IN_PLACE[op_name(write)], str(write.target).rpartition(".")[2], None)
    if function is None or min(base.users) is not write or base in write.args[1:]:
        return
    with graph.inserting_before(write):
        value = _call(graph, function, write.args, write, dict(write.kwargs))
    if require_fake(value).dtype != require_fake(base).dtype:  # in place keeps the type
        graph.erase_node(value)
        return
    base.replace_all_uses_with(value, delete_user_cb=lambda user: user not in (write, value))
    write.replace_all_uses_with(value)
    graph.erase_node(write)


def _functionalise(graph: fx.Graph, write: fx.Node) -> None:
    views = _views(write)
    if not views or write.users or len(write.args) > 2 or not isinstance(write.args[1], fx.Node):
        return
    base = views[-1].all_input_nodes[0]
    root = owner(base)
    if root.op != "call_function" or not (is_pure(root) or op_name(root) in _FRESH):
        return
    order = {node: position for position, node in enumerate(graph.nodes)}
    before = [alias for alias in aliases(root) if order[alias] < order[write]]
    late = [(alias, user) for alias in before for user in alias.users if order[user] > order[write]]
    known = {base}
    if not all(_is_rebuilt(alias, known) for alias, _ in late):
        return
    with graph.inserting_before(write):
        value: Any = _matching(graph, write.args[1], views[0])
        for view in views:
            target = view.all_input_nodes[0]
            value = _call(graph, _SCATTERS[op_name(view)], (target, value, *view.args[1:]), write)
        now = {base: value}
        for alias, user in late:
            user.replace_input_with(alias, _rebuilt(graph, alias, now))
    graph.erase_node(write)


def _is_rebuilt(alias: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a view can be cut anew out of the base: it certainly shares memory, by this base and no other way."""
    while alias not in known:
        source = viewed(alias)
        if source is None or op_name(alias) not in _CERTAIN_VIEWS:
            return False
        alias = source
    return True


def _rebuilt(graph: fx.Graph, alias: fx.Node, now: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same view of the base as it is now."""
    if alias not in now:
        source = alias.all_input_nodes[0]
        again = graph.node_copy(alias, lambda node: _rebuilt(graph, node, now) if node is source else node)
        now[alias] = again
    return now[alias]


def _read_what_was_copied(program: Program, write: fx.Node) -> None:
    """Of a copy into a whole input that nothing else writes to, as nothing writes to what is copied."""
    if write._erased or not write.users or len(write.args) > 2:
        return
    base, value = write.args
    if not isinstance(base, fx.Node) or not isinstance(value, fx.Node) or base.op != "placeholder":
        return
    others = {owner(each) for node in program.mutations if node is not write for each in written(node)}
    if base in others or owner(value) in others or owner(value) is base:
        return
    readers = list(write.users)
    with program.graph.inserting_before(write):
        copied = _matching(program.graph, value, base)
    for reader in readers:
        reader.replace_input_with(write, copied)


def _views(write: fx.Node) -> list[fx.Node] | None:
    """The slices and selections between the written view and its base, innermost first; None for other views."""
    views: list[fx.Node] = []
    node = write.args[0]
    while isinstance(node, fx.Node) and op_name(node) in _SCATTERS:
        if node.kwargs:
            return None
        views.append(node)
        node = node.args[0]
    return views or None


def _matching(graph: fx.Graph, value: fx.Node, view: fx.Node) -> fx.Node:
    """The value in the shape and type of the view it is written to."""
    wanted, have = require_fake(view), require_fake(value)
    if have.dtype != wanted.dtype:
        value = _call(graph, aten.to.dtype, (value, wanted.dtype), value)
    if list(map(str, have.shape)) != list(map(str, wanted.shape)):
        value = _call(graph, aten.expand_as.default, (value, view), value)
    return value


def _call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], origin: fx.Node, kwargs: dict[str, Any] | None = None
) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {
        name: origin.meta[name] for name in ("stack_trace", "nn_module_stack") if name in origin.meta
    }
    node.meta["val"] = fake_value(node)
    return node
