"""Attention in TensorIR, without a matrix of all queries and keys."""

from __future__ import annotations

from functools import partial

from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.attention_cpu import AttentionOnCpu, cpu_fits
from grape_compile.kernels.tensorir.engine import PrimFunc, Target, vector_lanes, vector_registers, writing
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
        AttentionOnCpu(call, chosen).write()
    return finished[0]


def attention_space(call: Attention, target: Target, *, name: str = "attend") -> Space:
    """Return the schedules of `attention` for one target."""
    lanes, registers = vector_lanes(target), vector_registers(target)
    choices = {
        "lanes": (lanes,),
        "vectors": (1, 2, 3, 4),
        "keys": (3, 4, 5, 6, 8, 12),
        "columns": (3, 4, 5, 6, 8, 12),
        "tiles": (4, 8, 12, 16, 24, 32),
    }
    fits = partial(cpu_fits, registers=registers)
    return Space(name, choices, hand(call, target), partial(attention, call, target, name=name), fits)


def hand(call: Attention, target: Target) -> Point:
    """Return the schedule where nothing has been measured: register tiles as large as the registers hold."""
    if vector_registers(target) >= 32:
        return {"lanes": vector_lanes(target), "vectors": 4, "keys": 6, "columns": 6, "tiles": 16}
    return {"lanes": vector_lanes(target), "vectors": 2, "keys": 6, "columns": 6, "tiles": 16}
