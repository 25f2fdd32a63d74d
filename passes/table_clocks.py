"""Read positions and frequencies back from tables of cosines and sines that a model keeps.

What: tables whose rows are angles n theta of whole numbers n >= 0 below the length of what the model keeps.
How: a plane that turns less than once over all rows tells the number of the row; frequencies have a formula.
Leaves alone: tables made of inputs, or kept with too few bits to tell rows apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from grape_compile.encoding import describe_frequencies
from grape_compile.passes.graph import ANGLES, Program, Role, Unreadable, op_name, require_fake
from grape_compile.passes.operands import Emitter
from grape_compile.passes.replay import Replay

aten = torch.ops.aten
_TOLERANCE = 1e-6
"""Of a cosine in float32 whose angle is a product in float32, for each radian of the angle."""


def table_frequencies(program: Program, replay: Replay, cos: fx.Node, sin: fx.Node) -> Tensor:
    """The frequencies of tables [tokens, planes], proved on the rows of the example; Unreadable where none are."""
    tables = [replay.tensor(node).squeeze() for node in (cos, sin)]
    if tables[0].dim() != 2 or tables[0].shape[0] < 2:
        raise Unreadable("its tables of cosines and sines do not have one row for each token of the example")
    angles = torch.atan2(tables[1], tables[0])
    planes = angles.shape[1]
    steps = torch.remainder(angles[1] - angles[0], 2 * math.pi)
    spectrum = describe_frequencies(steps.tolist(), planes, 1e-3)
    if spectrum is None:
        raise Unreadable("the frequencies of its tables of cosines and sines follow no formula that is known")
    theta = torch.tensor(spectrum.frequencies(planes), dtype=torch.float64)
    plane = _telling_plane(theta.tolist(), row_count(program, cos), torch.float32)
    first = torch.remainder(angles[0, plane] + theta[plane] / 2, 2 * math.pi).div(theta[plane]).floor()
    expected = torch.outer(first + torch.arange(len(angles), dtype=torch.float64), theta)
    length = torch.hypot(*tables)
    for table, function in zip(tables, (torch.cos, torch.sin), strict=True):
        error = (table - length * function(expected)).abs()
        if bool((error > _TOLERANCE * expected.clamp(min=1.0)).any()):
            raise Unreadable(f"its tables of cosines and sines are not those of {spectrum}")
    return theta


def emit_positions(emitter: Emitter, cos: fx.Node, sin: fx.Node, theta: Sequence[float]) -> fx.Node:
    """The position of every token as a node, [.., T], read off one plane; Unreadable where no plane tells it."""
    plane = _telling_plane(theta, row_count(emitter.program, cos), require_fake(cos).dtype)
    parts = [emitter.call(table, aten.select.int, (table, -1, plane)) for table in (sin, cos)]
    angle = emitter.call(emitter.last(parts), aten.atan2.default, tuple(parts))
    # Half a step is added, so that rounding never leads to the row before.
    angle = emitter.call(angle, aten.add.Tensor, (angle, theta[plane] / 2))
    angle = emitter.call(angle, aten.remainder.Scalar, (angle, 2 * math.pi))
    angle = emitter.call(angle, aten.div.Tensor, (angle, theta[plane]))
    return emitter.call(angle, aten.floor.default, (angle,))


def row_count(program: Program, node: fx.Node) -> int:
    """How many rows the tables have that the model keeps; Unreadable where they are made of something else."""
    stack, seen, rows = [node], {node}, 0
    while stack:
        each = stack.pop()
        role, value = program.roles.get(each), each.meta.get("val")
        if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and not value.is_floating_point()):
            continue
        if role is Role.INPUT or op_name(each) in ANGLES:
            raise Unreadable(
                "its tables of cosines and sines are not kept by the model: their length is not known"
            )
        if role is not None and isinstance(value, Tensor):
            rows += max(map(int, value.shape), default=0)
        stack += [operand for operand in each.all_input_nodes if operand not in seen]
        seen.update(each.all_input_nodes)
    if not rows:
        raise Unreadable(
            "its tables of cosines and sines are made anew in every call, so their length is not known"
        )
    return rows


def _telling_plane(theta: Sequence[float], rows: int, dtype: torch.dtype) -> int:
    """The fastest plane that turns less than once in all rows, and by more than rounding from row to row."""
    telling = [plane for plane, each in enumerate(theta) if each * (rows + 1) < 2 * math.pi]
    best = max(telling, key=lambda plane: theta[plane], default=None)
    if best is None or theta[best] < 128 * torch.finfo(dtype).eps:
        raise Unreadable(f"no plane of its tables of cosines and sines tells {rows} positions apart")
    return best
