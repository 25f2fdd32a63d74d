"""Verify a bias before it is used: the layer in fp64 against the reference of the operator, on random activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from grape_compile.operators import reference_attend
from grape_compile.operators.reference import reference_bias
from grape_compile.passes.attention import FUSED, fused_arguments
from grape_compile.passes.axes import BATCH, HEAD, KEY, QUERY, WIDTH, on_tensors
from grape_compile.passes.bias_slots import Emitted
from grape_compile.passes.biases import BiasPlan
from grape_compile.passes.finished_tables import TablePart
from grape_compile.passes.graph import Taint, Unreadable, op_name
from grape_compile.passes.movement import operand_of
from grape_compile.passes.replay import Replay
from grape_compile.passes.scores import DEAD
from grape_compile.passes.verify import difference

_LARGEST_REPLAY = 1 << 25


def verify_bias(
    plan: BiasPlan,
    emitted: Emitted,
    tensors: tuple[fx.Node, fx.Node, fx.Node],
    beside: tuple[fx.Node | None, fx.Node | None, fx.Node | None],
    replay: Replay,
) -> float:
    """Largest absolute difference on random query, key, value, rates and gates; Unreadable where it is too large.

    `beside` the bias: the mask, the sinks, and the rows whose keys are all hidden.
    """
    return _Check(plan, emitted, beside, replay).error(tensors)


class _Check:
    def __init__(
        self,
        plan: BiasPlan,
        emitted: Emitted,
        beside: tuple[fx.Node | None, fx.Node | None, fx.Node | None],
        replay: Replay,
    ) -> None:
        self.plan, self.emitted = plan, emitted
        self.mask, self.sinks, self.hidden = beside
        self.layer, self.sizes = plan.layer, replay.sizes
        self.replay = self._bound(replay)
        self.evaluated = any(isinstance(part, TablePart) for part in plan.parts)

    def _bound(self, replay: Replay) -> Replay:
        """Random numbers in place of the activations, each value by itself, and of the weights that are slopes."""
        taints, generator = replay.program.taints, torch.Generator().manual_seed(0)
        leaves = self._leaves()
        nodes = [node for node in leaves if taints[node] >= Taint.PARAMETER]
        weights = any(taints[node] is Taint.PARAMETER for node in nodes)
        nodes = [self.layer.query, self.layer.key, self.layer.value, *nodes]
        bound = {
            node: torch.randn(self.sizes.shape(node), dtype=torch.float64, generator=generator)
            for node in dict.fromkeys(nodes)
        }
        return Replay(replay.program, self.sizes, bound) if weights else replay.branch(bound)

    def _leaves(self) -> list[fx.Node]:
        """Everything the bias is made of; behind a rotation that is taken in, what it turns."""
        views = [view for part in self.plan.parts for view in part.operands]
        turned = {turn.value: turn.key.node for turn in self.emitted.turns}
        return [turned.get(view.node, view.node) for view in views]

    def error(self, tensors: Sequence[fx.Node]) -> float:
        layer, plan = self.layer, self.plan
        batch, heads, queries, keys = plan.scores.shape
        if batch * heads * queries * keys > _LARGEST_REPLAY:
            return self._rows(tensors[1])
        for drop in layer.drops:
            self.replay.known[drop] = _kept_whole(drop, self.replay)
        query, key, value = (self.replay.tensor(node) for node in tensors)
        if layer.nearly:
            # The mean of unit vectors are the weights.
            value = torch.eye(keys, dtype=torch.float64).expand(*key.shape[:2], keys, keys)
        original = self._weights() if layer.nearly else self.replay.tensor(layer.output)
        rewritten = reference_attend(
            query, key, value, self.emitted.operator, self._slots(), mask=self._mask(),
            is_causal=plan.is_causal, scale=layer.scale, window=plan.window, cap=layer.cap,
            sinks=None if self.sinks is None else self.replay.tensor(self.sinks),
        )  # fmt: skip
        if self.hidden is not None:
            mean = value.mean(2, keepdim=True).repeat_interleave(heads // value.shape[1], 1)
            rewritten = torch.where(self.replay.tensor(self.hidden), mean, rewritten)
        if not layer.nearly:
            rewritten = layer.layout.restored(
                on_tensors, rewritten, layer.axes["output"], (BATCH, HEAD, QUERY, WIDTH)
            )
        return difference(original, rewritten, self.evaluated)

    def _weights(self) -> Tensor:
        """What a softmax makes of the scores that something else makes the weights of, [B, H, T_q, T_k]."""
        assert self.layer.given is not None
        held, roles = self.replay.tensor(self.layer.given), (BATCH, HEAD, QUERY, KEY)
        scores: Tensor = self.layer.layout.ordered(on_tensors, held, self.layer.axes["scores"], roles)
        return scores.softmax(-1)

    def _slots(self) -> Mapping[str, Tensor]:
        return {name: self.replay.tensor(node) for name, node in self.emitted.slots.items()}

    def _mask(self) -> Tensor | None:
        return None if self.mask is None else self.replay.tensor(self.mask)

    def _rows(self, key: fx.Node) -> float:
        """A layer too long to replay: what is added to the scores of a few queries, up to a constant per row.

        Beside sinks, which see such a constant, nothing is left out.
        """
        count, keys = self.plan.scores.shape[QUERY], self.plan.scores.shape[KEY]
        queries = sorted({0, 1, count // 3, count // 2, count - 1} & set(range(count)))
        model = self.plan.scores.added(self.replay, queries)
        head = self.replay.tensor(key)
        bias = reference_bias(self.emitted.operator, self._slots(), count, head, queries)
        ours = bias.expand(*torch.broadcast_shapes(bias.shape, (1, 1, len(queries), keys))).clone()
        mask = self._mask()
        if mask is not None:
            value = mask.double()
            value = value[..., queries, :] if value.shape[-2] > 1 else value
            ours = ours + torch.where(value <= DEAD, -torch.inf, value)
        if self.plan.is_causal:
            offset = torch.arange(keys) - (torch.tensor(queries)[:, None] + keys - count)
            seen = (offset <= 0) & (offset > -(self.plan.window or keys))
            ours = ours.masked_fill(~seen, -torch.inf)
        model, ours = torch.broadcast_tensors(model, ours)
        if not torch.equal(model.isinf(), ours.isinf()):
            raise Unreadable("the masks of the model and of the operator differ")
        first = (~ours.isinf()).int().argmax(-1, keepdim=True)
        if self.sinks is None:
            model, ours = (each - each.gather(-1, first) for each in (model, ours))
        live = ~ours.isinf() & ~ours.isnan()
        return difference(model[live], ours[live], self.evaluated)


def _kept_whole(node: fx.Node, replay: Replay) -> Tensor:
    """What a dropout, or attention with one, gives where nothing is dropped."""
    if op_name(node) != FUSED:
        return replay.tensor(operand_of(node, 0))
    given: Any = fx.node.map_arg({**fused_arguments(node), "dropout_p": 0.0}, replay)
    whole: Tensor = torch.ops.aten.scaled_dot_product_attention.default(**given)
    return whole
