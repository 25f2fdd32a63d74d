"""Compiles every case of the tests of attention kernels for one GPU and prints what each needs, a line of JSON each.

A process of its own: what the interpreter takes, the compiler may refuse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from attention_cases import CASES, Case, beside, mask_of, slots_of

from grape_compile.kernels.ahead import usage
from grape_compile.kernels.attention_configurations import KERNELS, configuration
from grape_compile.kernels.attention_space import launch_of
from grape_compile.operators.attention import attend_call

CAPABILITY = 90
#: Sizes that the compiler knows as constants, heads that are no power of two, the largest.
SIZES = {
    "one_query": replace(CASES["fox"], queries=1),
    "one_key": replace(CASES["alibi"], queries=1, keys=1, key_heads=1),
    "window_of_one": replace(CASES["slopes_window"], options={"is_causal": True, "window": 1}),
    "bfloat16": replace(CASES["gated"], dtype=torch.bfloat16, head=96, values=80),
    "largest": replace(CASES["gated"], dtype=torch.bfloat16, head=256, values=256),
}


def compiled(case: Case) -> Iterator[tuple[str, int]]:
    """Yield the name and stack of each kernel of a case."""

    def heads(count: int, tokens: int, size: int) -> torch.Tensor:
        return torch.empty(case.batch, count, tokens, size, dtype=case.dtype, device="meta")

    slots, mask = slots_of(case), mask_of(case)
    extra: dict[str, Any] = {name: part.to("meta") for name, part in beside(case).items()}
    call = attend_call(
        heads(2, case.queries, case.head),
        heads(case.key_heads, case.keys, case.head),
        heads(case.key_heads, case.keys, case.values),
        [slots[name].to("meta") for name in case.encoding.slots],
        str(case.encoding),
        None if mask is None else mask.to("meta"),
        bool(case.options.get("is_causal", False)),
        case.options.get("scale"),
        case.options.get("window"),
        case.options.get("cap"),
        **extra,
    )
    call = replace(call, wants_bias_gradients=bool(slots))
    tiles = {kernel: configuration(kernel, call, CAPABILITY) for kernel in KERNELS}
    for kernel in KERNELS:
        yield kernel, usage(launch_of(kernel, call, tiles), CAPABILITY).stack


if __name__ == "__main__":
    for name, case in {**CASES, **SIZES}.items():
        if len(sys.argv) < 2 or name in sys.argv[1:]:
            print(json.dumps({name: dict(compiled(case))}), flush=True)
