"""Write new tokens into a cache of fixed size, which its caller hands in and out as one buffer: nothing is copied.

What: caches that a graph takes as past_key_values.N.key and .value and returns with new tokens behind them.
Leaves alone: everything else; who reads the past, or past and new tokens, reads the first tokens of the buffer.
Requires: that `attention_mask` has as many columns as there are tokens, past and new, and `input_ids` the new ones.
Ensures: present.N is past_key_values.N with the new tokens written behind the old ones. No node reads a token of the
    buffer that is written in the same call before it is written, so that both may lie in the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from grape_compile.errors import GrapeError
from grape_compile.export.kv_cache import CACHE_IN, CACHE_OUT, CAPACITY
from grape_compile.export.onnx.builder import BOOL, INT64, Builder, Size, sizes


def write_in_place(graph: ir.Graph) -> int:
    """Let every cache be a buffer of fixed size, and return how many there are.

    GrapeError for a model that does more to a cache than put tokens behind it.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    tokens = _Tokens(Builder(graph, graph[0]), inputs["input_ids"], inputs["attention_mask"])
    caches = [value for name, value in inputs.items() if name.startswith(CACHE_IN)]
    appends = [_append(cache) for cache in caches]
    for cache, append in zip(caches, appends, strict=True):
        # One builder for each place: names of nodes come from where it puts them.
        builder = tokens.builder if append is tokens.builder.anchor else Builder(graph, append)
        _write(builder, cache, append, tokens)
    graph.remove(appends, safe=True)
    return len(caches)


class _Tokens:
    """How many tokens there are, [1] each, and where the new ones go."""

    def __init__(self, builder: Builder, ids: ir.Value, mask: ir.Value) -> None:
        self.builder, self.ids = builder, ids
        self.all = builder.size(mask, 1)
        self.old = builder.op("Sub", self.all, builder.size(ids, 1), shape=(1,))
        self._places: dict[int, ir.Value] = {}

    def places(self, heads: int) -> ir.Value:
        """Return row, head and token of every new token of a cache, [B, H, T_new, 3]."""
        if heads not in self._places:
            builder = self.builder
            rows = builder.unsqueeze(builder.ladder(0, builder.size(self.ids, 0)), 1, 2, 3)
            by_head = builder.constant(np.arange(heads).reshape(1, heads, 1, 1))
            tokens = builder.unsqueeze(self._slots(), 0, 1, 3)
            (batch, length), by = sizes(self.ids), [builder.size(self.ids, axis) for axis in (0, 1)]
            shape = (batch, heads, length, 1)
            wide = [builder.expand(each, (by[0], heads, by[1], 1), shape) for each in (rows, by_head, tokens)]
            self._places[heads] = builder.concat(wide)
        return self._places[heads]

    def _slots(self) -> ir.Value:
        """Return where the new tokens lie in a buffer, [T_new]; outside, an error, where the mask has fewer columns.

        A negative number would count from the end of the buffer.
        """
        builder = self.builder
        slots = builder.ladder(self.old, self.all)
        is_outside = builder.op("Less", slots, builder.constant(0), dtype=BOOL, shape=sizes(slots))
        outside = builder.constant(np.iinfo(np.int64).max)
        return builder.op("Where", is_outside, outside, slots, dtype=INT64, shape=sizes(slots))


def _append(cache: ir.Value) -> ir.Node:
    """What puts new tokens behind a cache and is returned."""
    present = str(cache.name).replace(CACHE_IN, CACHE_OUT)
    users = [user for user, at in cache.uses() if user.op_type == "Concat" and at == 0]
    for user in users:
        grown = user.outputs[0]
        if (grown.name, len(user.inputs)) == (present, 2) and user.attributes["axis"].as_int() in (2, -2):
            return user
    raise GrapeError(
        "a file whose caller shares its cache between input and output",
        f"{present} is not {cache.name} with new tokens behind it",
        "kv_cache=True",
    )


def _write(builder: Builder, cache: ir.Value, append: ir.Node, tokens: _Tokens) -> None:
    grown, new = append.outputs[0], append.inputs[1]
    batch, heads, _, width = sizes(cache)
    assert isinstance(heads, int)
    shape: tuple[Size, ...] = (batch, heads, CAPACITY, width)
    buffer = builder.op("ScatterND", cache, tokens.places(heads), new, shape=shape)
    own = {append, buffer.producer()}
    _read_first(builder, list(grown.uses()), buffer, tokens.all)
    buffer.name, grown.name = grown.name, f"{grown.name}_apart"
    ir.convenience.replace_all_uses_with(grown, buffer, replace_graph_outputs=True)
    _read_first(tokens.builder, [use for use in cache.uses() if use[0] not in own], cache, tokens.old)
    cache.shape = ir.Shape(shape)


def _read_first(
    builder: Builder, uses: Sequence[tuple[ir.Node, int]], buffer: ir.Value, count: ir.Value
) -> None:
    """Let these read the first `count` tokens of a buffer; who asks how many there are is told."""
    first: ir.Value | None = None
    for user, at in uses:
        bounds = (user.attributes.get_int("start", 0), user.attributes.get_int("end", 4))
        if user.op_type == "Shape" and bounds == (2, 3):
            ir.convenience.replace_all_uses_with(user.outputs[0], count)
            continue
        if first is None:
            first = builder.part(buffer, builder.constant([0]), count, 2)
            read = user.inputs[at]
            first.shape = None if read is None else read.shape
        user.replace_input_with(at, first)
