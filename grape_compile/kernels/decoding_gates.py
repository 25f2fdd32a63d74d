"""What the decoding kernels are held to on GPUs that need not be there: one query, 32768 keys, D = 64 and 128."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from grape_compile.kernels.attention_gates import ENCODINGS
from grape_compile.kernels.decoding import Decoding
from grape_compile.kernels.decoding_configurations import configuration
from grape_compile.kernels.decoding_space import call_of
from grape_compile.kernels.gates import KernelGate
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.tunable import Shape
from grape_compile.operators import chunked

_SHAPE: Final = Shape(4, 32768, 32, 8, 128)


def _launch(name: str, head_dim: int, *, merges: bool = False) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        call = call_of(replace(_SHAPE, head_dim=head_dim), ENCODINGS[name])
        decoding = Decoding(call, configuration(call, capability))
        return decoding.merge_launch(*chunked.empty_result(call)) if merges else decoding.split_launch()

    return build


GATES: Final = (
    *(
        KernelGate(
            f"decode_{name}_{head_dim}", _launch(name, head_dim), registers=168, wide=True, matrix=True
        )
        for name, head_dim in (*((name, 128) for name in ENCODINGS if name != "slopes"), ("alibi", 64))
    ),
    KernelGate("decode_merge_128", _launch("none", 128, merges=True), registers=64),
)
