"""What the decoding kernel could be: tiles of keys, parts of all keys, warps and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Encoding, Nope, PathBias
from grape_compile.kernels.decoding import Decoding, supports
from grape_compile.kernels.decoding_configurations import MOST_SPLITS, Configuration, case_of, configuration
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.tunable import Case, Family, Shape
from grape_compile.operators.attention import attend_call
from grape_compile.operators.call import AttendCall
from grape_compile.operators.prepare import parts

KEYS: Final = (32, 64, 128)
SPLITS: Final = (1, 2, 4, 8, 16, 32, 64, MOST_SPLITS)
WARPS: Final = (2, 4, 8)
STAGES: Final = (1, 2, 3, 4)


def cases(shape: Shape, encoding: Encoding) -> Sequence[Case]:
    """Return one query over the tokens of a shape, with the biases of an encoding; none for a rotation alone.

    The walk over the keys is timed; weighing its parts costs little beside it.
    """
    call = call_of(shape, encoding)
    turns_only = not call.biases and not isinstance(encoding, Nope)
    return () if turns_only or supports(call) is not True else [_case(shape, encoding, call)]


def space(call: AttendCall) -> list[Configuration]:
    """Return the configurations whose programs have a tile each."""
    keys = call.key.shape[2]
    found = (Configuration(*numbers) for numbers in product(KEYS, SPLITS, WARPS, STAGES))
    return [each for each in found if (each.splits - 1) * each.key_block < keys]


def call_of(shape: Shape, encoding: Encoding, device: torch.device | str = "meta") -> AttendCall:
    """Return a call of one query in the batch over keys of this shape, [B, H, T, D] in memory, slots of anything."""

    def heads(count: int, tokens: int) -> Tensor:
        return torch.empty(
            shape.batch, count, tokens, shape.head_dim, dtype=shape.dtype, device=device
        ).normal_()

    biases = tuple(part for part in parts(encoding) if isinstance(part, Bias | PathBias))
    only = Compose(biases) if biases else Nope()
    slots = [
        -torch.rand(_sizes(part, name, shape), device=device) / 64 for part in biases for name in part.slots
    ]
    keys = heads(shape.key_heads, shape.tokens), heads(shape.key_heads, shape.tokens)
    return attend_call(heads(shape.heads, 1), *keys, slots, str(only), None, True, None, None)


def _sizes(part: Bias | PathBias, name: str, shape: Shape) -> tuple[int, ...]:
    if name in part.slopes.slots:
        return (shape.heads,)
    of_query = part.query if isinstance(part, PathBias) else None if part.gate is None else part.gate.query
    tokens = (shape.batch, shape.heads, 1 if name == of_query else shape.tokens)
    return (*tokens, part.dim) if isinstance(part, PathBias) else tokens


def _case(shape: Shape, encoding: Encoding, meta: AttendCall) -> Case:
    def launch(chosen: Mapping[str, Any], device: torch.device) -> Launch:
        return Decoding(call_of(shape, encoding, device), Configuration(**chosen)).split_launch()

    return Case(
        case_of(meta),
        [asdict(each) for each in space(meta)],
        lambda capability: asdict(configuration(meta, capability)),
        launch,
    )


FAMILIES: Final = (Family("decoding", cases),)
