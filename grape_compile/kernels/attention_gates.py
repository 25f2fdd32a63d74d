"""What the attention kernels are held to on GPUs that need not be there: D = 64 and 128 in bfloat16, causal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Encoding, Learned, Steps, alibi, fox, gated_alibi, nope
from grape_compile.kernels.attention import Found, forward_launch
from grape_compile.kernels.gates import KernelGate
from grape_compile.kernels.launch import Launch
from grape_compile.operators import chunked
from grape_compile.operators.attention import attend_call
from grape_compile.operators.call import AttendCall

_BATCH, _HEADS, _KEY_HEADS, _LENGTH = 4, 32, 8, 4096

ENCODINGS: Final[dict[str, Encoding]] = {
    "none": nope(),
    "alibi": alibi(_HEADS),
    "slopes": Bias(Learned("slopes"), Steps()),
    "fox": fox(),
    "gated": gated_alibi(_HEADS),
}


def call_of(name: str, head_dim: int) -> AttendCall:
    """Return a backward call with one of the encodings, on the `meta` device."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    encoding = ENCODINGS[name]
    shapes = {"slopes": (_HEADS,)}
    per_token = (_BATCH, _HEADS, _LENGTH)
    slots = [empty(*shapes.get(slot, per_token), dtype=torch.float32) for slot in encoding.slots]
    query = empty(_BATCH, _HEADS, _LENGTH, head_dim)
    key, value = (empty(_BATCH, _KEY_HEADS, _LENGTH, head_dim) for _ in range(2))
    call = attend_call(query, key, value, slots, str(encoding), None, True, None, None)
    return replace(call, wants_bias_gradients=bool(slots))


def _launch(kernel: str, name: str, head_dim: int) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        call = call_of(name, head_dim)
        output, logsumexp = chunked.empty_result(call)
        if kernel == "forward":
            return forward_launch(call, output, logsumexp, capability)
        found = Found(call, torch.empty_like(output), output, logsumexp, capability)
        return found.by_query_launch() if kernel == "by_query" else found.by_key_launch()

    return build


GATES: Final = tuple(
    KernelGate(f"attention_{kernel}_{name}_{head_dim}", _launch(kernel, name, head_dim), matrix=True)
    for kernel in ("forward", "by_query", "by_key")
    for name, head_dim in (
        *((name, 128) for name in ENCODINGS if name != "slopes" or kernel == "by_query"),
        ("none", 64),
        ("gated", 64),
    )
)
