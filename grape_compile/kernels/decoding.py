"""A provider of `grape::attend` for decoding on GPUs: few queries over many keys, in two launches of Triton kernels.

The keys are split among programs by their number alone, which a cache of fixed capacity never changes: nothing is read
back, so that a step can be kept in a CUDA graph. Keys that one mask hides from all queries are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import torch
from torch import Tensor

from grape_compile.kernels import attention, path
from grape_compile.kernels.attention_terms import Term, Terms
from grape_compile.kernels.decoding_configurations import Configuration, configuration
from grape_compile.kernels.launch import Launch
from grape_compile.kernels.path_edges import link_of
from grape_compile.kernels.pointers import NONE, broadcast, in_line, mask_arguments, padded, strides
from grape_compile.operators import chunked
from grape_compile.operators.call import AttendCall, Gradients
from grape_compile.operators.path import Path
from grape_compile.operators.providers import AttendKernel

#: Queries of a sequence that are few, and rows of a tile: queries times heads that share a key.
MOST_QUERIES: Final = path.FEW_QUERIES
MOST_ROWS: Final = 64
#: The least rows of a matrix product.
LEAST_ROWS: Final = 16
#: Coordinates of the keys of a path, of all heads that share a key together.
MOST_EDGES: Final = 128
#: Numbers of float32 that a thread reads at once.
VECTOR: Final = 4
#: Parts that the second kernel reads at once.
PARTS_BLOCK: Final = 16

#: What these kernels know of a call.
KNOWN: Final = (
    *("query", "key", "value", "biases", "mask", "is_causal", "scale", "window"),
    # Queries that have still to turn do so before they are handed over.
    *("turn", "wants_bias_gradients", "wants_mask_gradient"),
)

#: The arguments of a step of decoding where it neither turns nor appends.
NO_STEP: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("LENGTHS", "NEW_KEY", "NEW_VALUE", "COORDINATES", "A", "B")),
    **{f"new_{part}_{axis}": 0 for part in ("key", "value") for axis in ("batch", "head", "token")},
    **{f"{part}_{axis}": 0 for part in ("a", "b") for axis in ("batch", "token", "plane")},
    **{"cos_factor": 1.0, "sin_factor": 1.0, "SOURCE": 0},
    # A table of the pages of each sequence; the strides of batches are zero then.
    **{"PAGES": None, "pages_batch": 0, "key_page": 0, "value_page": 0, "PAGE": 0},
}
#: The arguments of a call without a path.
NO_PATH: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("EDGE_QUERY", "EDGE_KEY", "PATH_SLOPES")),
    **{f"edge_{part}_{axis}": 0 for part in ("query", "key") for axis in ("batch", "head", "token")},
    **{"path_slopes_batch": 0, "path_slopes_head": 0, "LINK": 0, "EDGE": 0, "MEMBERS": 0, "EDGE_BLOCK": 0},
    **{"LANES": 0, "EDGE_WIDTH": 1, "EDGE_PRECISION": "ieee"},
}


def supports(call: AttendCall) -> Literal[True] | str:
    """Calls of few queries that the kernels of attention take."""
    queries = call.query.shape[2]
    if type(queries) is not int:
        return "a number of queries that is a symbol"
    if queries > MOST_QUERIES:
        return f"{queries} queries, more than {MOST_QUERIES}"
    if (taken := _kernels(call).supports(call)) is not True:
        return taken
    if name := _unknown(call):
        return f"{name}, which decoding does not know"
    if queries * call.groups > MOST_ROWS:
        return f"{queries} queries of {call.groups} heads for each key, more than {MOST_ROWS} rows"
    path_of_call = _path_of(call)
    if (
        path_of_call is not None
        and (edges := _members(call, path_of_call) * path_of_call.key.shape[3]) > MOST_EDGES
    ):
        return f"a path of {edges} coordinates for each key, more than {MOST_EDGES}"
    return True


def forward(call: AttendCall) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of a call."""
    output, logsumexp = chunked.empty_result(call)
    decoding = Decoding(call)
    decoding.split_launch().run()
    decoding.merge_launch(output, logsumexp).run()
    return output, logsumexp


