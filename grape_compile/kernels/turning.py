"""The provider of `grape::rotate` on GPUs: what it takes, and which kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Rank2, Rotation
from grape_compile.kernels import planar_launches, plane_launches
from grape_compile.kernels.calls import frame_of_call, is_same, places_of
from grape_compile.kernels.configuration import Configuration
from grape_compile.kernels.frames import Frame
from grape_compile.kernels.launch import Launch, is_compiled, is_interpreted, is_traced, missing_triton
from grape_compile.kernels.layouts import layout_of
from grape_compile.operators import plain_turn
from grape_compile.operators.angles import turning_gradient
from grape_compile.operators.planar import Planar
from grape_compile.operators.turn_call import TurnCall

#: Coordinates of a head that one program holds at most.
LARGEST_HEAD: Final = 512


def supports(call: TurnCall, outputs: Sequence[Tensor] | None = None) -> Literal[True] | str:
    """Rotations of planes, of coordinates or of two vectors, of 16 and 32 bit tensors whose heads are contiguous.

    Outputs that share memory with tensors have to be those tensors, with every coordinate where it was.
    """
    if not isinstance(call.encoding, Rotation | Rank2):
        return f"{type(call.encoding).__name__} mixes more than planes"
    if absent := missing_triton():
        return absent
    if is_compiled(call.tensors[0]) and is_interpreted():
        return "an interpreted kernel is no part of a graph"
    if any(tensor.dtype == torch.float64 for tensor in call.tensors):
        return "float64 tensors turn in float64"
    if call.encoding.head_dim > LARGEST_HEAD:
        return f"heads of more than {LARGEST_HEAD} coordinates"
    basis = isinstance(call.encoding, Rotation) and call.encoding.basis is not None
    if not basis and any(tensor.stride(-1) != 1 for tensor in call.tensors):
        return "coordinates of a head that are not neighbours in memory"
    if outputs is not None and (refusal := _output_refusal(call, outputs)):
        return refusal
    for places in places_of(call):
        tensors = [call.tensors[place] for place in places]
        frame = frame_of_call(call, tensors)
        if isinstance(frame, str):
            return frame
        if any(call.place(place) is not None for place in places) and (
            refusal := _place_refusal(call, frame)
        ):
            return refusal
        if call.norm is not None and (refusal := _norm_refusal(call, frame, tensors[0].dim())):
            return refusal
    return True


def _memory(tensor: Tensor) -> int:
    """Return what tells one piece of memory from another, also of tensors that only stand for some."""
    storage = tensor.untyped_storage()
    return storage._cdata if is_traced(tensor) else storage.data_ptr()


def _output_refusal(call: TurnCall, outputs: Sequence[Tensor]) -> str:
    if any(output.stride(-1) != 1 for output in outputs):
        return "outputs whose coordinates are not neighbours in memory"
    memory = set(map(_memory, call.tensors))
    shared = [pair for pair in zip(call.tensors, outputs, strict=True) if _memory(pair[1]) in memory]
    if not shared:
        return ""
    if isinstance(call.encoding, Rotation) and not layout_of(call.encoding).stays:
        return "planes that move cannot turn in place"
    return "" if all(starmap(is_same, shared)) else "outputs that share memory with tensors but are not those"


def _place_refusal(call: TurnCall, frame: Frame) -> str:
    if not isinstance(call.encoding, Rotation):
        return "rows of a cache beside a rotation in the plane of two vectors"
    like = call.tensors[0]
    if frame.token != like.dim() - 2 and like.shape[-2] != 1:
        return "rows of a cache along another axis than tokens"
    return ""


def _norm_refusal(call: TurnCall, frame: Frame, rank: int) -> str:
    assert call.norm is not None
    if not isinstance(call.encoding, Rotation):
        return "a norm beside a rotation in the plane of two vectors"
    if call.encoding.basis is not None:
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


def launches(
    call: TurnCall, outputs: Sequence[Tensor], configuration: Configuration | None = None
) -> Iterator[Launch]:
    """Return one launch for each two tensors of a call."""
    if isinstance(call.encoding, Rank2):
        return plane_launches.launches(call, outputs, configuration)
    return planar_launches.launches(call, outputs, configuration)


def gradients(
    call: TurnCall, cotangents: Sequence[Tensor], *, of_tensors: bool
) -> tuple[list[Tensor] | None, dict[str, Tensor]]:
    """Return the gradients of the tensors (where asked) and of the floating slots."""
    rotation = call.encoding
    if not isinstance(rotation, Rotation):
        # The vectors' gradients come from the definition; the tensors turn back by the kernel.
        return plain_turn.gradients(call, cotangents, of_tensors=of_tensors)
    action, fused = Planar(rotation), of_tensors and rotation.basis is None
    # The kernel reads neighbours in memory; a cotangent of a sum is one number, repeated.
    cotangents = [each if each.stride(-1) == 1 else each.contiguous() for each in cotangents]
    results = [torch.empty_like(tensor) for tensor in call.tensors] if fused else None
    slots: dict[str, Tensor] = {}
    for places in places_of(call):
        launch, sums = planar_launches.back_launch(call, places, cotangents, results)
        launch.run(traced=is_traced(call.tensors[0]))
        like = call.tensors[places[0]]
        _add(slots, turning_gradient(rotation, call.slots, like, sums))
    for tensor, cotangent in zip(call.tensors, cotangents, strict=True):
        _add(slots, action.basis_gradient(call.slots, tensor, cotangent))
    if of_tensors and not fused:
        results = action.pull_back(call.slots, cotangents)
    return results, slots


def _add(total: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part
