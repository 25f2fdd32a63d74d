"""Replace rotations by `grape::rotate`.

What: every verified rotation; q and k that turn by the same angles share one call.
Leaves alone: a site whose operands cannot be cut out of the graph, whose fp64 replay differs, or whose values are
    mutated in between: it becomes a refusal.
Ensures: consumers see a value of the same shape and dtype at the same place.
Cost: one reading and one replay per distinct region.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

import grape_compile.operators  # noqa: F401 - registers torch.ops.grape
from grape_compile.operators.providers import turn_lowering
from grape_compile.operators.turn_call import TurnCall
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import (
    Program,
    Unreadable,
    is_pure,
    module_path,
    op_name,
    require_fake,
    source_line,
)
from grape_compile.passes.memory import owner, viewed, writes, written
from grape_compile.passes.operands import Emitter
from grape_compile.passes.plans import Miss, RotationPlan
from grape_compile.passes.replay import Replay
from grape_compile.passes.rotations import detect_rotations
from grape_compile.passes.site import Refusal, Site
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.verify import verify_rotation


@dataclass
class _Ready:
    """A rotation to be called with `input`, what the plan turns with its channels last."""

    plan: RotationPlan
    input: fx.Node
    operands: tuple[fx.Node, ...]
    error: float


@dataclass(frozen=True)
class RewriteRotations(Pass):
    """Rotations become `grape::rotate` nodes."""

    def run(self, program: Program) -> Outcome:
        plans, misses = detect_rotations(program)
        outcome = Outcome(refusals=[refusal(node, miss) for node, miss in misses])
        emitter, replay = Emitter(program, Sizes()), Replay(program)
        ready: list[_Ready] = []
        verified: dict[object, float] = {}
        for plan in plans:
            try:
                ready.append(_prepare(program, plan, emitter, replay, verified))
            except Unreadable as reason:
                outcome.refusals.append(
                    refusal(
                        plan.output,
                        Miss(
                            "verification",
                            f"{plan.encoding} was recognised but not used: {reason}",
                            9,
                            str(plan.encoding),
                        ),
                    )
                )
        for group in _groups(program, emitter, ready):
            lowering = _lowering(group)
            sites = [_site(item, lowering) for item in group]
            _replace(program, emitter, group, sites)
            outcome.sites += sites
        remove_unused(program.graph, [*(item.plan.output for item in ready), *emitter.ranks])
        return outcome


def refusal(node: fx.Node, miss: Miss) -> Refusal:
    """A miss as the report shows it."""
    return Refusal(miss.rule, miss.reason, node.name, module_path(node), source_line(node), miss.nearest)


def _lowering(group: list[_Ready]) -> str:
    """What turns the tensors of a group, which share one call."""
    encoding = group[0].plan.operator
    slots = zip(encoding.slots, map(require_fake, group[0].operands), strict=True)
    return turn_lowering(TurnCall(tuple(require_fake(item.input) for item in group), encoding, dict(slots)))


def _site(item: _Ready, lowering: str) -> Site:
    node, plan = item.plan.output, item.plan
    return Site(
        "rotation",
        plan.encoding,
        module_path(node),
        source_line(node),
        plan.evidence,
        item.error,
        lowering,
    )


def _prepare(
    program: Program, plan: RotationPlan, emitter: Emitter, replay: Replay, verified: dict[object, float]
) -> _Ready:
    hazard = mutation_between(program, plan.region, plan.output)
    if hazard is not None:
        raise Unreadable(f"{hazard.name} changes a value in place while it is being rotated")
    source = _permuted(emitter, plan.input, plan.order)
    operands = plan.emit(emitter, source)
    hazard = overwritten(program, operands, plan.output)
    if hazard is not None:
        raise Unreadable(f"{hazard.name} changes the angles in place before they are used")
    key = (plan.key, operands)
    if key not in verified:
        verified[key] = verify_rotation(plan, operands, replay)
    return _Ready(plan, source, operands, verified[key])


def _permuted(emitter: Emitter, node: fx.Node, order: Sequence[int]) -> fx.Node:
    if list(order) == sorted(order):
        return node
    return emitter.call(node, torch.ops.aten.permute.default, (node, list(order)))


def mutation_between(program: Program, region: Iterable[fx.Node], output: fx.Node) -> fx.Node | None:
    """A node that writes, between the first read of the region and its output, into something the region reads."""
    if not program.mutations:
        return None
    region = list(region)
    touched = {owner(operand) for node in region for operand in (node, *node.all_input_nodes)}
    return _write_into(program, touched, min(program.order[node] for node in region), output)


def overwritten(program: Program, operands: Iterable[fx.Node], output: fx.Node) -> fx.Node | None:
    """A node that writes into an operand between where it is cut out and `output`, where the operator reads it."""
    for operand in operands if program.mutations else ():
        start = operand
        while start not in program.order and (source := viewed(start)) is not None:
            start = source
        write = _write_into(program, _handed_on(owner(operand)), program.order.get(start, -1), output)
        if write is not None:
            return write
    return None


def _handed_on(root: fx.Node) -> set[fx.Node]:
    """The names of a value's memory: its own and, for the result of a write, what was written into."""
    names = {root}
    while writes(root) and written(root):
        root = owner(written(root)[0])
        names.add(root)
    return names


