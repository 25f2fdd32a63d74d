"""Rotations of planes by one kernel: what it takes, and how a call becomes launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import starmap
from typing import Any, Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Accumulated, Learned, Positions, Rotation, Spectrum, Steps, Table, Tables
from grape_compile.kernels.frames import Axes, Frame, frame_of
from grape_compile.kernels.launch import Launch, is_traced, missing_triton
from grape_compile.kernels.layouts import Layout, layout_of, table, width
from grape_compile.operators.angles import accumulate, frequencies, phase_dtype, turning_gradient
from grape_compile.operators.planar import Planar
from grape_compile.operators.turn_call import TurnCall

#: Coordinates of a head that one program holds at most.
LARGEST_HEAD: Final = 512


@dataclass(frozen=True)
class Configuration:
    """`block` tokens and `group` heads of one program, run by `warps`."""

    block: int
    group: int
    warps: int

    def fitting(self, tokens: int, heads: int, lanes: int) -> Configuration:
        """Return the configuration for a call with few tokens or heads: no idle heads, and no warp without a lane."""
        block = min(self.block, width(tokens))
        warps = max(1, min(self.warps, block * lanes // 64))
        return Configuration(block, max(1, min(self.group, heads)), 1 << (warps.bit_length() - 1))


def default_configuration(lanes: int) -> Configuration:
    """Return what is launched without a tuning record: about 1024 planes a program, four heads for each angle."""
    return Configuration(max(1, 1024 // lanes), 4, 4)


def supports(call: TurnCall, outputs: Sequence[Tensor] | None = None) -> Literal[True] | str:
    """Rotations of planes of 16 and 32 bit tensors whose heads are contiguous.

    Outputs that share memory with tensors have to be those tensors, with every coordinate where it was.
    """
    if not isinstance(call.encoding, Rotation):
        return f"{type(call.encoding).__name__} is no rotation of planes"
    if absent := missing_triton():
        return absent
    if any(tensor.dtype == torch.float64 for tensor in call.tensors):
        return "float64 tensors turn in float64"
    if call.encoding.head_dim > LARGEST_HEAD:
        return f"heads of more than {LARGEST_HEAD} coordinates"
    if call.encoding.basis is None and any(tensor.stride(-1) != 1 for tensor in call.tensors):
        return "coordinates of a head that are not neighbours in memory"
    if outputs is not None and (refusal := _output_refusal(call, outputs)):
        return refusal
    for tensors in _pairs(call):
        frame = _frame(call, tensors)
        if isinstance(frame, str):
            return frame
        if call.norm is not None and (refusal := _norm_refusal(call, frame, tensors[0].dim())):
            return refusal
    return True


def _output_refusal(call: TurnCall, outputs: Sequence[Tensor]) -> str:
    if any(output.stride(-1) != 1 for output in outputs):
        return "outputs whose coordinates are not neighbours in memory"
    memory = {tensor.untyped_storage().data_ptr() for tensor in call.tensors}
    shared = [
        pair
        for pair in zip(call.tensors, outputs, strict=True)
        if pair[1].untyped_storage().data_ptr() in memory
    ]
    if not shared:
        return ""
    if not layout_of(_rotation(call)).stays:
        return "planes that move cannot turn in place"
    return (
        "" if all(starmap(_is_same, shared)) else "outputs that share memory with tensors but are not those"
    )


def _norm_refusal(call: TurnCall, frame: Frame, rank: int) -> str:
    assert call.norm is not None
    if _rotation(call).basis is not None:
        return "a basis between norm and rotation"
    if any(weight.stride(-1) != 1 for weight in call.norm.weights):
        return "weights that are not neighbours in memory"
    if call.norm.place == "across" and frame.head != rank - 3:
        return "heads that do not share their angles cannot be normalised together"
    return ""


def forward(call: TurnCall, outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return every tensor turned; in place only where coordinates stay where they are."""
    if outputs is None:
        outputs = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in call.tensors]
    for launch in launches(call, outputs):
        launch.run(traced=is_traced(call.tensors[0]))
    return list(outputs)


def gradients(
    call: TurnCall, cotangents: Sequence[Tensor], *, of_tensors: bool
) -> tuple[list[Tensor] | None, dict[str, Tensor]]:
    """Return the gradients of the tensors (where asked) and of the floating slots."""
    rotation, action = _rotation(call), Planar(_rotation(call))
    fused = of_tensors and rotation.basis is None
    # The kernel reads neighbours in memory; a cotangent of a sum is one number, repeated.
    cotangents = [each if each.stride(-1) == 1 else each.contiguous() for each in cotangents]
    results = [torch.empty_like(tensor) for tensor in call.tensors] if fused else None
    slots: dict[str, Tensor] = {}
    for places in _places(call):
        launch, sums = back_launch(call, places, cotangents, results)
        launch.run(traced=is_traced(call.tensors[0]))
        like = call.tensors[places[0]]
        _add(slots, turning_gradient(rotation, call.slots, like, sums))
    for tensor, cotangent in zip(call.tensors, cotangents, strict=True):
        _add(slots, action.basis_gradient(call.slots, tensor, cotangent))
    if of_tensors and not fused:
        results = action.pull_back(call.slots, cotangents)
    return results, slots


