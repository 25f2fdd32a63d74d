"""What the attention kernels are held to on GPUs that need not be there: D = 64 and 128 in bfloat16, causal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch

from grape_compile.encoding import Bias, Encoding, Learned, Steps, alibi, fox, gated_alibi, nope, rope
from grape_compile.kernels.attention_configurations import KERNELS, Kernel, configuration
from grape_compile.kernels.attention_space import call_of, launch_of
from grape_compile.kernels.gates import KernelGate
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.tunable import Shape
from grape_compile.operators.call import QueryTurn

_SHAPE: Final = Shape(4, 4096, 32, 8, 128)

ENCODINGS: Final[dict[str, Encoding]] = {
    "none": nope(),
    "alibi": alibi(_SHAPE.heads),
    "slopes": Bias(Learned("slopes"), Steps()),
    "fox": fox(),
    "gated": gated_alibi(_SHAPE.heads),
    "capped": alibi(_SHAPE.heads),
    "packed": alibi(_SHAPE.heads),
    "turned": alibi(_SHAPE.heads),
}


#: What makes no difference to the other kernels.
_ONLY_IN: Final[dict[str, tuple[Kernel, ...]]] = {"slopes": ("by_query",), "turned": ("forward",)}


def _options(name: str) -> dict[str, Any]:
    """Return what stands beside an encoding: a soft cap, or sinks and the segments of packed sequences."""
    if name == "packed":
        segments = torch.empty(_SHAPE.batch, _SHAPE.tokens, dtype=torch.int32, device="meta")
        return {"sinks": torch.empty(_SHAPE.heads, device="meta"), "segments": segments}
    return {"cap": 50.0} if name == "capped" else {}


def _launch(kernel: Kernel, name: str, head_dim: int) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        shape = replace(_SHAPE, head_dim=head_dim)
        call = call_of(shape, ENCODINGS[name], torch.device("meta"), **_options(name))
        if name == "turned":
            table = torch.empty(1, 1, shape.tokens, head_dim // 2, device="meta")
            call = replace(call, turn=QueryTurn(rope(head_dim), table, table))
        tiles = {each: configuration(each, call, capability) for each in KERNELS}
        return launch_of(kernel, call, tiles)

    return build


GATES: Final = tuple(
    KernelGate(
        f"attention_{kernel}_{name}_{head_dim}",
        _launch(kernel, name, head_dim),
        matrix=True,
        timed=name not in ("capped", "packed"),
    )
    for kernel in KERNELS
    for name, head_dim in (
        *((name, 128) for name in ENCODINGS if kernel in _ONLY_IN.get(name, KERNELS)),
        ("none", 64),
        ("gated", 64),
        ("capped", 64),
    )
)
