"""A provider of `grape::attend` for GPUs: attention with a path bias (GRAPE-AP), forward and backward, in Triton.

As `operators/scanned.py`, one scan over the keys from the diagonal backwards: a running sum of edges, a running softmax,
and an end where a row has all it needs. No matrix of tokens by tokens is in memory, and no two programs add to one
number. The backward pass keeps three numbers for each row and tile of keys, for a few heads at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Identity
from grape_compile.kernels.attention_configurations import Kernel
from grape_compile.kernels.launch import Launch, missing_triton
from grape_compile.kernels.path_configurations import Tiles, configuration
from grape_compile.kernels.path_edges import Edges
from grape_compile.kernels.pointers import NUMBERS, in_line, mask_arguments, padded, strides
from grape_compile.operators import chunked
from grape_compile.operators.call import AttendCall, Gradients
from grape_compile.operators.path import Path

#: Coordinates of the largest head and of the largest operand of a path, whose tiles fit into shared memory.
MAX_HEAD: Final = 256
MAX_EDGE: Final = 32
#: Shorter sequences are walked whole: the norms of their keys cost more than they save.
SHORTEST: Final = 2048
#: Tiles between two looks at whether a walk may end.
CHUNK: Final = 4
#: How far below what a row has all that it leaves weighs, as a power of two: half of the last place of float32, once
#: more for the sum of the weights, and two bits for the roundings of the bound itself.
ROUNDED_AWAY: Final = 28.0
#: Norms of keys are taken a little longer, for the roundings of products in TF32.
LONGER: Final = 1.005
#: Bytes that one launch of the backward pass may leave behind for the next, or what the heads of one key head need.
MAX_CARRIES: Final = 1 << 30


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls in 16 or 32 bits with one path bias and no other."""
    if absent := missing_triton():
        return absent
    if len(call.biases) != 1 or not isinstance(call.biases[0], Path):
        return "needs one path bias and no other"
    if call.query.dtype == torch.float64:
        return "float64 has no matrix instruction here"
    if call.wants_mask_gradient:
        return "the gradient of a mask needs every logit's gradient"
    sizes = call.query.shape[3], call.value.shape[3]
    if max(sizes) > MAX_HEAD:
        return f"heads of {max(sizes)} coordinates, more than {MAX_HEAD}"
    if call.biases[0].query.shape[3] > MAX_EDGE:
        return f"a path of {call.biases[0].query.shape[3]} coordinates, more than {MAX_EDGE}"
    if 0 in call.query.shape or 0 in call.value.shape or 0 in call.key.shape:
        return "needs at least one element"
    if not call.scale > 0:
        return f"a scale of {call.scale}, not positive"
    return True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    forward_launch(call, output, logsumexp).run()
    return output, logsumexp


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output, from its output and logsumexp."""

    def found(logsumexp: Tensor) -> Gradients:
        pass_back = Found(call, gradient, output, logsumexp)
        for base in pass_back.bases():
            pass_back.by_query_launch(base).run()
            pass_back.by_key_launch(base).run()
        return pass_back.gradients()

    return chunked.without_faint_rows(call, gradient, output, logsumexp, found)


def leaves(call: AttendCall) -> bool:
    """Whether walks may end early: no edge and no mask raises a logit, and the sequence is worth a look."""
    (path,) = (bias for bias in call.biases if isinstance(bias, Path))
    adds_numbers = call.mask is not None and call.mask.dtype != torch.bool
    return not isinstance(path.link, Identity) and not adds_numbers and call.key.shape[2] >= SHORTEST


class Operands:
    """The arguments that the three kernels share."""

    def __init__(self, call: AttendCall) -> None:
        self.call, self.edges = call, Edges(call)
        self.query, self.key, self.value = map(in_line, (call.query, call.key, call.value))

    def arguments(self, tiles: Tiles) -> dict[str, Any]:
        """Return operands, sizes and constants for tiles of a size."""
        call, edges = self.call, self.edges
        return {
            **{"QUERY": self.query, "KEY": self.key, "VALUE": self.value},
            **{"EDGE_QUERY": edges.query, "EDGE_KEY": edges.key, "SLOPES": edges.slopes, "SIZES": edges.sizes},
            **mask_arguments(call.mask, self.query),
            **strides("query", self.query),
            **strides("key", self.key),
            **strides("value", self.value),
            **strides("edge_query", edges.query),
            **strides("edge_key", edges.key),
            "queries": call.query.shape[2],
            "keys": call.key.shape[2],
            "window": call.window or 0,
            "scale": call.scale,
            "GROUPS": call.groups,
            "HEAD": call.query.shape[3],
            "HEAD_BLOCK": padded(call.query.shape[3]),
            "VALUES": call.value.shape[3],
            "VALUE_BLOCK": padded(call.value.shape[3]),
            "EDGE_BLOCK": edges.block,
            "QUERY_BLOCK": tiles.query_block,
            "KEY_BLOCK": tiles.key_block,
            "LANES": tiles.lanes,
            "LINK": edges.link,
            "CAUSAL": call.is_causal,
            "WINDOW": call.window is not None,
            "LEAVES": leaves(call),
            "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
        }

    def walk(self, tiles: Tiles) -> dict[str, Any]:
        """Return what a walk over keys needs to know when it may end."""
        return {"NORMS": self._norms(tiles.key_block), "rounded_away": ROUNDED_AWAY, "CHUNK": CHUNK}

    def _norms(self, block: int) -> Tensor:
        """Return the largest norm of the keys up to the end of each tile, [B, H_kv, tiles]."""
        if not leaves(self.call):
            return self.edges.slopes
        norms = torch.linalg.vector_norm(self.key, dim=-1, dtype=torch.float32).mul_(LONGER)
        length = norms.shape[-1]
        ends = torch.arange(block - 1, length + block - 1, block, device=norms.device).clamp_(max=length - 1)
        return norms.cummax(-1).values[..., ends].contiguous()


def forward_launch(
    call: AttendCall, output: Tensor, logsumexp: Tensor, tiles: Tiles | None = None
) -> Launch:
    """Return the launch of the forward kernel."""
    from grape_compile.kernels.bodies.path_forward import path_forward

    operands, tiles = Operands(call), tiles or configuration("forward", call)
    batch, heads, queries, _ = call.query.shape
    arguments = {
        **operands.arguments(tiles),
        **operands.walk(tiles),
        **{"OUTPUT": output, "LOGSUMEXP": logsumexp, "heads": heads},
        **strides("output", output),
    }
    grid = (-(-queries // tiles.query_block) * batch * heads,)
    return Launch(path_forward, grid, arguments, tiles.options)


class Found:
    """The backward pass of one call: what its kernels write, and what is made of it."""

    def __init__(
        self,
        call: AttendCall,
        gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        tiles: Mapping[Kernel, Tiles] | None = None,
    ) -> None:
        self.call, self.operands = call, Operands(call)
        self.gradient, self.output, self.logsumexp = in_line(gradient), in_line(output), logsumexp
        given = tiles or {}
        self.by_query = given.get("by_query") or configuration("by_query", call)
        self.by_key = given.get("by_key") or configuration("by_key", call)
        self.wants = call.wants_bias_gradients
        self.query, self.key, self.value = map(
            torch.empty_like, (self.operands.query, self.operands.key, self.operands.value)
        )
        batch, heads, queries, _ = call.query.shape
        keys, block = call.key.shape[2], self.operands.edges.block
        self.levels = logsumexp.new_empty((batch, heads, 3, queries))
        self.first = logsumexp.new_empty((batch, heads, queries), dtype=torch.int32)
        rows = (batch, heads) if self.wants else (0, 0)
        self.by_slope = logsumexp.new_empty((*rows, queries))
        self.edge_query, self.edge_key = (logsumexp.new_empty((*rows, each, block)) for each in (queries, keys))
        self.key_tiles = -(-keys // self.by_query.key_block)
        one = (3 if self.wants else 1) * self.key_tiles * queries
        groups = max(1, MAX_CARRIES // (4 * one * call.groups))
        self.heads_at_once = min(groups * call.groups, batch * heads)
        self.carries = logsumexp.new_empty((self.heads_at_once, one))

    def bases(self) -> range:
        """Return the first heads of the launches that follow each other, each with the same memory for carries."""
        return range(0, self.call.query.shape[0] * self.call.query.shape[1], self.heads_at_once)

    def by_query_launch(self, base: int = 0) -> Launch:
        """Return the launch for the gradients of queries of some heads; it comes first."""
        from grape_compile.kernels.bodies.path_by_query import path_by_query

        tiles = self.by_query
        batch, heads, queries, _ = self.call.query.shape
        arguments = {
            **self._arguments(tiles),
            **self.operands.walk(tiles),
            **{"OUTPUT": self.output, "LOGSUMEXP": self.logsumexp, "BY_QUERY": self.query},
            **{"BY_EDGE": self.edge_query, "BY_SLOPE": self.by_slope, "base": base, "heads": heads},
            **strides("output", self.output),
            **strides("by_query", self.query),
        }
        count = min(self.heads_at_once, batch * heads - base)
        return Launch(
            path_by_query, (-(-queries // tiles.query_block) * count,), arguments, tiles.options
        )

    def by_key_launch(self, base: int = 0) -> Launch:
        """Return the launch for the gradients of keys and values of the same heads."""
        from grape_compile.kernels.bodies.path_by_key import path_by_key

        tiles, groups = self.by_key, self.call.groups
        batch, heads, keys, _ = self.call.key.shape
        count = min(self.heads_at_once // groups, batch * heads - base // groups)
        arguments = {
            **self._arguments(tiles),
            **{"BY_KEY": self.key, "BY_VALUE": self.value, "BY_EDGE": self.edge_key},
            **{"LAST": self._last(base, count * groups), "CARRY_BLOCK": self.by_query.key_block},
            **{"base": base // groups, "key_heads": heads},
            **strides("by_key", self.key),
            **strides("by_value", self.value),
        }
        return Launch(path_by_key, (-(-keys // tiles.key_block) * count,), arguments, tiles.options)

    def _arguments(self, tiles: Tiles) -> dict[str, Any]:
        return {
            **self.operands.arguments(tiles),
            **{"GRADIENT": self.gradient, "LEVELS": self.levels, "CARRIES": self.carries},
            **{"FIRST": self.first, "WANTS": self.wants},
            **strides("gradient", self.gradient),
        }

    def _last(self, base: int, count: int) -> Tensor:
        """Return the number behind the last query that walked over each tile of keys, [count, tiles of keys]."""
        first = self.first.flatten(0, 1)[base : base + count]
        if not leaves(self.call):
            return first
        behind = torch.arange(1, first.shape[1] + 1, device=first.device, dtype=torch.int32)
        found = first.new_zeros((count, self.key_tiles))
        found = found.scatter_reduce(-1, first.long(), behind.expand_as(first), "amax").cummax(-1).values
        keys, block, written = self.call.key.shape[2], self.by_key.key_block, self.by_query.key_block
        ends = torch.arange(block, keys + block, block, device=found.device) // written - 1
        return found[:, ends.clamp_(max=self.key_tiles - 1)].contiguous()

    def gradients(self) -> Gradients:
        """Return what the kernels found."""
        biases = (
            (self.operands.edges.gradients(self.by_slope, self.edge_query, self.edge_key),) if self.wants else ()
        )
        return Gradients(self.query, self.key, self.value, biases)
