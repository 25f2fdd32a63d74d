"""Rotations of coordinate planes as launches of the kernels `turn` and `turn_back`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Accumulated, Learned, Positions, Rotation, Spectrum, Steps, Table, Tables
from grape_compile.kernels.calls import case_of, frame_of_call, is_same, places_of, tensor_arguments
from grape_compile.kernels.configuration import Configuration, configuration_for
from grape_compile.kernels.frames import Axes, Frame
from grape_compile.kernels.launch import Launch, is_traced
from grape_compile.kernels.layouts import Layout, layout_of, table, width
from grape_compile.operators.angles import accumulate, frequencies, phase_dtype
from grape_compile.operators.planar import Planar
from grape_compile.operators.turn_call import TurnCall


def launches(
    call: TurnCall, outputs: Sequence[Tensor], configuration: Configuration | None = None
) -> Iterator[Launch]:
    """Yield one launch for each two tensors of a call."""
    action = Planar(_rotation(call))
    angles = _angle_operands(call)
    for at in places_of(call):
        tensors = [call.tensors[place] for place in at]
        frame = frame_of_call(call, tensors)
        assert isinstance(frame, Frame), "`supports` refuses other calls"
        sources = [action.in_basis(call.slots, tensor) for tensor in tensors]
        weights = [] if call.norm is None else [call.norm.weights[place] for place in at]
        targets = [outputs[place] for place in at]
        yield _launch(call, at, frame, sources, targets, angles, weights, configuration)


def back_launch(
    call: TurnCall,
    places: Sequence[int],
    cotangents: Sequence[Tensor],
    results: Sequence[Tensor] | None,
    configuration: Configuration | None = None,
) -> tuple[Launch, tuple[Tensor, ...]]:
    """Return the launch of the way back for the tensors at `places`, and what it writes for the angles.

    That is the gradient of orientation * n * theta, or those of cosine and sine of tables, [*shape[:-1], planes], the
    axis of heads summed.
    """
    from grape_compile.kernels.bodies import turn as body
    from grape_compile.kernels.bodies.turn_back import turn_back

    rotation, angles = _rotation(call), _angle_operands(call)
    action, layout = Planar(rotation), layout_of(rotation)
    lanes = width(layout.count)
    tensors = [call.tensors[place] for place in places]
    frame = frame_of_call(call, tensors)
    assert isinstance(frame, Frame), "`supports` refuses other calls"
    sources = [action.in_basis(call.slots, tensor) for tensor in tensors]
    like = sources[0]
    outer, inner, _, tokens = frame.of(like).sizes
    if configuration is None:
        configuration = configuration_for(case_of(call, "back", tokens), lanes, like.device)
    chosen = configuration.fitting(tokens, 1, lanes)
    arguments = _shared_arguments(call, frame, layout, lanes, angles, like, in_place=False)
    for number in (0, 1):
        there = number < len(places)
        operands: dict[str, Tensor | None] = {"x": None, "g": None, "d": None}
        if there:
            operands = {
                "x": sources[number],
                "g": cotangents[places[number]],
                "d": None if results is None else results[places[number]],
            }
        for name, operand in operands.items():
            arguments |= tensor_arguments(f"{name}{number}", operand, frame)
        arguments[f"HEADS_{number}"] = frame.of(sources[number]).sizes[2] if there else 0
    shape = [1 if at == frame.head else size for at, size in enumerate(like.shape[:-1])]
    written = 2 if angles.source == body.TABLES else 1
    flat = [
        torch.empty((outer, inner, tokens, layout.count), dtype=torch.float32, device=like.device)
        for _ in range(written)
    ]
    by_cos, by_sin = (None, *flat)[-2:]
    arguments |= {"by_cos": by_cos, "by_sin": by_sin, "BLOCK": chosen.block}
    grid = -(-tokens // chosen.block) * outer * inner
    launch = Launch(turn_back, (grid,), arguments, {"num_warps": chosen.warps})
    order = [at for at in (frame.outer, frame.inner, frame.token) if at is not None]
    sums = tuple(_shaped(each, order, shape) for each in flat)
    return launch, sums


def _launch(
    call: TurnCall,
    at: Sequence[int],
    frame: Frame,
    sources: Sequence[Tensor],
    outputs: Sequence[Tensor],
    angles: _Angles,
    weights: Sequence[Tensor],
    configuration: Configuration | None,
) -> Launch:
    from grape_compile.kernels.bodies import turn as body

    rotation, norm = _rotation(call), call.norm
    layout = layout_of(rotation)
    lanes = width(layout.count)
    sizes = frame.of(sources[0]).sizes
    heads = [frame.of(source).sizes[2] for source in sources]
    if configuration is None:
        configuration = configuration_for(case_of(call, "turn", sizes[3]), lanes, outputs[0].device)
    chosen = configuration.fitting(sizes[3], max(heads), lanes)
    place = body.PLAIN if norm is None else getattr(body, norm.place.upper())
    # All heads of a token in one program: their mean is one number.
    group = max(heads) if norm is not None and norm.place == "across" else chosen.group
    in_place = norm is None and layout.stays and all(map(is_same, sources, outputs))
    arguments = _shared_arguments(call, frame, layout, lanes, angles, outputs[0], in_place=in_place)
    for number in (0, 1):
        there = number < len(sources)
        source, output = (sources[number], outputs[number]) if there else (None, None)
        arguments |= tensor_arguments(f"x{number}", source, frame) | tensor_arguments(
            f"y{number}", output, frame
        )
        arguments |= _place_arguments(
            f"places{number}", call.place(at[number]) if there else None, output, frame
        )
        if arguments[f"places{number}_token"]:
            # The place of a token takes the part of its number.
            arguments[f"y{number}_token"] = 0
        arguments[f"weight{number}"] = weights[number] if weights and there else None
        arguments[f"weight{number}_head"] = rotation.head_dim if place == body.ACROSS else 0
        arguments[f"HEADS_{number}"] = heads[number] if there else 0
    arguments |= {
        "epsilon": 0.0 if norm is None else float(norm.epsilon),
        "offset": 0.0 if norm is None else float(norm.offset),
        "BLOCK": chosen.block,
        "GROUP": group,
        "HEAD_DIM": rotation.head_dim,
        "NORM": int(place),
    }
    groups = sum(-(-count // group) for count in heads)
    grid = groups * -(-sizes[3] // chosen.block) * sizes[0] * sizes[1]
    return Launch(body.turn, (grid,), arguments, {"num_warps": chosen.warps})


def _place_arguments(name: str, place: Tensor | None, output: Tensor | None, frame: Frame) -> dict[str, Any]:
    """Return the rows that tokens are written to, and their stride; one token may be walked as another axis."""
    if place is None or output is None:
        return {name: None, f"{name}_token": 0, f"{name}_row": 0, f"{name}_rows": 0}
    each = frame.token == output.dim() - 2
    return {
        name: place,
        f"{name}_token": place.stride(0) if each else 0,
        f"{name}_row": output.stride(-2),
        f"{name}_rows": output.shape[-2],
    }


def _shared_arguments(
    call: TurnCall, frame: Frame, layout: Layout, lanes: int, angles: _Angles, like: Tensor, *, in_place: bool
) -> dict[str, Any]:
    """Return what the kernels of both ways take alike: angles, planes and the rest, sizes."""
    rotation, device, rank = _rotation(call), like.device, like.dim() - 1
    sizes = frame.of(like).sizes
    arguments = angles.arguments(frame, rank) | {
        "axis": table(layout.axes, device) if angles.axes > 1 else None,
        "in_table": table(layout.source_table, device),
        "out_table": table(layout.target_table, device),
        "rest_in": table(layout.rest_source, device),
        "rest_out": table(layout.rest_target, device),
        "tokens": sizes[3],
        "inners": sizes[1],
        "cos_factor": float(rotation.scale),
        "sin_factor": float(rotation.scale * rotation.orientation),
        "COUNT": layout.count,
        "WIDTH": lanes,
        "TABLED": bool(layout.rest_source),
        "SOURCE": angles.source,
        "BY_TOKEN": angles.by_token(frame, rank),
    }
    for name, runs in (("IN", layout.source), ("OUT", layout.target)):
        arguments |= {
            f"{name}_START": runs.start, f"{name}_RUN": runs.run, f"{name}_STEP": runs.step, f"{name}_APART": runs.apart
        }  # fmt: skip
    for number, piece in enumerate(layout.pieces):
        arguments |= {
            f"REST_{number}": 0 if in_place else piece.count,
            f"REST_{number}_WIDTH": piece.width,
            f"REST_{number}_IN": piece.source,
            f"REST_{number}_OUT": piece.target,
        }
    return arguments


@dataclass(frozen=True)
class _Angles:
    """What a kernel makes angles of: positions and frequencies, or cosines and sines; None for steps.

    Positions of several axes have them in front.
    """

    source: int
    first: Tensor | None
    second: Tensor
    positions: bool
    axes: int

    def arguments(self, frame: Frame, rank: int) -> dict[str, Any]:
        """Return pointers and strides."""
        found: dict[str, Any] = {"a": self.first, "b": self.second}
        strides = {"a": (0, 0, 0, 0), "b": self._of_second(frame, rank).strides}
        planes = {"a": 0, "b": self.second.stride(-1) if self.second.shape[-1] != 1 else 0}
        if self.first is not None:
            strides["a"] = self._of_first(frame, rank).strides
            if self.positions:
                planes["a"] = self.first.stride(0) if self.axes > 1 else 0
            else:
                planes["a"] = self.first.stride(-1) if self.first.shape[-1] != 1 else 0
        for name, (outer, inner, _, token) in strides.items():
            found |= {f"{name}_outer": outer, f"{name}_inner": inner, f"{name}_token": token}
            found[f"{name}_plane"] = planes[name]
        return found

    def by_token(self, frame: Frame, rank: int) -> bool:
        """Whether each token has frequencies of its own."""
        return self.positions and self._of_second(frame, rank).strides[3] != 0

    def _of_first(self, frame: Frame, rank: int) -> Axes:
        assert self.first is not None
        if not self.positions:
            return frame.of_angles(self.first, rank, 1)
        return frame.of_angles(self.first[0] if self.axes > 1 else self.first, rank, 0)

    def _of_second(self, frame: Frame, rank: int) -> Axes:
        return frame.of_angles(self.second, rank, 1)


def _angle_operands(call: TurnCall) -> _Angles:
    """Return the operands of the angles; sums over tokens are taken here, in float64."""
    from grape_compile.kernels.bodies import turn as body

    rotation, slots, like = _rotation(call), call.slots, call.tensors[0]
    layout, clock = layout_of(rotation), rotation.clock
    axes = max(layout.axes, default=0) + 1
    if isinstance(clock, Tables):
        cos, sin = (_on(slots[name], like) for name in (clock.cos, clock.sin))
        return _Angles(int(body.TABLES), _with_axis(cos), _with_axis(sin), False, 1)
    dtype = phase_dtype(clock, slots, like)
    theta = theta_of(rotation, slots, like, dtype)
    if isinstance(clock, Steps):
        return _Angles(int(body.STEPS), None, theta, True, 1)
    assert isinstance(clock, Positions | Accumulated)
    times = _on(slots[clock.slot], like)
    if isinstance(clock, Accumulated):
        times = accumulate(clock, times.to(dtype), like.shape[-2:-1])
    source = body.EXACT if dtype == torch.float64 else body.POSITIONS
    return _Angles(int(source), times, theta, True, axes)


def theta_of(rotation: Rotation, slots: Mapping[str, Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the frequencies of a rotation, [..., planes]; those in closed form are kept for the next call."""
    spectrum, count = rotation.spectrum, rotation.planes.count
    assert spectrum is not None, "only tables have no spectrum"
    if isinstance(spectrum, Learned | Table):
        return _with_axis(_on(slots[spectrum.slot], like))
    if is_traced(like):
        return frequencies(spectrum, count, slots, like, dtype)
    return _stored_theta(spectrum, count, like.device, dtype)


@lru_cache(maxsize=256)
def _stored_theta(spectrum: Spectrum, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(spectrum.frequencies(count), dtype=dtype, device=device)


def _on(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor on the device; only a number without axes may be elsewhere."""
    return tensor if tensor.device == like.device else tensor.to(like.device)


def _with_axis(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 0 else tensor


def _shaped(flat: Tensor, order: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return [outer, inner, tokens, planes] with these axes where the tensor has them; the others have size one."""
    sizes = [shape[at] for at in order]
    kept = flat.reshape(*sizes, flat.shape[-1])
    back = sorted(range(len(order)), key=lambda at: order[at])
    return kept.permute(*back, len(order)).reshape(*shape, flat.shape[-1])


def _rotation(call: TurnCall) -> Rotation:
    assert isinstance(call.encoding, Rotation)
    return call.encoding
