"""Turn writes into a fresh tensor into values: `out[..., ::2] = x` becomes a scatter that returns `out`.

What: `copy_`, arithmetic in place and `index_put_` into a tensor made in this graph, or into slices and selections of
    it: who reads it later, by whatever view, reads what was computed, or the scatter of it, or what the scatter was
    given where that is all it reads. Who reads what a `copy_` has put into a buffer (frequencies chosen by the length,
    LongRoPE; a cache of angles) reads what was copied; the buffer is written all the same.
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
from torch.utils import _pytree as pytree

from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, Taint, require_fake
from grape_compile.passes.memory import CERTAIN_VIEWS, aliases, is_pure, op_name, owner, viewed, written
from grape_compile.passes.operands import fake_value
from grape_compile.passes.pieces import PUTS
from grape_compile.passes.regions import without_gradient

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
    f"aten::{name}_": getattr(aten, name)
    for name in (
        *("add", "sub", "mul", "div", "neg", "exp", "reciprocal", "masked_fill", "clamp", "fill", "addcmul"),
        *("index_put", "index_add", "index_copy"),
    )
}
_SCATTERS = {"aten::slice": aten.slice_scatter.default, "aten::select": aten.select_scatter.default}


@dataclass(frozen=True)
class FunctionalAssignments(Pass):
    """Writes into fresh tensors become the operators that return what was written."""

    def run(self, program: Program) -> Outcome:
        for node in program.graph.nodes:
            if node.target is aten.copy_.default:
                _functionalise(program.graph, node)
                _read_what_was_copied(program, node)
            elif op_name(node) in _IN_PLACE and _is_placed(program, node):
                _out_of_place(program.graph, node)
                _functionalise(program.graph, node)
        silent = set(without_gradient(program.graph))
        for node in program.graph.nodes:
            while (
                op_name(node) in _SCATTERS
                and node.args[0] not in silent
                and _read_past_a_scatter(program, node)
            ):
                pass
        return Outcome()


def _is_placed(program: Program, write: fx.Node) -> bool:
    """Whether what is written is arithmetic, or put at places that activations do not choose."""
    name = op_name(write).removesuffix("_")
    places = pytree.tree_leaves(write.args[1 if name == "aten::index_put" else 2]) if name in PUTS else []
    return all(
        program.taints.get(each, Taint.DATA) < Taint.PARAMETER for each in places if isinstance(each, fx.Node)
    )


def _out_of_place(graph: fx.Graph, write: fx.Node) -> None:
    """Arithmetic in place on a tensor made here whose first reader it is: no view of it can be waiting."""
    base = write.args[0]
    if not isinstance(base, fx.Node) or not _is_alone(base) or min(base.users) is not write:
        return
    value = _result(graph, write)
    if value is not None:
        base.replace_all_uses_with(value, delete_user_cb=lambda user: user not in (write, value))
        write.replace_all_uses_with(value)
        graph.erase_node(write)


def _result(graph: fx.Graph, write: fx.Node) -> fx.Node | None:
    """What a node writes, as a value of its own; None where that has another type than the place has."""
    function = getattr(_IN_PLACE[op_name(write)], str(write.target).rpartition(".")[2], None)
    if function is None or write.args[0] in write.args[1:]:
        return None
    with graph.inserting_before(write):
        value = _call(graph, function, write.args, write, dict(write.kwargs))
    base = write.args[0]
    assert isinstance(base, fx.Node)
    if require_fake(value).dtype == require_fake(base).dtype:  # in place keeps the type
        return value
    graph.erase_node(value)
    return None


def _is_alone(node: fx.Node) -> bool:
    """Whether no other name leads to the memory of a value: it is new, or the one view of a new one."""
    while (source := viewed(node)) is not None:
        others = [user for user in source.users if user is not node]
        if any(op_name(user) != "aten::_assert_tensor_metadata" for user in others):
            return False
        node = source
    return node.op == "call_function" and (is_pure(node) or op_name(node) in _MADE)


def _functionalise(graph: fx.Graph, write: fx.Node) -> None:
    """What is written into a tensor made here, or into cuts of it, is what is read there from now on."""
    views = _views(write)
    if (
        write._erased
        or views is None
        or (write.target is aten.copy_.default and not _copies_into(write, views))
    ):
        return
    into = write.args[0]
    assert isinstance(into, fx.Node)
    base = views[-1].all_input_nodes[0] if views else into
    root = owner(base)
    if root.op != "call_function" or not (is_pure(root) or op_name(root) in _FRESH):
        return
    order = {node: position for position, node in enumerate(graph.nodes)}
    before = [alias for alias in aliases(root) if order[alias] < order[write]]
    late = [(alias, user) for alias in before for user in alias.users if order[user] > order[write]]
    known = {base}
    if not all(_is_rebuilt(alias, known) for alias, _ in late):
        return
    value: Any = write.args[1] if write.target is aten.copy_.default else _result(graph, write)
    if value is None:
        return
    late += [(into, user) for user in write.users]
    write.replace_all_uses_with(into)
    with graph.inserting_before(write):
        value = _matching(graph, value, into)
        for view in views:
            target = view.all_input_nodes[0]
            value = _call(graph, _SCATTERS[op_name(view)], (target, value, *view.args[1:]), write)
        now = {base: value}
        for alias, user in late:
            user.replace_input_with(alias, _rebuilt(graph, alias, now))
    graph.erase_node(write)


def _copies_into(write: fx.Node, views: list[fx.Node]) -> bool:
    """Whether a copy writes one tensor into cuts of another."""
    return bool(views) and len(write.args) == 2 and isinstance(write.args[1], fx.Node)


def _is_rebuilt(alias: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a view can be cut anew out of the base: it certainly shares memory, by this base and no other way."""
    while alias not in known:
        source = viewed(alias)
        if source is None or op_name(alias) not in CERTAIN_VIEWS:
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
    """Of a copy into an input, or into a cut of it, that nothing else writes to, as nothing writes to what is copied.

    Who reads the result reads what was copied, and so does who makes the same cut anew.
    """
    if write._erased or len(write.args) > 2:
        return
    into, value = write.args
    if not isinstance(into, fx.Node) or not isinstance(value, fx.Node):
        return
    base = owner(into)
    others = {owner(each) for node in program.mutations if node is not write for each in written(node)}
    if base.op != "placeholder" or base in others or owner(value) in others or owner(value) is base:
        return
    if write in program.no_grad and value not in program.no_grad and owner(value).op != "placeholder":
        return
    late = {user for user in base.users if program.order.get(user, -1) > program.order[write]}
    anew = [user for user in late if into is not base and _is_same_cut(user, into)]
    readers = [(reader, read) for read in (write, *anew) for reader in read.users]
    if not readers:
        return
    with program.graph.inserting_before(write):
        copied = _matching(program.graph, value, into)
    for reader, read in readers:
        reader.replace_input_with(read, copied)