def back_launch(
    call: TurnCall, places: Sequence[int], cotangents: Sequence[Tensor], results: Sequence[Tensor] | None
) -> tuple[Launch, tuple[Tensor, ...]]:
    """Return the launch of the way back for the tensors at `places`, and what it writes for the angles.

    That is the gradient of orientation * n * theta, or those of cosine and sine of tables, [*shape[:-1], planes], the
    axis of heads summed.
    """
    from grape_compile.kernels.bodies import turn as body
    from grape_compile.kernels.bodies.turn_back import turn_back

    rotation, angles = _rotation(call), _angle_operands(call)
    action, layout, lanes = Planar(rotation), layout_of(rotation), width(rotation.planes.count)
    tensors = [call.tensors[place] for place in places]
    frame = _frame(call, tensors)
    assert isinstance(frame, Frame), "`supports` refuses other calls"
    sources = [action.in_basis(call.slots, tensor) for tensor in tensors]
    like = sources[0]
    outer, inner, _, tokens = frame.of(like).sizes
    chosen = default_configuration(lanes).fitting(tokens, 1, lanes)
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
            arguments |= _tensor_arguments(f"{name}{number}", operand, frame)
        arguments[f"HEADS_{number}"] = frame.of(sources[number]).sizes[2] if there else 0
    shape = [1 if at == frame.head else size for at, size in enumerate(like.shape[:-1])]
    written = 2 if angles.source == body.TABLES else 1
    flat = torch.empty(
        (written, outer, inner, tokens, layout.count), dtype=torch.float32, device=like.device
    ).unbind()
    by_cos, by_sin = (None, *flat)[-2:]
    arguments |= {"by_cos": by_cos, "by_sin": by_sin, "BLOCK": chosen.block}
    grid = -(-tokens // chosen.block) * outer * inner
    launch = Launch(turn_back, (grid,), arguments, {"num_warps": chosen.warps})
    order = [at for at in (frame.outer, frame.inner, frame.token) if at is not None]
    sums = tuple(_shaped(each, order, shape) for each in flat)
    return launch, sums


def _shaped(flat: Tensor, order: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return [outer, inner, tokens, planes] with these axes where the tensor has them; the others have size one."""
    sizes = [shape[at] for at in order]
    kept = flat.reshape(*sizes, flat.shape[-1])
    back = sorted(range(len(order)), key=lambda at: order[at])
    return kept.permute(*back, len(order)).reshape(*shape, flat.shape[-1])


def _add(total: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part


def launches(
    call: TurnCall, outputs: Sequence[Tensor], configuration: Configuration | None = None
) -> Iterator[Launch]:
    """Yield one launch for each two tensors of a call."""
    action = Planar(_rotation(call))
    angles = _angle_operands(call)
    for at in _places(call):
        tensors = [call.tensors[place] for place in at]
        frame = _frame(call, tensors)
        assert isinstance(frame, Frame), "`supports` refuses other calls"
        sources = [action.in_basis(call.slots, tensor) for tensor in tensors]
        weights = [] if call.norm is None else [call.norm.weights[place] for place in at]
        yield _launch(call, frame, sources, [outputs[place] for place in at], angles, weights, configuration)


def _launch(
    call: TurnCall,
    frame: Frame,
    sources: Sequence[Tensor],
    outputs: Sequence[Tensor],
    angles: _Angles,
    weights: Sequence[Tensor],
    configuration: Configuration | None,
) -> Launch:
    from grape_compile.kernels.bodies import turn as body

    rotation, norm = _rotation(call), call.norm
    layout, lanes = layout_of(rotation), width(rotation.planes.count)
    sizes = frame.of(sources[0]).sizes
    heads = [frame.of(source).sizes[2] for source in sources]
    chosen = (configuration or default_configuration(lanes)).fitting(sizes[3], max(heads), lanes)
    place = body.PLAIN if norm is None else getattr(body, norm.place.upper())
    # All heads of a token in one program: their mean is one number.
    group = max(heads) if norm is not None and norm.place == "across" else chosen.group
    in_place = norm is None and layout.stays and all(map(_is_same, sources, outputs))
    arguments = _shared_arguments(call, frame, layout, lanes, angles, outputs[0], in_place=in_place)
    for number in (0, 1):
        there = number < len(sources)
        source, output = (sources[number], outputs[number]) if there else (None, None)
        arguments |= _tensor_arguments(f"x{number}", source, frame) | _tensor_arguments(
            f"y{number}", output, frame
        )
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


def _shared_arguments(
    call: TurnCall, frame: Frame, layout: Layout, lanes: int, angles: _Angles, like: Tensor, *, in_place: bool
) -> dict[str, Any]:
    """Return what the kernels of both ways take alike: angles, planes and the rest, sizes."""
    rotation, device, rank = _rotation(call), like.device, like.dim() - 1
    sizes = frame.of(like).sizes
    arguments = angles.arguments(frame, rank) | {
        "axis": table(rotation.planes.axes(), device) if angles.axes > 1 else None,
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


def _is_same(source: Tensor, output: Tensor) -> bool:
    if source is output:
        return True
    if is_traced(source) or source.is_meta:
        return False
    same_memory = source.data_ptr() == output.data_ptr() and source.dtype == output.dtype
    return same_memory and source.shape == output.shape and source.stride() == output.stride()


def _tensor_arguments(name: str, tensor: Tensor | None, frame: Frame) -> dict[str, Any]:
    strides = (0, 0, 0, 0) if tensor is None else frame.of(tensor).strides
    walked = zip(("outer", "inner", "head", "token"), strides, strict=True)
    return {name: tensor} | {f"{name}_{axis}": stride for axis, stride in walked}


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
    clock, axes = rotation.clock, rotation.planes.axis_count
    if isinstance(clock, Tables):
        cos, sin = (_on(slots[name], like) for name in (clock.cos, clock.sin))
        return _Angles(int(body.TABLES), _with_axis(cos), _with_axis(sin), False, 1)
    assert rotation.spectrum is not None, "only tables have no spectrum"
    dtype = phase_dtype(clock, slots, like)
    theta = _with_axis(_theta(rotation.spectrum, rotation.planes.count, call, dtype))
    if isinstance(clock, Steps):
        return _Angles(int(body.STEPS), None, theta, True, 1)
    assert isinstance(clock, Positions | Accumulated)
    times = _on(slots[clock.slot], like)
    if isinstance(clock, Accumulated):
        times = accumulate(clock, times.to(dtype), like.shape[-2:-1])
    source = body.EXACT if dtype == torch.float64 else body.POSITIONS
    return _Angles(int(source), times, theta, True, axes)


def _theta(spectrum: Spectrum, count: int, call: TurnCall, dtype: torch.dtype) -> Tensor:
    like = call.tensors[0]
    if isinstance(spectrum, Learned | Table):
        return _on(call.slots[spectrum.slot], like)
    if is_traced(like):
        return frequencies(spectrum, count, call.slots, like, dtype)
    return _stored_theta(spectrum, count, like.device, dtype)


@lru_cache(maxsize=256)
def _stored_theta(spectrum: Spectrum, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(spectrum.frequencies(count), dtype=dtype, device=device)


def _on(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor on the device; only a number without axes may be elsewhere."""
    return tensor if tensor.device == like.device else tensor.to(like.device)


def _with_axis(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 0 else tensor


def _frame(call: TurnCall, tensors: Sequence[Tensor]) -> Frame | str:
    first = tensors[0]
    if isinstance(_rotation(call).clock, Steps):
        token: int | None = first.dim() - 2
    else:
        token = None
    return frame_of(tensors, _varying(call, first), token)


def _varying(call: TurnCall, tensor: Tensor) -> list[bool]:
    """Return along which leading axes angles differ, by shapes alone."""
    rotation, rank = _rotation(call), tensor.dim() - 1
    found = [False] * rank
    shapes: list[Sequence[int]] = []
    clock = rotation.clock
    if isinstance(clock, Steps):
        found[-1] = True
    elif isinstance(clock, Positions | Accumulated):
        shapes.append(call.slots[clock.slot].shape[rotation.planes.axis_count > 1 :])
    names = clock.slots if isinstance(clock, Tables) else rotation.spectrum.slots if rotation.spectrum else ()
    shapes += [call.slots[name].shape[:-1] for name in names]
    for shape in shapes:
        for at, size in enumerate(shape):
            found[rank - len(shape) + at] |= size != 1
    return found


def _places(call: TurnCall) -> list[tuple[int, ...]]:
    """Return the tensors that one launch takes: two neighbours where they agree but for their heads, else one."""
    found: list[tuple[int, ...]] = []
    at = 0
    while at < len(call.tensors):
        pair = call.tensors[at : at + 2]
        alike = len(pair) == 2 and pair[0].dim() == pair[1].dim() and not isinstance(_frame(call, pair), str)
        found.append((at, at + 1) if alike else (at,))
        at += len(found[-1])
    return found


def _pairs(call: TurnCall) -> Iterator[list[Tensor]]:
    for places in _places(call):
        yield [call.tensors[at] for at in places]


def _rotation(call: TurnCall) -> Rotation:
    assert isinstance(call.encoding, Rotation)
    return call.encoding
