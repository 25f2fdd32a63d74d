"""Rotations in the plane of two vectors as launches of the kernel `plane`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Rank2
from grape_compile.kernels.calls import case_of, frame_of_call, places_of, tensor_arguments
from grape_compile.kernels.configuration import Configuration, configuration_for
from grape_compile.kernels.frames import Frame
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.layouts import width
from grape_compile.operators.rank2 import Plane
from grape_compile.operators.turn_call import TurnCall


def launches(
    call: TurnCall, outputs: Sequence[Tensor], configuration: Configuration | None = None
) -> Iterator[Launch]:
    """Yield one launch for each two tensors of a call; f1 and f2 of every token are taken before, in float64."""
    assert isinstance(call.encoding, Rank2)
    action = Plane(call.encoding)
    for places in places_of(call):
        tensors = [call.tensors[place] for place in places]
        frame = frame_of_call(call, tensors)
        assert isinstance(frame, Frame), "`supports` refuses other calls"
        update = action.prepare(call.slots, tensors[0])
        entries = torch.stack(update.entries)
        tokens, lanes = frame.of(tensors[0]).sizes[3], width(call.encoding.size)
        chosen = configuration or configuration_for(case_of(call, "plane", tokens), lanes, tensors[0].device)
        yield _launch(tensors, [outputs[place] for place in places], frame, update.frame, entries, chosen)


def _launch(
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    frame: Frame,
    vectors: Tensor,
    entries: Tensor,
    configuration: Configuration,
) -> Launch:
    from grape_compile.kernels.bodies.plane import plane

    size, rank = tensors[0].shape[-1], tensors[0].dim() - 1
    outer, inner, _, tokens = frame.of(tensors[0]).sizes
    heads = [frame.of(tensor).sizes[2] for tensor in tensors]
    lanes = width(size)
    chosen = configuration.fitting(tokens, max(heads), lanes)
    arguments: dict[str, Any] = {}
    for number in (0, 1):
        there = number < len(tensors)
        source, output = (tensors[number], outputs[number]) if there else (None, None)
        arguments |= tensor_arguments(f"x{number}", source, frame) | tensor_arguments(
            f"y{number}", output, frame
        )
        arguments[f"HEADS_{number}"] = heads[number] if there else 0
    # The rows of the vectors stand where tensors have tokens.
    by_place = frame.of_angles(vectors[..., :1, :], rank, 1).strides
    by_token = frame.of_angles(entries[0], rank, 1).strides
    arguments |= {
        "frame": vectors,
        "frame_outer": by_place[0],
        "frame_inner": by_place[1],
        "frame_row": vectors.stride(-2),
        "frame_column": vectors.stride(-1),
        "entries": entries,
        "entry": entries.stride(0),
        "entries_outer": by_token[0],
        "entries_inner": by_token[1],
        "entries_token": by_token[3],
        "tokens": tokens,
        "inners": inner,
        "BLOCK": chosen.block,
        "GROUP": chosen.group,
        "HEAD_DIM": size,
        "WIDTH": lanes,
    }
    grid = sum(-(-count // chosen.group) for count in heads) * -(-tokens // chosen.block) * outer * inner
    return Launch(plane, (grid,), arguments, {"num_warps": chosen.warps})
