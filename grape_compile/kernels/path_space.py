"""What the kernels of path biases could be: tiles, warps, stages, and who shares a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, Final

import torch

from grape_compile.encoding import Encoding
from grape_compile.kernels.attention_space import call_of
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.path import Found, Heads, forward_launch, supports
from grape_compile.kernels.path_configurations import (
    BACKWARD,
    KERNELS,
    Kernel,
    Tiles,
    case_of,
    configuration,
)
from grape_compile.kernels.tunable import Case, Family, Shape
from grape_compile.operators import chunked
from grape_compile.operators.call import AttendCall

#: Queries and keys of a tile, warps, tiles fetched ahead, and who shares a row (`path_configurations.Tiles`).
QUERIES: Final = (32, 64, 128)
KEYS: Final = (32, 64)
WARPS: Final = (4, 8)
STAGES: Final = (1, 2, 3)
SHARED: Final = ((4, 1), (1, 2))


def cases(shape: Shape, encoding: Encoding) -> Sequence[Case]:
    """Return a case for each kernel, for an encoding with one path bias and no other."""
    call = call_of(shape, encoding, torch.device("meta"))
    return [_case(kernel, shape, encoding) for kernel in KERNELS] if supports(call) is True else ()


def space() -> list[Tiles]:
    """Return the tiles that a kernel could have."""
    found = product(QUERIES, KEYS, WARPS, STAGES, SHARED)
    return [
        Tiles(queries, keys, warps, stages, lanes, split)
        for queries, keys, warps, stages, (lanes, split) in found
        if queries >= 16 * warps or queries == min(QUERIES)
    ]


def launch_of(kernel: Kernel, call: AttendCall, tiles: Mapping[Kernel, Tiles]) -> Launch:
    """Return the launch of a kernel with these tiles, after those it needs have run."""
    output, logsumexp = chunked.empty_result(call)
    forward = forward_launch(call, output, logsumexp, tiles["forward"])
    if kernel == "forward":
        return forward
    runs = call.query.device.type != "meta"
    if runs:
        forward.run()
    heads = Heads(Found(call, torch.ones_like(output), output, logsumexp, tiles), 0)
    for before in BACKWARD[: BACKWARD.index(kernel)]:
        if runs:
            heads.launch(before).run()
    return heads.launch(kernel)


def _case(kernel: Kernel, shape: Shape, encoding: Encoding) -> Case:
    meta = call_of(shape, encoding, torch.device("meta"))

    def launch(chosen: Mapping[str, Any], device: torch.device) -> Launch:
        call = call_of(shape, encoding, device)
        capability = 90 if device.type == "meta" else None
        tiles = {each: configuration(each, call, capability) for each in KERNELS}
        return launch_of(kernel, call, {**tiles, kernel: Tiles(**chosen)})

    return Case(
        case_of(kernel, meta),
        [asdict(each) for each in space()],
        lambda capability: asdict(configuration(kernel, meta, capability)),
        launch,
    )


FAMILIES: Final = (Family("path", cases),)