def _write_into(program: Program, memory: set[fx.Node], start: int, output: fx.Node) -> fx.Node | None:
    order = program.order
    for node in program.mutations:
        if start < order.get(node, -1) < order[output] and any(
            owner(each) in memory for each in written(node)
        ):
            return node
    return None


def _groups(program: Program, emitter: Emitter, ready: list[_Ready]) -> list[list[_Ready]]:
    """Rotations that one call can serve: equal operator and operands, all inputs ready before the first use."""
    groups: list[list[_Ready]] = []
    for item in ready:
        last = groups[-1] if groups else None
        if last is not None and _fits(emitter, [*last, item]):
            last.append(item)
        else:
            groups.append([item])
    return groups


def _fits(emitter: Emitter, group: list[_Ready]) -> bool:
    first, marks = group[0], emitter.program.marks
    if any(
        item.plan.operator != first.plan.operator or item.operands != first.operands for item in group[1:]
    ):
        return False
    if any(item.plan.order != first.plan.order for item in group[1:]):
        return False
    if any(marks[item.plan.output] is not marks[first.plan.output] for item in group[1:]):
        return False
    start = max(emitter.position(item.input) for item in group)
    uses = [emitter.position(user) for item in group for user in item.plan.output.users]
    inputs, outputs = {item.plan.input for item in group}, {item.plan.output for item in group}
    return all(start < use for use in uses) and len(inputs) == len(group) and inputs.isdisjoint(outputs)


def _replace(program: Program, emitter: Emitter, group: list[_Ready], sites: list[Site]) -> None:
    """Call the operator and redirect the consumers; the program notes what was turned and what it stands for."""
    inputs = [
        program.replaced[item.input][0] if item.input in program.replaced else item.input for item in group
    ]
    tensors = [
        _cast(emitter, node, require_fake(item.plan.output).dtype)
        for node, item in zip(inputs, group, strict=True)
    ]
    place = emitter.last([*tensors, *group[0].operands, program.marks[group[0].plan.output]])
    call = emitter.call(
        place, torch.ops.grape.rotate.default, (tensors, list(group[0].operands), str(group[0].plan.operator))
    )
    for position, (item, site) in enumerate(zip(group, sites, strict=True)):
        output = item.plan.output
        value = emitter.call(call, operator.getitem, (call, position))
        program.rotated[value] = site
        value = _permuted(emitter, value, item.plan.inverse)
        value = _cast(emitter, value, require_fake(output).dtype)
        for name in ("stack_trace", "nn_module_stack"):
            if name in output.meta:
                call.meta[name] = value.meta[name] = output.meta[name]
        output.replace_all_uses_with(value)
        program.replaced[output] = (value, site)


def _cast(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    have = require_fake(node).dtype
    if have == dtype or (torch.promote_types(have, dtype) == have and op_name(node) != "getitem"):
        return node
    return emitter.call(node, torch.ops.aten.to.dtype, (node, dtype))


def remove_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase pure nodes nothing uses any more, starting at `nodes`; random and mutating nodes stay.

    What only says of which type a value is uses it no more than that.
    """
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node._erased or not (is_pure(node) or _asserts(node)) or not all(map(_asserts, node.users)):
            continue
        operands = node.all_input_nodes
        for user in list(node.users):
            graph.erase_node(user)
        graph.erase_node(node)
        stack.extend(operands)


def _asserts(node: fx.Node) -> bool:
    return op_name(node) == "aten::_assert_tensor_metadata"


__all__ = ["RewriteRotations", "mutation_between", "overwritten", "refusal", "remove_unused"]
