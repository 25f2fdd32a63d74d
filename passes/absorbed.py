"""Take a rotation that feeds a path integral into it: the turning of its keys is part of the bias (GRAPE 5.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from grape_compile.encoding import Learned, Positions, Rotation, Steps, Table, parse
from grape_compile.passes.causal import counts_from_zero
from grape_compile.passes.clocks import counted_by
from grape_compile.passes.graph import Program, op_name, require_fake
from grape_compile.passes.operands import Operand
from grape_compile.passes.paths import PathPart
from grape_compile.passes.scores import KEY, Scores
from grape_compile.passes.site import Site
from grape_compile.passes.terms import Factor, broadcast


@dataclass(frozen=True)
class Turn:
    """A rotation by steps that was a site of its own: as called and as described, its slots, and what it turns."""

    value: fx.Node
    operator: Rotation
    described: Rotation
    slots: dict[str, fx.Node]
    key: Operand


def turn_of(program: Program, scores: Scores, part: PathPart) -> Turn | None:
    """The rotation of the keys of a path, where it counts their steps from zero; None leaves it where it is."""
    value = part.key.node
    site = program.rotated.get(value)
    call = value.args[0] if op_name(value) == "getitem" else None
    if not isinstance(site, Site) or not isinstance(call, fx.Node):
        return None
    tensors, slots, text = call.args
    rotation, described = parse(str(text)), site.encoding
    if not isinstance(rotation, Rotation) or not isinstance(described, Rotation):
        return None
    assert isinstance(slots, list | tuple)
    assert isinstance(tensors, list | tuple)
    given: dict[str, Any] = dict(zip(rotation.slots, slots, strict=True))
    if not isinstance(rotation.clock, Positions) or not isinstance(described.clock, Steps):
        return None
    if rotation.basis is not None or part.key.axes[-1].role != "plane" or rotation.head_dim != part.dim:
        return None
    positions = given.pop(rotation.clock.slot)
    if not _counts_keys(scores, part.key, positions):
        return None
    if (
        isinstance(rotation.spectrum, Learned | Table)
        and require_fake(given[rotation.spectrum.slot]).dim() != 1
    ):
        return None
    turned = tensors[int(value.args[1])]  # type: ignore[arg-type] # the index of a getitem
    if not isinstance(turned, fx.Node):
        return None
    return Turn(value, replace(rotation, clock=Steps()), described, given, replace(part.key, node=turned))


def _counts_keys(scores: Scores, key: Operand, positions: fx.Node) -> bool:
    """Positions 0, 1, 2, ... along the keys and along nothing else."""
    lead = scores.places()
    index = broadcast(scores.along(key, lead)[:-1], scores.sizes.shape(positions))
    view = scores.view(Factor(positions, index), lead)
    if view is None or view.token_axes != (KEY,) or not counts_from_zero(positions):
        return False
    (axis,) = (axis for axis in view.axes if axis.role == KEY)
    return (axis.offset, axis.stride) == (0, 1) and counted_by(positions) == 1
