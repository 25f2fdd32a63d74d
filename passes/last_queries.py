"""Keys of a cache of fixed size in an order in which the queries are the last of them, as `grape::attend` counts.

What: tokens are taken round the end of the cache, so that room that is not filled yet comes first: keys, values, the
    mask that hides that room, and what was kept for each key.
Leaves alone: calls without a mask, or with a part of it that became a flag.
Cost: a copy of keys and values; an order for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grape_compile.passes.graph import Unreadable, require_fake
from grape_compile.passes.operands import Emitter

aten = torch.ops.aten


class LastQueries:
    """The order of the keys of one attention: `tokens` is how many of them there are, with the new ones."""

    def __init__(self, emitter: Emitter, call: fx.Node, key: fx.Node, tokens: fx.Node) -> None:
        mask = call.kwargs.get("mask")
        if not isinstance(mask, fx.Node) or call.kwargs.get("is_causal") or call.kwargs.get("window"):
            raise Unreadable("keys of a cache of fixed size without a mask that hides its room")
        self.emitter = emitter
        places = key
        for axis in (0, 0, 1):
            places = emitter.call(places, aten.select.int, (places, axis, 0))
        ones = emitter.call(places, aten.ones_like.default, (places,), {"dtype": torch.int64})
        counted = emitter.call(ones, aten.cumsum.default, (ones, 0))
        last = emitter.call(counted, aten.select.int, (counted, 0, -1))
        moved = emitter.call(counted, aten.add.Tensor, (counted, tokens))
        moved = emitter.call(moved, aten.sub.Tensor, (moved, 1))
        self.order = emitter.call(moved, aten.remainder.Tensor, (moved, last))
        self.room = str(require_fake(key).shape[2])
        call.kwargs = {**call.kwargs, "mask": self.of(mask, -1)}

    def of(self, node: fx.Node, axis: int) -> fx.Node:
        """A value whose entries along an axis are in the order of the keys; one entry for all keys stays."""
        size: Any = require_fake(node).shape[axis]
        if str(size) != self.room:
            return node
        return self.emitter.call(node, aten.index_select.default, (node, axis, self.order))
