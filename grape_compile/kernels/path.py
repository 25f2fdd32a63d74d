"""A provider of `grape::attend` for GPUs: attention with a path bias (GRAPE-AP), forward and backward, in Triton.

As `operators/scanned.py`, one scan over the keys from the diagonal backwards: a running sum of edges, a running
softmax, and an end where a row has all it needs. No matrix of tokens by tokens is in memory, and no two programs add to
one number. The backward pass keeps two numbers for each row and tile of keys, for a few heads at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from grape_compile.encoding import Identity, NegativeExp
from grape_compile.kernels.attention import turn_arguments
from grape_compile.kernels.launch import Launch, missing_triton
from grape_compile.kernels.path_configurations import (
    BACKWARD,
    OF_EDGES,
    OVER_KEYS,
    Kernel,
    Tiles,
    configuration,
)
from grape_compile.kernels.path_edges import Edges
from grape_compile.kernels.pointers import in_line, mask_arguments, padded, strides
from grape_compile.operators import chunked
from grape_compile.operators.call import AttendCall, Gradients
from grape_compile.operators.path import Path

#: Coordinates of the largest head and of the largest operand of a path, whose tiles fit into shared memory.
MAX_HEAD: Final = 256
MAX_EDGE: Final = 32
#: The forward kernel divides by the scale: the slope of a head stays a number.
LEAST_SCALE: Final = 2.0**-64
#: Shorter sequences are walked whole: the norms of their keys cost more than they save.
SHORTEST: Final = 2048
#: Tiles between two looks at whether a walk may end.
CHUNK: Final = 4
#: How far below what a row has all that it leaves weighs, as a power of two: half of the last place of float32, once
#: more for the sum of the weights, and two bits for the roundings of the bound itself.
ROUNDED_AWAY: Final = 28.0
#: Norms of keys are taken a little longer, for the roundings of products in TF32.
LONGER: Final = 1.005
#: Queries of a step of decoding at most.
FEW_QUERIES: Final = 16
#: Bytes that the backward pass may take for itself; more only where the heads of one key head need it.
MAX_MEMORY: Final = 1 << 30


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls in 16 or 32 bits with one path bias and no other."""
    if absent := missing_triton():
        return absent
    if len(call.biases) != 1 or not isinstance(call.biases[0], Path):
        return "needs one path bias and no other"
    if call.query.dtype == torch.float64:
        return "float64 has no matrix instruction here"
    if call.cap is not None:
        return "a soft cap under a path bias"
    if call.sinks is not None:
        return "a sink beside a path bias: the logit gradients of a row do not add up to zero"
    if call.segments is not None:
        return "segments under a path bias"
    if call.wants_mask_gradient:
        return "the gradient of a mask needs every logit's gradient"
    if _is_doubtful(call):
        return (
            f"a mask over float32 and more than {FEW_QUERIES} queries: wrong on a GPU, for a reason not known"
        )
    if call.wants_bias_gradients and isinstance(call.biases[0].link, NegativeExp):
        return "the gradient of -exp magnifies the rounding of what has been walked"
    sizes = call.query.shape[3], call.value.shape[3]
    if max(sizes) > MAX_HEAD:
        return f"heads of {max(sizes)} coordinates, more than {MAX_HEAD}"
    if call.biases[0].query.shape[3] > MAX_EDGE:
        return f"a path of {call.biases[0].query.shape[3]} coordinates, more than {MAX_EDGE}"
    if 0 in call.query.shape or 0 in call.value.shape or 0 in call.key.shape:
        return "needs at least one element"
    if not call.scale >= LEAST_SCALE:
        return f"a scale of {call.scale}, below {LEAST_SCALE:.0e}"
    return True


