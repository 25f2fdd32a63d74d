"""Give attention that keeps its own weights new scores: its softmax, its dropout and its product stay the model's.

What: a call of `grape::attend` that nothing reads says what the scores of a layer are to be,
    cap tanh(scale q k^T / cap) + bias + mask. They take the place of those its softmax is given, or what is nearly one;
    the fused attention is given bias + mask as its mask. In rows whose keys are all hidden by a fill the scores are one
    number.
Leaves alone: all that comes behind the scores.
Requires: queries that are the last of the keys.
Cost: bias + mask in memory, T_q x T_k numbers for each head, and what their gradients need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grape_compile.passes.attention import Attention, fused_arguments
from grape_compile.passes.axes import BATCH, HEAD, KEY, QUERY
from grape_compile.passes.graph import require_fake
from grape_compile.passes.operands import Emitter

aten = torch.ops.aten
_SCORES = (BATCH, HEAD, QUERY, KEY)


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """A layer whose weights stay its own, and what is true in its rows without keys."""

    layer: Attention
    hidden: fx.Node | None

    def give(self, emitter: Emitter, call: fx.Node) -> fx.Node:
        """Let the scores be those of a call; return what they were made of before."""
        query, key, _, slots, encoding = call.args
        options = {name: call.kwargs.get(name) for name in ("mask", "is_causal", "window")}
        options["is_causal"] = bool(options["is_causal"])
        operands: Any = [query, key, *slots, options["mask"], self.hidden]  # type: ignore[misc] # nodes
        reads = self.layer.given if self.layer.nearly else None
        place = emitter.last([*operands, emitter.program.marks[reads or self.layer.softmax]])
        added = emitter.call(
            place, torch.ops.grape.logit_bias.default, (query, key, slots, encoding), options
        )
        return self._fuse(emitter, added) if self.layer.is_fused else self._replace(emitter, call, added)

    def _fuse(self, emitter: Emitter, added: fx.Node) -> fx.Node:
        """Let the mask of the fused attention be what is added."""
        layer, given = self.layer, fused_arguments(self.layer.softmax)
        mask = self._like_scores(emitter, added, require_fake(layer.query).dtype)
        layer.softmax.args = (given["query"], given["key"], given["value"], mask, given["dropout_p"], False)
        layer.softmax.kwargs = {name: given[name] for name in ("scale", "enable_gqa") if name in given}
        before = given.get("attn_mask")
        return before if isinstance(before, fx.Node) else added

    def _replace(self, emitter: Emitter, call: fx.Node, added: fx.Node) -> fx.Node:
        """Let the softmax be given what is added to the products of queries and keys."""
        layer, before = self.layer, self.layer.given
        assert before is not None

        def do(target: Any, node: fx.Node, *args: Any) -> fx.Node:
            return emitter.call(added, target, (node, *args))

        dtype = require_fake(layer.query).dtype
        query, key = (do(aten.to.dtype, node, dtype) for node in call.args[:2])  # type: ignore[arg-type] # nodes
        heads, own = (require_fake(node).shape[1] for node in (query, key))
        if own != heads:
            key = do(aten.repeat_interleave.self_int, key, heads // own, 1)
        # Scaled queries keep products within the range of half precision.
        query = do(aten.mul.Tensor, query, layer.scale)
        scores = do(aten.matmul.default, query, do(aten.transpose.int, key, 2, 3))
        if layer.cap is not None:
            scores = do(
                aten.mul.Tensor, do(aten.tanh.default, do(aten.div.Tensor, scores, layer.cap)), layer.cap
            )
        scores = do(aten.add.Tensor, scores, added)
        if self.hidden is not None:
            scores = do(aten.masked_fill.Scalar, scores, self.hidden, 0.0)
        before.replace_all_uses_with(self._like_scores(emitter, scores, require_fake(before).dtype))
        return before

    def _like_scores(self, emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A value over batch, head, query and key as the model has its scores."""
        layer = self.layer

        def do(target: Any, value: fx.Node, *args: Any) -> fx.Node:
            return emitter.call(node, target, (value, *args))

        node = node if require_fake(node).dtype == dtype else do(aten.to.dtype, node, dtype)
        restored: fx.Node = layer.layout.restored(do, node, layer.axes["scores"], _SCORES)
        return restored
