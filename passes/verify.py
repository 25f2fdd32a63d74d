"""Verify a plan before it is carried out: the original region in fp64 against the operator's reference in fp64."""

from __future__ import annotations

import torch
from torch import fx

from grape_compile.operators import reference_rotate
from grape_compile.passes.graph import ANGLES, Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import MOVEMENTS
from grape_compile.passes.plans import RotationPlan
from grape_compile.passes.replay import Replay, has_value

PHASES = MOVEMENTS | {
    "aten::cumsum", "aten::mul", "aten::div", "aten::neg", "aten::add", "aten::sub", "aten::einsum", "aten::outer",
    "aten::matmul", "aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::type_as", "aten::detach",
    "aten::pad", "aten::constant_pad_nd",
}  # fmt: skip
"""What an angle is read through: an activation before anything else may hold any number."""

TOLERANCE = 1e-9
"""Largest difference to the fp64 replay, relative to its largest value. Both sides use the model's own stored tables,
so what is left is fp64 rounding (1e-15 times the length of the longest sum)."""


def verify_rotation(plan: RotationPlan, operands: tuple[fx.Node, ...], replay: Replay) -> float:
    """Largest absolute difference between the region and the operator on random input; Unreadable if either fails."""
    shape = replay.sizes.shape(plan.input)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(shape, dtype=torch.float64, generator=generator)
    phases = {
        node: _any_numbers(node, replay, generator)
        for node in (*_phases(plan, replay.program), *_unknown(operands, replay.program))
    }
    if phases:
        replay = Replay(replay.program, replay.sizes, phases)
    original = replay.branch({plan.input: query, **phases}).tensor(plan.output)
    slots = dict(zip(plan.operator.slots, (replay.tensor(node) for node in operands), strict=True))
    (rewritten,) = reference_rotate([query.permute(plan.order)], plan.operator, slots)
    return difference(original, rewritten.permute(plan.inverse))


def _any_numbers(node: fx.Node, replay: Replay, generator: torch.Generator) -> torch.Tensor:
    """Random numbers for a value; for one of integers those of its places, which rows may be looked up by."""
    shape = replay.sizes.shape(node)
    if require_fake(node).is_floating_point():
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def _phases(plan: RotationPlan, program: Program) -> list[fx.Node]:
    """The activations the angle is made of, before it was summed, scaled or moved about: two may be one moved twice."""
    nodes = [operand.node for operand in plan.operands]
    found = [node for node in nodes if program.taints[node] is Taint.DATA and op_name(node) not in PHASES]
    seen, stack = set(nodes), [node for node in nodes if node not in found]
    while stack:
        node = stack.pop()
        inside = program.taints[node] is Taint.DATA or op_name(node) in ANGLES
        for operand in node.all_input_nodes:
            if operand in seen or (program.taints[operand] is Taint.DATA and not inside):
                continue
            seen.add(operand)
            if program.taints[operand] is not Taint.DATA or op_name(operand) in PHASES:
                stack.append(operand)
            else:
                found.append(operand)
    return list(dict.fromkeys(found))


def _unknown(operands: tuple[fx.Node, ...], program: Program) -> list[fx.Node]:
    """Frequencies, tables and positions that have no values here: what is verified is what is done with them."""
    seen, stack = set(operands), list(operands)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return [node for node in program.graph.nodes if node in seen and _has_no_value(node, program)]


def _has_no_value(node: fx.Node, program: Program) -> bool:
    value = fake(node)
    return (
        node.op in ("placeholder", "get_attr")
        and value is not None
        and not value.is_complex()
        and value.dtype is not torch.bool
        and not has_value(program, node)
    )


TABLE_TOLERANCE = 3e-6
"""The same where the operator recomputes a table the model stores in fp32 (24 bits, a few roundings)."""


def difference(original: torch.Tensor, rewritten: torch.Tensor, table: bool = False) -> float:
    """Largest absolute difference; Unreadable when the shapes differ or it exceeds the tolerance."""
    if original.shape != rewritten.shape:
        raise Unreadable(
            f"the operator gives shape {tuple(rewritten.shape)} where the model has {tuple(original.shape)}"
        )
    error = float((original - rewritten).abs().max()) if original.numel() else 0.0
    if not error <= (TABLE_TOLERANCE if table else TOLERANCE) * max(
        1.0, float(original.abs().max()) if original.numel() else 1.0
    ):
        raise Unreadable(f"the operator differs from the model's own code by {error:.3g} in fp64")
    return error
