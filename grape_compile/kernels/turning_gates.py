"""What the rotation kernels keep to: their launches for one layer of Llama's shape, at the default configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import (
    Geometric,
    Half,
    Interleaved,
    Partial,
    Planes,
    Positions,
    Rank2,
    Rotation,
    Table,
    Tables,
)
from grape_compile.kernels import planar_launches, turning
from grape_compile.kernels.configuration import default_configuration
from grape_compile.kernels.gates import KernelGate
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.layouts import width
from grape_compile.operators.turn_call import Norm, TurnCall

BATCH: Final = 4
TOKENS: Final = 4096
HEADS: Final = (32, 8)
HEAD_DIM: Final = 128


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def call_of(planes: Planes, *, positions: torch.dtype | None = torch.int64) -> TurnCall:
    """Return queries and keys as projections leave them, [B, H, T, D] of memory [B, T, H, D]; None means tables."""
    tensors = tuple(meta(BATCH, TOKENS, heads, planes.head_dim).transpose(1, 2) for heads in HEADS)
    if positions is None:
        tables = {name: meta(BATCH, 1, TOKENS, planes.count, dtype=torch.float32) for name in ("cos", "sin")}
        return TurnCall(tensors, Rotation(planes, None, Tables()), tables)
    slots = {
        "positions": meta(BATCH, 1, TOKENS, dtype=positions),
        "inv_freq": meta(planes.count, dtype=torch.float32),
    }
    return TurnCall(tensors, Rotation(planes, Table("inv_freq"), Positions("positions")), slots)


def turn_launch(call: TurnCall) -> Launch:
    """Return the launch of a call."""
    (launch,) = turning.launches(call, [meta(*tensor.shape) for tensor in call.tensors])
    return launch


def _turn(planes: Planes, positions: torch.dtype | None = torch.int64) -> Callable[[int], Launch]:
    return lambda capability: turn_launch(call_of(planes, positions=positions))


def _normed(place: Literal["before", "after", "across"]) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        sizes = [heads * HEAD_DIM if place == "across" else HEAD_DIM for heads in HEADS]
        norm = Norm(tuple(meta(size) for size in sizes), 1e-6, place)
        return turn_launch(replace(call_of(Half(HEAD_DIM)), norm=norm))

    return build


def _back(planes: Planes, positions: torch.dtype | None = torch.int64) -> Callable[[int], Launch]:
    def build(capability: int) -> Launch:
        call = call_of(planes, positions=positions)
        cotangents = [meta(*tensor.shape) for tensor in call.tensors]
        results = [meta(*each.shape) for each in cotangents]
        chosen = default_configuration(width(planes.count), capability, "back")
        launch, _ = planar_launches.back_launch(call, (0, 1), cotangents, results, chosen)
        return launch

    return build


def _plane(capability: int) -> Launch:
    tensors = call_of(Half(HEAD_DIM)).tensors
    slots = {name: meta(HEAD_DIM, dtype=torch.float32) for name in ("a", "b")}
    slots["positions"] = meta(BATCH, 1, TOKENS, dtype=torch.int64)
    rank2 = Rank2(HEAD_DIM, Geometric(1.0), Positions("positions"))
    return turn_launch(TurnCall(tensors, rank2, slots))


#: Registers of a rotation: 48 leave ten blocks of 128 threads to a multiprocessor, enough loads in flight. They hold
#: eight planes a thread, and four on the way back with gradients of angles: 64 bits of a half in 16 bit numbers.
FEW: Final = 48

GATES: Final = (
    KernelGate("turn half", _turn(Half(HEAD_DIM)), registers=FEW, wide=True),
    KernelGate("turn interleaved", _turn(Interleaved(HEAD_DIM)), registers=FEW, wide=True),
    KernelGate("turn partial", _turn(Partial(Half(64), 0, HEAD_DIM)), registers=FEW, wide=True),
    KernelGate("turn exactly", _turn(Half(HEAD_DIM), torch.float64), registers=FEW, wide=True),
    KernelGate("turn by tables", _turn(Half(HEAD_DIM), None), registers=FEW, wide=True),
    KernelGate("turn normed before", _normed("before"), registers=FEW, wide=True),
    KernelGate("turn normed after", _normed("after"), registers=FEW, wide=True),
    KernelGate("turn normed across", _normed("across"), registers=FEW, wide=True),
    KernelGate("turn in a plane", _plane, registers=FEW, wide=True),
    KernelGate("turn back", _back(Half(HEAD_DIM)), registers=FEW),
    KernelGate("turn back interleaved", _back(Interleaved(HEAD_DIM)), registers=FEW, wide=True),
    KernelGate("turn back partial", _back(Partial(Half(64), 0, HEAD_DIM)), registers=FEW),
    KernelGate("turn back by tables", _back(Half(HEAD_DIM), None), registers=FEW),
)
