"""Lower rotations for a device whose body reads tables: cos and sin are computed once and shared by all layers.

What: every `grape::rotate` whose angles are positions times frequencies gets their cos and sin as operands instead.
Leaves alone: rotations given as tables already, several axes, closed-form spectra, positions in float64; devices
    whose kernel makes the angles itself.
Ensures: the same numbers; the operator's own body computes the same product in the same precision.
Cost: one pass; equal angles are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from grape_compile.encoding import Learned, Positions, Rotation, Table, Tables, parse
from grape_compile.operators.providers import computes_angles
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, require_fake
from grape_compile.passes.operands import Emitter
from grape_compile.passes.sizes import Sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class ShareAngles(Pass):
    """Rotations by positions and frequencies become rotations by shared tables."""

    def run(self, program: Program) -> Outcome:
        emitter = Emitter(program, Sizes())
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.grape.rotate.default):
            _share(emitter, node)
        return Outcome()


def _share(emitter: Emitter, node: fx.Node) -> None:
    tensors, slots, text = node.args
    encoding = parse(str(text))
    if (
        not isinstance(encoding, Rotation)
        or not isinstance(encoding.clock, Positions)
        or encoding.basis is not None
    ):
        return
    if not isinstance(encoding.spectrum, Table | Learned) or encoding.planes.axis_count > 1:
        return
    assert isinstance(slots, list | tuple)
    assert isinstance(tensors, list | tuple)
    operands = dict(zip(encoding.slots, slots, strict=True))
    positions, frequencies = operands[encoding.clock.slot], operands[encoding.spectrum.slot]
    # Positions in double precision are sums over tokens: the operator keeps them so until cosine and sine.
    if computes_angles(require_fake(positions).device) or require_fake(positions).dtype == torch.float64:
        return
    dtype = torch.float32
    for tensor in (*tensors, frequencies):
        dtype = torch.promote_types(dtype, require_fake(tensor).dtype)
    clock = emitter.call(positions, aten.unsqueeze.default, (_as(emitter, positions, dtype), -1))
    angle = emitter.call(clock, aten.mul.Tensor, (clock, _as(emitter, frequencies, dtype)))
    tables = [emitter.call(angle, function, (angle,)) for function in (aten.cos.default, aten.sin.default)]
    node.args = (tensors, tables, str(replace(encoding, spectrum=None, clock=Tables())))


def _as(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if require_fake(node).dtype == dtype else emitter.call(node, aten.to.dtype, (node, dtype))
