"""A provider of `grape::attend` for GPUs: attention with additive biases, forward and backward, in Triton.

No bias matrix is in memory, and no two programs add to one number: the same call has the same result every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Half
from grape_compile.kernels.attention_configurations import Configuration, Kernel, configuration
from grape_compile.kernels.attention_reach import Reach, leaves_out
from grape_compile.kernels.attention_terms import (
    HALVES,
    NEIGHBOURS,
    SightKind,
    Terms,
    unfit,
)
from grape_compile.kernels.launch import Launch, missing_triton
from grape_compile.kernels.pointers import BYTES, NONE, NUMBERS, broadcast, in_line, padded, strides
from grape_compile.operators import chunked
from grape_compile.operators.call import AttendCall, Gradients

#: Coordinates of the largest head: its tiles of queries, keys and values fit into shared memory.
MAX_HEAD: Final = 256


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls in 16 or 32 bits whose biases are two terms."""
    if absent := missing_triton():
        return absent
    if call.query.dtype == torch.float64:
        return "float64 has no matrix instruction here"
    if call.wants_mask_gradient:
        return "the gradient of a mask needs every logit's gradient"
    sizes = call.query.shape[3], call.value.shape[3]
    if max(sizes) > MAX_HEAD:
        return f"heads of {max(sizes)} coordinates, more than {MAX_HEAD}"
    if 0 in call.query.shape or 0 in call.value.shape or 0 in call.key.shape:
        return "needs at least one element"
    if not call.scale > 0:
        return f"a scale of {call.scale}, not positive"
    return unfit(call) or True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    forward_launch(call, output, logsumexp).run()
    return output, logsumexp


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output, from its output and logsumexp."""

    def found(logsumexp: Tensor) -> Gradients:
        pass_back = Found(call, gradient, output, logsumexp)
        pass_back.by_query_launch().run()
        pass_back.by_key_launch().run()
        return pass_back.gradients()

    return chunked.without_faint_rows(call, gradient, output, logsumexp, found)


class Operands:
    """The arguments that the three kernels share."""

    def __init__(self, call: AttendCall) -> None:
        self.call = call
        self.query, self.key, self.value = map(in_line, (call.query, call.key, call.value))
        self.terms = Terms(call)
        # Kernels are handed some tensor where they read none.
        self.nothing = self.query

    def arguments(self, tiles: Configuration) -> dict[str, Any]:
        """Return operands, sizes and constants for tiles of a size."""
        call, terms = self.call, self.terms
        columns, mask = terms.columns(tiles.key_block), self._mask()
        return {
            "QUERY": self.query,
            "KEY": self.key,
            "VALUE": self.value,
            "SLOPES": terms.slopes if call.biases else self.nothing,
            "COLUMNS": self.nothing if columns is None else columns,
            "GATES": self.nothing if terms.gates is None else terms.gates,
            "MASK": self.nothing if mask is None else mask,
            **broadcast("mask", mask, ("batch", "head", "query", "key")),
            **strides("query", self.query),
            **strides("key", self.key),
            **strides("value", self.value),
            **broadcast("columns", columns, ("batch", "head", "row")),
            **broadcast("gates", terms.gates, ("batch", "head")),
            "SEGMENTS": self.nothing if call.segments is None else call.segments,
            **broadcast("segments", call.segments, ("batch",)),
            "queries": call.query.shape[2],
            "keys": call.key.shape[2],
            "window": call.window or 0,
            "scale": call.scale,
            "cap": call.cap or 1.0,
            "GROUPS": call.groups,
            "HEAD": call.query.shape[3],
            "HEAD_BLOCK": padded(call.query.shape[3]),
            "VALUES": call.value.shape[3],
            "VALUE_BLOCK": padded(call.value.shape[3]),
            "QUERY_BLOCK": tiles.query_block,
            "KEY_BLOCK": tiles.key_block,
            "BIAS": terms.kind,
            "SIGHT": self._sight(),
            "CAPPED": call.cap is not None,
            "SPANNED": leaves_out(call),
            "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
        }

    def by_query(self, tiles: Configuration) -> dict[str, Any]:
        """Return the arguments of the kernels whose programs have a tile of queries each."""
        sinks = self.call.sinks
        return {
            **self.arguments(tiles),
            "SPANS": self._reach(tiles).keys() if leaves_out(self.call) else self.nothing,
            "SINKS": self.nothing if sinks is None else sinks,
            "SINK": sinks is not None,
            **broadcast("sinks", sinks, ("batch", "head")),
            "heads": self.call.query.shape[1],
        }

    def by_key(self, tiles: Configuration) -> dict[str, Any]:
        """Return the arguments of the kernel whose programs have a tile of keys each."""
        return {
            **self.arguments(tiles),
            "SPANS": self._reach(tiles).queries() if leaves_out(self.call) else self.nothing,
            "key_heads": self.call.key.shape[1],
        }

    def _reach(self, tiles: Configuration) -> Reach:
        return Reach(self.call, self.terms, tiles.query_block, tiles.key_block)

    def _mask(self) -> Tensor | None:
        """Return the mask as a kernel reads it."""
        mask = self.call.mask
        return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask

    def _sight(self) -> SightKind:
        call, masked = self.call, NONE
        if call.mask is not None:
            masked = BYTES if call.mask.dtype == torch.bool else NUMBERS
        return SightKind(call.is_causal, call.window is not None, masked, call.segments is not None)


def forward_launch(
    call: AttendCall, output: Tensor, logsumexp: Tensor, tiles: Configuration | None = None
) -> Launch:
    """Return the launch of the forward kernel."""
    from grape_compile.kernels.bodies.attention_forward import attention_forward

    operands, tiles = Operands(call), tiles or configuration("forward", call)
    batch, heads, queries, _ = call.query.shape
    arguments = {
        **operands.by_query(tiles),
        **{"OUTPUT": output, "LOGSUMEXP": logsumexp},
        **strides("output", output),
        **turn_arguments(call, operands.nothing),
    }
    grid = (-(-queries // tiles.query_block) * batch * heads,)
    return Launch(attention_forward, grid, arguments, tiles.options)


def turn_arguments(call: AttendCall, nothing: Tensor) -> dict[str, Any]:
    """Return how a forward kernel turns its queries."""
    turn = call.turn
    cos, sin = (nothing, nothing) if turn is None else (turn.cos.contiguous(), turn.sin.contiguous())
    kind = NONE if turn is None else HALVES if isinstance(turn.rotation.planes, Half) else NEIGHBOURS
    strides = broadcast("turn", None if turn is None else cos, ("batch", "head", "token"))
    return {"COS": cos, "SIN": sin, "TURNED": kind, **strides}


class Found:
    """The backward pass of one call: what its kernels write, and what is made of it."""

    def __init__(
        self,
        call: AttendCall,
        gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        tiles: Mapping[Kernel, Configuration] | None = None,
    ) -> None:
        self.call, self.operands = call, Operands(call)
        self.gradient, self.output, self.logsumexp = in_line(gradient), in_line(output), logsumexp
        batch, heads, queries, _ = call.query.shape
        terms, wanted = self.operands.terms, call.wants_bias_gradients
        self.rows = (terms.wants_apart, terms.wants_query, terms.wants_clock) if wanted else (False,) * 3
        self.columns = (terms.wants_level, terms.wants_key, terms.wants_clock) if wanted else (False,) * 3
        given = tiles or {}
        self.by_query = given.get("by_query") or configuration("by_query", call)
        self.by_key = given.get("by_key") or configuration("by_key", call)
        self.levels = _levels(logsumexp, self.by_query.query_block, self.by_key.query_block)
        self.query, self.key, self.value = map(
            torch.empty_like, (self.operands.query, self.operands.key, self.operands.value)
        )
        self.by_row = logsumexp.new_empty((batch, heads, 3, queries) if any(self.rows) else (0,))
        self.by_column = logsumexp.new_empty(
            (batch, heads, 3, call.key.shape[2]) if any(self.columns) else (0,)
        )

    def by_query_launch(self) -> Launch:
        """Return the launch for the gradients of queries; it comes first."""
        from grape_compile.kernels.bodies.attention_by_query import attention_by_query

        tiles = self.by_query
        batch, heads, queries, _ = self.call.query.shape
        arguments = {
            **self.operands.by_query(tiles),
            **{"OUTPUT": self.output, "GRADIENT": self.gradient, "LOGSUMEXP": self.logsumexp},
            **{
                "LEVELS": self.levels,
                "levels_row": self.levels.shape[3],
                "BY_QUERY": self.query,
                "ROWS": self.by_row,
            },
            "LEVEL_BLOCK": self.by_key.query_block,
            **strides("output", self.output),
            **strides("gradient", self.gradient),
            **strides("by_query", self.query),
            "WANTS_DELTA": any(self.columns),
            **dict(zip(("WANTS_APART", "WANTS_SPREAD", "WANTS_CLOCK"), self.rows, strict=True)),
        }
        grid = (-(-queries // tiles.query_block) * batch * heads,)
        return Launch(attention_by_query, grid, arguments, tiles.options)

    def by_key_launch(self) -> Launch:
        """Return the launch for the gradients of keys and values."""
        from grape_compile.kernels.bodies.attention_by_key import attention_by_key

        tiles = self.by_key
        batch, heads, keys, _ = self.call.key.shape
        arguments = {
            **self.operands.by_key(tiles),
            **{"GRADIENT": self.gradient, "LEVELS": self.levels, "levels_row": self.levels.shape[3]},
            **{"BY_KEY": self.key, "BY_VALUE": self.value, "SUMS": self.by_column},
            **strides("gradient", self.gradient),
            **strides("by_key", self.key),
            **strides("by_value", self.value),
            **dict(zip(("WANTS_SUM", "WANTS_SPREAD", "WANTS_CLOCK"), self.columns, strict=True)),
        }
        grid = (-(-keys // tiles.key_block) * batch * heads,)
        return Launch(attention_by_key, grid, arguments, tiles.options)

    def gradients(self) -> Gradients:
        """Return what the kernels found."""
        rows = [self.by_row[:, :, at] if wanted else None for at, wanted in enumerate(self.rows)]
        columns = [self.by_column[:, :, at] if wanted else None for at, wanted in enumerate(self.columns)]
        biases = (
            self.operands.terms.gradients(rows, columns, self._left())
            if self.call.wants_bias_gradients
            else ()
        )
        return Gradients(self.query, self.key, self.value, biases)

    def _left(self) -> Tensor | None:
        """Return the sum of each query's logit gradients, [B, H, T_q]: what the sink's own leaves, or None for zero."""
        sinks = self.call.sinks
        if sinks is None or not self.operands.terms.wants_level:
            return None
        delta = (self.gradient.float() * self.output.float()).sum(-1)
        return delta * (sinks[..., None] - self.logsumexp).exp().nan_to_num(0.0)


def _levels(logsumexp: Tensor, written: int, read: int) -> Tensor:
    """Allocate what is kept of each query, [4, B, H, padded], written in tiles of one size, read in those of another.

    What is read and not written stands for queries that are not there: their weights exp(logit - inf) are zero.
    """
    batch, heads, queries = logsumexp.shape
    ends = [-(-queries // block) * block for block in (written, read)]
    levels = logsumexp.new_empty((4, batch, heads, max(ends)))
    if ends[0] < ends[1]:
        levels[:2, ..., ends[0] :] = torch.inf
        levels[2:, ..., ends[0] :] = 0.0
    return levels
