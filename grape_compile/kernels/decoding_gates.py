"""What the decoding kernels are held to on GPUs that need not be there: one query, 32768 keys, D = 64 and 128."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch

from grape_compile.encoding import Compose, Encoding, grape_ap, rope
from grape_compile.kernels.attention_gates import ENCODINGS
from grape_compile.kernels.decoding import Decoding
from grape_compile.kernels.decoding_configurations import configuration
from grape_compile.kernels.decoding_space import call_of
from grape_compile.kernels.decoding_step import step_arguments
from grape_compile.kernels.gates import KernelGate
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.tunable import Shape
from grape_compile.operators import chunked
from grape_compile.operators.decode_call import DecodeCall

_SHAPE: Final = Shape(4, 32768, 32, 8, 128)
_ENCODINGS: Final[dict[str, Encoding]] = {**ENCODINGS, "path": grape_ap(_SHAPE.heads)}


def _launch(name: str, head_dim: int, *, merges: bool = False) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        call = call_of(replace(_SHAPE, head_dim=head_dim), _ENCODINGS[name])
        decoding = Decoding(call, configuration(call, capability))
        return decoding.merge_launch(*chunked.empty_result(call)) if merges else decoding.split_launch()

    return build


def _step(capability: int) -> Launch:
    """Return the launch of a step that turns by rope and appends, under ALiBi."""
    encoding, shape = Compose((rope(_SHAPE.head_dim), ENCODINGS["alibi"])), _SHAPE
    call = call_of(shape, ENCODINGS["alibi"])
    new = torch.empty(shape.batch, 1, shape.key_heads, shape.head_dim, dtype=shape.dtype, device="meta")
    heads = call.query, new.transpose(1, 2), new.transpose(1, 2), call.key, call.value
    lengths = torch.empty(shape.batch, dtype=torch.int64, device="meta")
    step = step_arguments(DecodeCall(*heads, lengths, encoding, {}, call.scale, None))
    return Decoding(call, configuration(call, capability), step).split_launch()


GATES: Final = (
    # One part in all turns and appends, and holds what that takes: two programs share a multiprocessor, with two tiles
    # of keys and values each on their way.
    KernelGate("decode_step_128", _step, wide=True, matrix=True),
    # So do two that also sum edges.
    KernelGate("decode_path_128", _launch("path", 128), wide=True, matrix=True),
    *(
        KernelGate(
            f"decode_{name}_{head_dim}", _launch(name, head_dim), registers=168, wide=True, matrix=True
        )
        for name, head_dim in (
            *((name, 128) for name in ("none", "alibi", "fox", "gated")),
            ("alibi", 64),
        )
    ),
    KernelGate("decode_merge_128", _launch("none", 128, merges=True), registers=64),
)