def _is_same_cut(one: fx.Node, other: fx.Node) -> bool:
    cut = op_name(one) in _SCATTERS and one.target is other.target
    return cut and one.args == other.args and one.kwargs == other.kwargs


def _read_past_a_scatter(program: Program, node: fx.Node) -> bool:
    """Whether a cut of what a scatter gives was wholly there before, and is now a cut of that; or is what was written.

    Only where nobody writes into any of the three, so that it does not matter whose memory is read.
    """
    scatter = node.args[0]
    if not isinstance(scatter, fx.Node) or scatter.target is not _SCATTERS[op_name(node)]:
        return False
    if node.kwargs or scatter.kwargs:
        return False
    base, value = scatter.args[:2]
    assert isinstance(base, fx.Node)
    assert isinstance(value, fx.Node)
    touched = {owner(each) for write in program.mutations for each in written(write)}
    if touched & {owner(each) for each in (scatter, base, value)}:
        return False
    places = scatter.args[2:]
    if node.args[1:] == places:
        node.replace_all_uses_with(value)
    elif _are_apart(op_name(node), node.args[1:], places, require_fake(base)):
        node.replace_input_with(scatter, base)
        return True
    return False


def _are_apart(name: str, one: tuple[Any, ...], other: tuple[Any, ...], base: torch.Tensor) -> bool:
    """Whether two cuts of one tensor have no element in common, whatever its open sizes."""
    first, second = (_taken(name, cut, base) for cut in (one, other))
    if first is None or second is None or first[0] != second[0]:
        return False
    return not set(first[1]) & set(second[1])


def _taken(name: str, cut: tuple[Any, ...], base: torch.Tensor) -> tuple[int, range] | None:
    """The axis of a cut and the entries it takes; None where one of them is open."""
    axis, *bounds = cut or (0,)
    size = base.shape[axis]
    if not isinstance(size, int) or not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    if name == "aten::select":
        place = bounds[0] % size
        return axis % base.dim(), range(place, place + 1)
    start, stop, step = (*bounds, None, None, None)[:3]
    return axis % base.dim(), range(size)[start:stop:step]


def _views(write: fx.Node) -> list[fx.Node] | None:
    """The slices and selections between the written view and its base, innermost first; None for odd ones."""
    views: list[fx.Node] = []
    node = write.args[0]
    while isinstance(node, fx.Node) and op_name(node) in _SCATTERS:
        if node.kwargs:
            return None
        views.append(node)
        node = node.args[0]
    return views


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
