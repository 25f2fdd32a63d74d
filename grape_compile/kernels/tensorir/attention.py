"""Attention in TensorIR, without a matrix of all queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.attention_cpu import AttentionOnCpu, cpu_fits
from grape_compile.kernels.tensorir.attention_gpu import SPLITS, AttentionOnGpu, gpu_fits, splits_of
from grape_compile.kernels.tensorir.engine import (
    PrimFunc,
    Target,
    is_gpu,
    shared_memory,
    vector_lanes,
    vector_registers,
    writing,
)
from grape_compile.kernels.tensorir.space import Point, Space


def attention(
    call: Attention, target: Target, point: Point | None = None, *, name: str = "attend"
) -> PrimFunc:
    """Return the function (query, key, value, mask, sinks, slots, output) of softmax(q k^T scale + bias) v.

    Softmax is merged from block to block, in float32; the memory beside the operands is O(T). Sizes that are names may
    differ from call to call.
    """
    chosen = hand(call, target) if point is None else point
    with writing(name) as finished:
        if is_gpu(target):
            AttentionOnGpu(call, chosen).write()
        else:
            AttentionOnCpu(call, chosen).write()
    return finished[0]


def attention_space(call: Attention, target: Target, *, name: str = "attend") -> Space:
    """Return the schedules of `attention` for one target."""
    write = partial(attention, call, target, name=name)
    if is_gpu(target):
        choices = {
            "rows": (32, 64, 128, 256),
            "block": (16, 32, 64),
            "tile": (4, 8),
            "cores": (0, 1),
            "splits": SPLITS,
        }
        return Space(name, choices, hand(call, target), write, _gpu_fits(call, target))
    choices = {
        "lanes": (vector_lanes(target),),
        "vectors": (1, 2, 3, 4),
        "keys": (3, 4, 5, 6, 8, 12),
        "columns": (3, 4, 5, 6, 8, 12),
        "tiles": (4, 8, 12, 16, 24, 32),
    }
    return Space(name, choices, hand(call, target), write, partial(cpu_fits, vector_registers(target)))


def hand(call: Attention, target: Target) -> Point:
    """Return the schedule where nothing has been measured: tiles as large as registers or shared memory hold."""
    if is_gpu(target):
        fits = _gpu_fits(call, target)
        shapes = ((128, 8), (128, 4), (64, 8), (64, 4), (32, 4))
        tried = [
            {"rows": rows, "block": 32, "tile": tile, "cores": cores, "splits": splits_of(call, rows)}
            for cores in (1, 0)
            for rows, tile in shapes
        ]
        last = {"rows": 32, "block": 16, "tile": 4, "cores": 0, "splits": splits_of(call, 32)}
        return next((point for point in tried if fits(point)), last)
    vectors = 4 if vector_registers(target) >= 32 else 2
    return {"lanes": vector_lanes(target), "vectors": vectors, "keys": 6, "columns": 6, "tiles": 16}


def _gpu_fits(call: Attention, target: Target) -> Callable[[Point], bool]:
    return partial(gpu_fits, call, str(target.attrs.get("arch", "")), shared_memory(target))
