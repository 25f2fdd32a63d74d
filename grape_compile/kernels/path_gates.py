"""What the kernels of path biases are held to on GPUs that need not be there: D = 128 in bfloat16, causal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch

from grape_compile.encoding import grape_ap, rope
from grape_compile.kernels.attention_space import call_of
from grape_compile.kernels.gates import KernelGate
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.path_configurations import BACKWARD, KERNELS, Kernel, configuration
from grape_compile.kernels.path_space import launch_of
from grape_compile.kernels.tunable import Shape
from grape_compile.operators.call import QueryTurn

_SHAPE: Final = Shape(4, 4096, 32, 8, 128)


def _launch(kernel: Kernel, normalised: str, *, turns: bool = False) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        encoding = grape_ap(_SHAPE.heads, normalised=normalised)
        call = call_of(_SHAPE, encoding, torch.device("meta"))
        if turns:
            table = torch.empty(1, 1, _SHAPE.tokens, _SHAPE.head_dim // 2, device="meta")
            call = replace(call, turn=QueryTurn(rope(_SHAPE.head_dim), table, table))
        tiles = {each: configuration(each, call, capability) for each in KERNELS}
        return launch_of(kernel, call, tiles)

    return build


GATES: Final = (
    KernelGate("path_forward_bounded", _launch("forward", "both"), matrix=True),
    KernelGate("path_forward_turned", _launch("forward", "keys", turns=True), matrix=True),
    *(
        KernelGate(f"path_{kernel}", _launch(kernel, "keys"), matrix=True)
        for kernel in ("forward", *BACKWARD)
    ),
)
