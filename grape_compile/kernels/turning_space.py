"""What the rotation kernels could be: tokens, heads and warps of a program, for the ways forth and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Learned,
    Multiplicative,
    Positions,
    Rank2,
    Rotation,
    Table,
    Tables,
)
from grape_compile.kernels import planar_launches, turning
from grape_compile.kernels.calls import case_of, frame_of_call
from grape_compile.kernels.configuration import Configuration, default_configuration
from grape_compile.kernels.frames import Frame
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.layouts import width
from grape_compile.kernels.tunable import Case, Family, Shape
from grape_compile.operators.turn_call import TurnCall

#: Planes of a program, heads that share its angles, and warps.
PLANES: Final = (512, 1024, 2048, 4096)
GROUPS: Final = (1, 2, 4, 8)
WARPS: Final = (1, 2, 4, 8)


def cases(shape: Shape, encoding: Multiplicative) -> Sequence[Case]:
    """Return the cases of queries and keys turned forth, and of planes turned back with gradients of the angles."""
    if not isinstance(encoding, Rotation | Rank2):
        return ()
    kind, planar = ("turn", True) if isinstance(encoding, Rotation) else ("plane", False)
    lanes = width(encoding.planes.count if isinstance(encoding, Rotation) else encoding.size)
    call = call_of(shape, encoding, torch.device("meta"))
    found = [_case(kind, call, shape, encoding, lanes)]
    return [*found, _case("back", call, shape, encoding, lanes)] if planar else found


def space(lanes: int, tokens: int, heads: int, *, grouped: bool) -> list[Configuration]:
    """Return the configurations that differ for a call: each fits it, and a thread has 4 to 32 planes."""
    found = {
        Configuration(max(1, planes // lanes), group, warps).fitting(tokens, heads, lanes)
        for planes in PLANES
        for group in (GROUPS if grouped else (1,))
        for warps in WARPS
        if 4 <= planes // (32 * warps) <= 32
    }
    return sorted(found, key=lambda each: (each.block, each.group, each.warps))


def call_of(shape: Shape, encoding: Multiplicative, device: torch.device) -> TurnCall:
    """Return a call of this shape: what projections leave, one position for each token, slots filled with anything."""

    def heads(count: int) -> Tensor:
        made = torch.empty(shape.batch, shape.tokens, count, shape.head_dim, dtype=shape.dtype, device=device)
        return made.normal_().transpose(1, 2)

    return TurnCall((heads(shape.heads), heads(shape.key_heads)), encoding, _slots(shape, encoding, device))


def _slots(shape: Shape, encoding: Multiplicative, device: torch.device) -> dict[str, Tensor]:
    slots: dict[str, Tensor] = {}
    count = encoding.planes.count if isinstance(encoding, Rotation) else 1
    clock = encoding.clock
    if isinstance(clock, Tables):
        slots |= {name: torch.ones(1, 1, shape.tokens, count, device=device) for name in clock.slots}
    elif isinstance(clock, Positions | Accumulated):
        axes = encoding.planes.axis_count if isinstance(encoding, Rotation) else 1
        lead = (axes,) if axes > 1 else ()
        kind = torch.int64 if isinstance(clock, Positions) else torch.float32
        slots[clock.slot] = torch.ones(*lead, shape.batch, 1, shape.tokens, dtype=kind, device=device)
    spectrum = encoding.spectrum if isinstance(encoding, Rotation | Rank2) else None
    if isinstance(spectrum, Learned | Table):
        slots[spectrum.slot] = torch.ones(count, device=device)
    for name in encoding.slots:
        slots.setdefault(name, torch.ones(encoding.head_dim, device=device))
    return slots


def _case(kind: str, call: TurnCall, shape: Shape, encoding: Multiplicative, lanes: int) -> Case:
    def launch(configuration: Mapping[str, Any], device: torch.device) -> Launch:
        chosen, real = Configuration(**configuration), call_of(shape, encoding, device)
        outputs = [torch.empty_like(tensor) for tensor in real.tensors]
        if kind == "back":
            return planar_launches.back_launch(real, (0, 1), real.tensors, outputs, chosen)[0]
        return next(iter(turning.launches(real, outputs, chosen)))

    frame = frame_of_call(call, call.tensors)
    assert isinstance(frame, Frame), "queries and keys of a layer differ in their heads alone"
    # Of one token a row, the rows are what is walked.
    tokens = frame.of(call.tensors[0]).sizes[3]
    found = space(lanes, tokens, max(shape.heads, shape.key_heads), grouped=kind != "back")
    default = partial(default_configuration, lanes, kind=kind)
    name = case_of(call, kind, tokens)
    return Case(
        name, [asdict(each) for each in found], lambda capability: asdict(default(capability)), launch
    )


FAMILIES: Final = (Family("rotation", cases),)