def _is_doubtful(call: AttendCall) -> bool:
    """Whether a call is of the kind whose output was wrong on an H100 with Triton 3.6; the interpreter's is right."""
    wide = call.query.is_cuda and call.query.dtype == torch.float32
    return wide and call.mask is not None and call.query.shape[2] > FEW_QUERIES


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    forward_launch(call, output, logsumexp).run()
    return output, logsumexp


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call for a cotangent of its output, from its output and logsumexp."""

    def found(logsumexp: Tensor) -> Gradients:
        pass_back = Found(call, gradient, output, logsumexp)
        pass_back.run()
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
            **{
                "EDGE_QUERY": edges.query,
                "EDGE_KEY": edges.key,
                "SLOPES": edges.slopes,
                "SIZES": edges.sizes,
            },
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
            "SPLIT": tiles.split,
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
        largest: Tensor = norms.cummax(-1).values[..., ends]
        return largest.contiguous()


def forward_launch(call: AttendCall, output: Tensor, logsumexp: Tensor, tiles: Tiles | None = None) -> Launch:
    """Return the launch of the forward kernel."""
    from grape_compile.kernels.bodies.path_forward import path_forward

    operands, tiles = Operands(call), tiles or configuration("forward", call)
    batch, heads, queries, _ = call.query.shape
    arguments = {
        **operands.arguments(tiles),
        **operands.walk(tiles),
        **{"OUTPUT": output, "LOGSUMEXP": logsumexp, "heads": heads},
        **strides("output", output),
        **turn_arguments(call, operands.query),
    }
    grid = (-(-queries // tiles.query_block) * batch * heads,)
    return Launch(path_forward, grid, arguments, tiles.options)


class Found:
    """The backward pass of one call: what its kernels write, a few heads at a time, and what is made of it."""

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
        self.tiles = {each: given.get(each) or configuration(each, call) for each in BACKWARD}
        # The sums over queries start where those over keys have left something behind.
        self.carry_block = min(each.key_block for each in self.tiles.values())
        batch, heads, queries, _ = call.query.shape
        keys, block = call.key.shape[2], self.operands.edges.block
        self.query = torch.empty_like(self.operands.query)
        self.key, self.value = (
            part.new_empty(part.shape).flatten(0, 1) for part in (self.operands.key, self.operands.value)
        )
        self.levels = logsumexp.new_empty((batch, heads, 3, queries))
        wanted = (batch, heads) if call.wants_bias_gradients else (0, 0)
        self.by_slope = logsumexp.new_empty((*wanted, queries))
        self.edge_query, self.edge_key = (
            logsumexp.new_empty((*wanted, each, block)) for each in (queries, keys)
        )
        self.carry_tiles = -(-keys // self.carry_block)
        one = 4 * (2 * self.carry_tiles * queries + keys * (self.key.shape[2] + self.value.shape[2]))
        groups = max(1, MAX_MEMORY // (one * call.groups))
        self.heads_at_once = min(groups * call.groups, batch * heads)
        self.carries = logsumexp.new_empty((2 * self.heads_at_once * self.carry_tiles * queries,))

    def run(self) -> None:
        """Compute everything."""
        for base in range(0, self.call.query.shape[0] * self.call.query.shape[1], self.heads_at_once):
            heads = Heads(self, base)
            for kernel in BACKWARD:
                if self.call.wants_bias_gradients or kernel not in OF_EDGES:
                    heads.launch(kernel).run()
            heads.add()

    def gradients(self) -> Gradients:
        """Return what the kernels found."""
        call, edges = self.call, self.operands.edges
        biases = (
            (edges.gradients(self.by_slope, self.edge_query, self.edge_key),)
            if call.wants_bias_gradients
            else ()
        )
        return Gradients(self.query, self.key.view(call.key.shape), self.value.view(call.value.shape), biases)


class Heads:
    """The launches for some query heads, those of whole key heads, from `base` on."""

    def __init__(self, found: Found, base: int) -> None:
        self.found, self.base = found, base
        call = found.call
        batch, heads, _, _ = call.query.shape
        self.count = min(found.heads_at_once, batch * heads - base)
        of_keys = slice(base // call.groups, (base + self.count) // call.groups)
        self.totals = found.key[of_keys], found.value[of_keys]
        # Query heads of one key head each write their own sums.
        self.parts = (
            self.totals
            if call.groups == 1
            else tuple(found.logsumexp.new_empty((self.count, *total.shape[1:])) for total in self.totals)
        )

    def launch(self, kernel: Kernel) -> Launch:
        """Return one of the four launches; each needs what those before it have written."""
        found, tiles = self.found, self.found.tiles[kernel]
        call = found.call
        arguments = {
            **found.operands.arguments(tiles),
            **{"GRADIENT": found.gradient, "LEVELS": found.levels, "CARRIES": found.carries},
            **{"base": self.base, "heads": call.query.shape[1], "EDGES": kernel in OF_EDGES},
            **strides("gradient", found.gradient),
        }
        if kernel in OVER_KEYS:
            return self._over_keys(kernel, tiles, arguments)
        from grape_compile.kernels.bodies.path_by_key import path_by_key

        arguments |= {
            **{"BY_KEY": self.parts[0], "BY_VALUE": self.parts[1], "BY_EDGE": found.edge_key},
            **{"LAST": self._last(tiles), "CARRY_BLOCK": found.carry_block},
        }
        grid = (-(-call.key.shape[2] // tiles.key_block) * self.count,)
        return Launch(path_by_key, grid, arguments, tiles.options)

    def _over_keys(self, kernel: Kernel, tiles: Tiles, arguments: dict[str, Any]) -> Launch:
        from grape_compile.kernels.bodies.path_by_query import path_by_query

        found = self.found
        tiles = replace(tiles, key_block=found.carry_block)
        arguments |= {
            **found.operands.walk(tiles),
            **{"OUTPUT": found.output, "LOGSUMEXP": found.logsumexp, "BY_QUERY": found.query},
            **{"BY_EDGE": found.edge_query, "BY_SLOPE": found.by_slope, "KEY_BLOCK": tiles.key_block},
            **strides("output", found.output),
            **strides("by_query", found.query),
        }
        if kernel in OF_EDGES:
            # It ends where the walk before it has ended.
            arguments["LEAVES"] = False
        grid = (-(-found.call.query.shape[2] // tiles.query_block) * self.count,)
        return Launch(path_by_query, grid, arguments, tiles.options)

    def _last(self, tiles: Tiles) -> Tensor:
        """Return the number behind the last query that walked over each tile of keys, [count, tiles of keys]."""
        found, written = self.found, self.found.carry_block
        first = found.levels[:, :, 2].flatten(0, 1)[self.base : self.base + self.count]
        if not leaves(found.call):
            return first
        behind = torch.arange(1, first.shape[1] + 1, device=first.device, dtype=torch.int32)
        last = behind.new_zeros((self.count, found.carry_tiles))
        last = last.scatter_reduce(-1, first.long(), behind.expand_as(first), "amax").cummax(-1).values
        ends = torch.arange(
            tiles.key_block, found.call.key.shape[2] + tiles.key_block, tiles.key_block, device=first.device
        )
        return last[:, (ends // written - 1).clamp_(max=found.carry_tiles - 1)].contiguous()

    def add(self) -> None:
        """Add what the query heads of each key head have found."""
        if self.parts is not self.totals:
            for total, part in zip(self.totals, self.parts, strict=True):
                total.copy_(part.unflatten(0, (-1, self.found.call.groups)).sum(1))
