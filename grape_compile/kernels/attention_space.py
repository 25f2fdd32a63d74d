"""What the attention kernels could be: tiles, warps and stages, forward and for both backward kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Encoding, Nope, PathBias
from grape_compile.kernels.attention import Found, forward_launch, supports
from grape_compile.kernels.attention_configurations import (
    KERNELS,
    Configuration,
    Kernel,
    case_of,
    configuration,
)
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.tunable import Case, Family, Shape
from grape_compile.operators import chunked
from grape_compile.operators.attention import attend_call
from grape_compile.operators.call import AttendCall
from grape_compile.operators.prepare import parts

#: Queries and keys of a tile, warps, and tiles fetched ahead.
QUERIES: Final = (32, 64, 128)
KEYS: Final = (32, 64, 128)
WARPS: Final = (4, 8)
STAGES: Final = (1, 2, 3, 4)


def cases(shape: Shape, encoding: Encoding) -> Sequence[Case]:
    """Return a case for each kernel, with the biases of an encoding or none; none for a rotation alone."""
    call = call_of(shape, encoding, torch.device("meta"))
    turns_only = not call.biases and not isinstance(encoding, Nope)
    return (
        ()
        if turns_only or supports(call) is not True
        else [_case(kernel, shape, encoding) for kernel in KERNELS]
    )


def space(kernel: Kernel) -> list[Configuration]:
    """Return the configurations of a kernel; the queries of a forward tile stay in registers, so they are many."""
    found = (Configuration(*numbers) for numbers in product(QUERIES, KEYS, WARPS, STAGES))
    wide = 64 if kernel == "forward" else 32
    return [each for each in found if each.query_block >= wide and each.query_block * each.key_block >= 2048]


def call_of(shape: Shape, encoding: Encoding, device: torch.device, **options: Any) -> AttendCall:
    """Return a causal backward call of this shape: what projections leave, slots filled with anything."""

    def heads(count: int) -> Tensor:
        made = torch.empty(shape.batch, shape.tokens, count, shape.head_dim, dtype=shape.dtype, device=device)
        return made.normal_().transpose(1, 2)

    biases = tuple(part for part in parts(encoding) if isinstance(part, Bias | PathBias))
    only = Compose(biases) if biases else Nope()
    sizes = {name: _sizes(part, name, shape) for part in biases for name in part.slots}
    slots = [-torch.rand(sizes[name], device=device) / 64 for name in only.slots]
    call = attend_call(
        heads(shape.heads),
        heads(shape.key_heads),
        heads(shape.key_heads),
        slots,
        str(only),
        is_causal=True,
        **options,
    )
    return replace(call, wants_bias_gradients=bool(slots))


def _sizes(part: Bias | PathBias, name: str, shape: Shape) -> tuple[int, ...]:
    if name in part.slopes.slots:
        return (shape.heads,)
    tokens = (shape.batch, shape.heads, shape.tokens)
    return (*tokens, part.dim) if isinstance(part, PathBias) else tokens


def launch_of(kernel: Kernel, call: AttendCall, tiles: Mapping[Kernel, Configuration]) -> Launch:
    """Return the launch of a kernel with these tiles."""
    output, logsumexp = chunked.empty_result(call)
    if kernel == "forward":
        return forward_launch(call, output, logsumexp, tiles["forward"])
    if call.query.device.type != "meta":
        forward_launch(call, output, logsumexp, tiles["forward"]).run()
    found = Found(call, torch.ones_like(output), output, logsumexp, tiles)
    if kernel == "by_query":
        return found.by_query_launch()
    if call.query.device.type != "meta":
        found.by_query_launch().run()
    return found.by_key_launch()


def _case(kernel: Kernel, shape: Shape, encoding: Encoding) -> Case:
    meta = call_of(shape, encoding, torch.device("meta"))

    def launch(chosen: Mapping[str, Any], device: torch.device) -> Launch:
        call = call_of(shape, encoding, device)
        capability = 90 if device.type == "meta" else None
        tiles = {each: configuration(each, call, capability) for each in KERNELS}
        return launch_of(kernel, call, {**tiles, kernel: Configuration(**chosen)})

    found = [asdict(each) for each in space(kernel)]
    return Case(
        case_of(kernel, meta),
        found,
        lambda capability: asdict(configuration(kernel, meta, capability)),
        launch,
    )


FAMILIES: Final = (Family("attention", cases),)