def _unknown(call: AttendCall) -> str:
    """Return what is asked of a call that these kernels do not know, or nothing."""
    asked = [each.name for each in fields(call) if each.name not in KNOWN]
    return next((name for name in asked if getattr(call, name) is not None), "")


def backward(call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
    """Return the gradients of a call: few queries have few, and the kernels for many compute them."""
    return _kernels(call).backward(call, gradient, output, logsumexp)


def _kernels(call: AttendCall) -> AttendKernel:
    """Return the kernels for many queries that take calls of this kind."""
    if _path_of(call) is None:
        return attention
    return path


def _path_of(call: AttendCall) -> Path | None:
    return next((bias for bias in call.biases if isinstance(bias, Path)), None)


@dataclass(frozen=True)
class Parts:
    """What the parts of the keys leave of each query, in float32; `carries` [B, H, T_q, splits] are for paths.

    `sums` [B, H, T_q, splits, D_v], `levels` [B, H, T_q, 2, splits]: the largest logit and the sum of weights.
    """

    sums: Tensor
    levels: Tensor
    carries: Tensor | None = None

    @classmethod
    def of(cls, call: AttendCall, splits: int) -> Parts:
        """Return memory for the parts of a call."""
        rows, like = call.query.shape[:3], call.query
        shapes = ((splits, call.value.shape[3]), (2, splits), (splits,))
        sums, levels, carries = (like.new_empty((*rows, *shape), dtype=torch.float32) for shape in shapes)
        return cls(sums, levels, None if _path_of(call) is None else carries)


class Decoding:
    """The two launches of one call; `step` are the arguments of one that also turns and appends."""

    def __init__(
        self, call: AttendCall, chosen: Configuration | None = None, step: Mapping[str, Any] | None = None
    ) -> None:
        self.call, self.step = call, step
        self.chosen = chosen or configuration(call)
        self.parts = Parts.of(call, self.chosen.splits)

    def split_launch(self) -> Launch:
        """Return the launch over all parts of the keys; it comes first."""
        from grape_compile.kernels.bodies.decode import decode_split

        call, chosen = self.call, self.chosen
        query, key, value = map(in_line, (call.query, call.key, call.value))
        terms = Terms(call)
        batch, key_heads, keys, _ = key.shape
        other = terms.term
        arguments = {
            **{
                "QUERY": query,
                "KEY": key,
                "VALUE": value,
                "PARTS": self.parts.sums,
                "LEVELS": self.parts.levels,
            },
            **strides("query", query),
            **strides("key", key),
            **strides("value", value),
            **_mask(call, query),
            **_path(call, chosen),
            "CARRIES": self.parts.carries,
            **_term("LEVEL", terms.level, query),
            **_term("TERM", other, query),
            **_gate("QUERY", None if other is None else other.gate_query, query),
            **_gate("KEY", None if other is None else other.gate_key, query),
            **(self.step or NO_STEP),
            **{"key_heads": key_heads, "queries": query.shape[2], "keys": keys, "window": call.window or 0},
            **{"splits": chosen.splits, "scale": call.scale, "GROUPS": call.groups},
            "ROWS": max(LEAST_ROWS, padded(call.groups * query.shape[2])),
            "HEAD": query.shape[3],
            "HEAD_BLOCK": padded(query.shape[3]),
            "VALUES": value.shape[3],
            "VALUE_BLOCK": padded(value.shape[3]),
            "KEY_BLOCK": chosen.key_block,
            "CAUSAL": call.is_causal,
            "WINDOW": call.window is not None,
            "ABSOLUTE": other is not None and other.is_absolute,
            "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
        }
        return Launch(decode_split, (chosen.splits * batch * key_heads,), arguments, chosen.options)

    def merge_launch(self, output: Tensor, logsumexp: Tensor) -> Launch:
        """Return the launch that weighs the parts."""
        return merge_launch(self.parts, output, logsumexp)


def merge_launch(parts: Parts, output: Tensor, logsumexp: Tensor) -> Launch:
    """Return the launch that makes output [B, H, T_q, D_v] and logsumexp [B, H, T_q] of all parts of the keys."""
    from grape_compile.kernels.bodies.decode import decode_merge

    batch, heads, queries, values = output.shape
    splits = parts.levels.shape[-1]
    arguments = {
        **{"PARTS": parts.sums, "LEVELS": parts.levels, "CARRIES": parts.carries},
        **{"OUTPUT": output, "LOGSUMEXP": logsumexp, "heads": heads, "queries": queries, "splits": splits},
        **strides("output", output),
        "VALUES": values,
        "VALUE_BLOCK": padded(values),
        "SPLIT_BLOCK": padded(splits),
        "PARTS_BLOCK": PARTS_BLOCK,
    }
    return Launch(decode_merge, (batch * heads * queries,), arguments, {"num_warps": 4})


def _mask(call: AttendCall, nothing: Tensor) -> dict[str, Any]:
    mask = call.mask
    # Edges of keys that nobody sees count for those before them.
    one = mask is not None and mask.shape[1] == mask.shape[2] == 1 and _path_of(call) is None
    return {**mask_arguments(mask, nothing), "ONE_MASK": one}


def _term(name: str, term: Term | None, nothing: Tensor) -> dict[str, Any]:
    """Return slopes [1 or B, 1 or H] and times [1 or B, 1 or H, T_k] of a term, with their strides."""
    slopes, times = (None, None) if term is None else (term.slopes, term.clock)
    small = name.lower()
    return {
        f"{name}_SLOPES": nothing if slopes is None else slopes,
        f"{name}_TIMES": nothing if times is None else times,
        name: NONE if term is None else term.kind,
        **broadcast(f"{small}_slopes", slopes, ("batch", "head")),
        **broadcast(f"{small}_times", times, ("batch", "head", "token")),
    }


def _gate(side: str, gate: Tensor | None, nothing: Tensor) -> dict[str, Any]:
    """Return a gate [1 or B, 1 or H, T] with its strides."""
    return {
        f"GATES_{side}": nothing if gate is None else gate,
        f"GATE_{side}": gate is not None,
        **broadcast(f"gates_{side.lower()}", gate, ("batch", "head", "token")),
    }


def _path(call: AttendCall, chosen: Configuration) -> Mapping[str, Any]:
    """Return the operands of a path [1 or B, 1 or H, T, dim] with their strides, and who shares a row of a tile."""
    bias = _path_of(call)
    if bias is None:
        return NO_PATH
    query, key, slopes = in_line(bias.query), in_line(bias.key), bias.slopes
    members, dim = _members(call, bias), key.shape[3]
    exact = call.query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        **{"EDGE_QUERY": query, "EDGE_KEY": key, "PATH_SLOPES": slopes},
        **strides("edge_query", query),
        **strides("edge_key", key),
        **broadcast("path_slopes", slopes, ("batch", "head")),
        **{"LINK": link_of(bias), "EDGE": dim, "MEMBERS": members, "EDGE_BLOCK": padded(members * dim)},
        # In TF32 a product is cut in three, as `path_edges` cuts it: 22 bits are right.
        "EDGE_PRECISION": "ieee" if exact else "tf32x3",
        "EDGE_WIDTH": math.gcd(VECTOR, dim, *key.stride()[:3]),
        "LANES": min(4 * chosen.warps, chosen.key_block // 2),
    }


def _members(call: AttendCall, bias: Path) -> int:
    """Return how many heads that share a key have keys of the path of their own."""
    return call.groups if bias.key.shape[1] > 1 else 1
