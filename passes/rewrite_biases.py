"""Replace attention layers with an additive position bias by `grape::attend`.

What: softmax(scale * q k^T + slope * clock + mask) v, verified in fp64; a mask that is exactly causal becomes a flag.
Leaves alone: layers whose bias is not affine in the key, whose weights are used elsewhere, whose replay differs, and
    those that tell fills apart in a row without keys (`hidden_rows.py`).
Ensures: consumers see a value of the same shape and dtype at the same place.
Cost: one replay per distinct layer structure.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from grape_compile.operators.attention import attend_call
from grape_compile.operators.operands import compute_dtype
from grape_compile.operators.providers import attend_lowering
from grape_compile.passes.attention import Attention
from grape_compile.passes.axes import BATCH, CHANNEL, HEAD, KEY, QUERY, WIDTH
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.bias_slots import BiasSlots
from grape_compile.passes.biases import BiasPlan, detect_biases
from grape_compile.passes.finished_tables import TablePart
from grape_compile.passes.graph import Program, Unreadable, module_path, require_fake, source_line
from grape_compile.passes.hidden_rows import hidden_rows
from grape_compile.passes.marks import Marked
from grape_compile.passes.operands import Emitter
from grape_compile.passes.own_weights import OwnWeights
from grape_compile.passes.plans import Miss
from grape_compile.passes.replay import Replay
from grape_compile.passes.rewrite_rotations import overwritten, refusal, remove_unused
from grape_compile.passes.score_terms import ScoreTerm
from grape_compile.passes.scores import DEAD, own_axes
from grape_compile.passes.site import Site
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.verify_biases import verify_bias

aten = torch.ops.aten

ROLES = {
    "query": (BATCH, HEAD, QUERY, CHANNEL),
    "key": (BATCH, HEAD, KEY, CHANNEL),
    "value": (BATCH, HEAD, KEY, WIDTH),
    "output": (BATCH, HEAD, QUERY, WIDTH),
}
NEEDED = {"query": (BATCH, HEAD, QUERY), "key": (BATCH, KEY), "value": (BATCH, KEY)}
"""What each part has of its own; keys and values may be shared among heads."""


@dataclass(frozen=True)
class RewriteBiases(Pass):
    """Attention layers with an additive bias become `grape::attend` nodes, and those that are to get one.

    `every`: whatever they add. Layers whose weights stay their own become calls that nothing reads, where they are to
    get another encoding, or where the program is looked at alone (`looks`). Those whose weights are nearly a softmax
    are given new scores at once, but where all attention is to be operators.
    """

    every: bool = False
    looks: bool = False

    def run(self, program: Program) -> Outcome:
        marked = Marked(program)

        def waits(layer: Attention) -> bool:
            return self.looks or _is_moved(marked, layer)

        plans, misses = detect_biases(
            program,
            lambda layer: self.every or _gets_bias(marked, layer),
            lambda layer: _had_none(marked, layer),
            waits,
            nearly=not self.every,
        )
        outcome = Outcome(refusals=[refusal(node, miss) for node, miss in misses])
        emitter = Emitter(program, Sizes())
        replay = Replay(program)
        outputs = []
        turned: list[fx.Node] = []
        verified: dict[object, float] = {}
        for plan in plans:
            layer = _Layer(program, plan, emitter, replay, verified, waits(plan.layer))
            try:
                site = layer.replace()
            except Unreadable as reason:
                outcome.refusals.append(
                    refusal(
                        plan.layer.output,
                        Miss("verification", f"a bias was recognised but not used: {reason}", 9, "ALiBi"),
                    )
                )
                continue
            outcome.sites.append(site)
            outputs.append(plan.layer.output)
            turned += layer.turned
            outputs += layer.unused
        made = [node for node in emitter.ranks if node not in program.weighted]
        remove_unused(program.graph, [*outputs, *reversed(made)])
        outcome.absorbed = [program.rotated[node] for node in dict.fromkeys(turned) if node._erased]
        return outcome


def _gets_bias(marked: Marked, layer: Attention) -> bool:
    mark = marked.mark(layer.output, layer.query, layer.key)
    return mark is not None and bool(mark.biases)


def _is_moved(marked: Marked, layer: Attention) -> bool:
    mark = marked.mark(layer.output, layer.query, layer.key)
    return mark is not None and bool(mark.attended)


def _had_none(marked: Marked, layer: Attention) -> bool:
    mark = marked.mark(layer.output, layer.query, layer.key)
    return mark is not None and mark.unbiased


class _Layer:
    def __init__(
        self,
        program: Program,
        plan: BiasPlan,
        emitter: Emitter,
        replay: Replay,
        verified: dict[object, float],
        waits: bool,
    ) -> None:
        self.waits = waits
        self.program, self.plan, self.layer = program, plan, plan.layer
        self.emitter, self.replay, self.verified = emitter, replay, verified
        self.turned: list[fx.Node] = []
        self.unused: list[fx.Node] = []

    def replace(self) -> Site:
        """Emit, verify, and only then redirect the consumers."""
        layer, plan = self.layer, self.plan
        hazard = overwritten(self.program, [layer.query, layer.key, layer.value], layer.output)
        if hazard is not None:
            raise Unreadable(f"{hazard.name} changes query, key or value in place inside the layer")
        query, key, value = self._four_axes()
        emitted = BiasSlots(plan, self.emitter, self.replay).emit()
        mask = self._mask(query)
        sinks = self._sinks()
        hidden = hidden_rows(plan, self.emitter, self._unfolded_mask)
        read = [*emitted.operands, *(each for each in (mask, sinks, hidden) if each is not None)]
        hazard = overwritten(self.program, read, layer.output)
        if hazard is not None:
            raise Unreadable(f"{hazard.name} changes what the bias is made of in place before it is used")
        output = require_fake(layer.output)
        place = self.emitter.last(
            [query, key, value, *emitted.operands, mask, sinks, hidden, self.program.marks[layer.output]]
        )
        kwargs = {"mask": mask, "is_causal": plan.is_causal, "scale": layer.scale, "window": plan.window}
        beside = {"cap": layer.cap, "sinks": sinks}
        kwargs |= {name: option for name, option in beside.items() if option is not None}
        call = self.emitter.call(
            place,
            torch.ops.grape.attend.default,
            (query, key, value, emitted.operands, str(emitted.operator)),
            kwargs,
        )
        same = self.program.signature((layer.output, call), (layer.query, layer.key, layer.value))
        if same not in self.verified:
            self.verified[same] = verify_bias(
                plan, emitted, (query, key, value), (mask, sinks, hidden), self.replay
            )
        error = self.verified[same]
        result = call if layer.stays else self._result(call, value, hidden, output.dtype)
        for name in ("stack_trace", "nn_module_stack"):
            if name in layer.output.meta:
                call.meta[name] = result.meta[name] = layer.output.meta[name]
        self.turned = [turn.value for turn in emitted.turns]
        evidence = "tables" if any(isinstance(part, TablePart) for part in plan.parts) else "proved"
        site = Site(
            "bias",
            emitted.described,
            module_path(layer.output),
            source_line(layer.output),
            evidence,
            error,
            self._lowering(call),
        )
        for kept, facts in plan.scores.facts.items():
            self.program.rely(kept, facts)
        self.program.attended[call] = site
        if layer.stays:
            self._weigh(call, OwnWeights(layer, hidden))
            return replace(site, lowering="grape::logit_bias")
        layer.output.replace_all_uses_with(result)
        self.program.replaced[layer.output] = (result, site)
        return site

    def _weigh(self, call: fx.Node, own: OwnWeights) -> None:
        """Let a layer that keeps its own weights make them of the scores of a call, now or where it is moved."""
        if self.waits:
            self.program.weighted[call] = own
            return
        del self.program.attended[call]
        self.unused = [own.give(self.emitter, call), call]

    def _result(self, call: fx.Node, value: fx.Node, hidden: fx.Node | None, dtype: torch.dtype) -> fx.Node:
        """What a call gives, in the axes and the type of the layer's output."""
        result = self.emitter.call(call, operator.getitem, (call, 0))
        if hidden is not None:
            mean = self._mean(value, result)
            result = self.emitter.call(result, aten.where.self, (hidden, mean, result))
        axes = self.layer.axes["output"]
        result = self.layer.layout.restored(self._do, result, axes, ROLES["output"])
        if require_fake(result).dtype != dtype:
            result = self.emitter.call(result, aten.to.dtype, (result, dtype))
        return result

    def _lowering(self, call: fx.Node) -> str:
        """What computes the layer, by the operands of its operator."""
        query = require_fake(self.layer.query)
        if query.device.type == "cpu":
            return "grape::attend"
        operands: Any = fx.node.map_arg(call.args, require_fake)
        options: Any = fx.node.map_arg(dict(call.kwargs), require_fake)
        query, key, value, slots, encoding = operands
        with query.fake_mode:
            return attend_lowering(attend_call(query, key, value, list(slots), encoding, **options))

    # -- operands ------------------------------------------------------------------------------------------------------

    def _four_axes(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        layer = self.layer
        dtype = require_fake(layer.value).dtype
        parts = ((layer.query, "query"), (layer.key, "key"), (layer.value, "value"))
        query, key, value = (self._typed(self._ordered(node, part), dtype) for node, part in parts)
        if str(require_fake(key).shape[1]) != str(require_fake(value).shape[1]):
            raise Unreadable("keys and values have different numbers of heads")
        return query, key, value

    def _typed(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if require_fake(node).dtype == dtype:
            return node
        return self.emitter.call(node, aten.to.dtype, (node, dtype))

    def _ordered(self, node: fx.Node, part: str) -> fx.Node:
        layout, axes = self.layer.layout, self.layer.axes[part]
        ordered: fx.Node = layout.ordered(self._do, node, axes, ROLES[part], NEEDED[part])
        return ordered

    def _do(self, operator: Any, node: fx.Node, *args: Any) -> fx.Node:
        return self.emitter.call(node, operator, (node, *args))

    def _mean(self, value: fx.Node, result: fx.Node) -> fx.Node:
        """The mean of all values, for each head of the queries."""
        mean = self.emitter.call(result, aten.mean.dim, (value, [2], True))
        heads, own = (require_fake(node).shape[1] for node in (result, mean))
        if own in (1, heads):
            return mean
        return self.emitter.call(mean, aten.repeat_interleave.self_int, (mean, heads // own, 1))

    def _scaled(self, node: fx.Node, number: float) -> fx.Node:
        return node if number == 1.0 else self.emitter.call(node, aten.mul.Tensor, (node, number))

    def _sinks(self) -> fx.Node | None:
        """The sinks of the layer as [B or 1, H or 1]."""
        sinks = self.layer.sinks
        if isinstance(sinks, float):
            query = require_fake(self.layer.query)
            options = {"dtype": compute_dtype(query), "device": query.device}
            return self.emitter.call(self.layer.query, aten.full.default, ([1, 1], sinks), options)
        if sinks is None:
            return None
        for _ in range(2):
            sinks = self.emitter.call(sinks, aten.select.int, (sinks, -1, 0))
        return sinks

    # -- masks ---------------------------------------------------------------------------------------------------------

    def _mask(self, query: fx.Node) -> fx.Node | None:
        """All masks as one additive value, or None where the causal flag says it all."""
        if self.plan.is_causal:
            return None
        total: fx.Node | None = None
        # What was added first comes first: a fill covers what is below it.
        for term in reversed(self.plan.masks):
            value = self._additive(term, query)
            if total is None:
                total = value
            elif term.whole:
                hidden = self.emitter.call(value, aten.ne.Scalar, (value, 0.0))
                total = self.emitter.call(total, aten.where.self, (hidden, value, total))
            else:
                total = self.emitter.call(total, aten.add.Tensor, (total, value))
        return total

    def _additive(self, term: ScoreTerm, query: fx.Node) -> fx.Node:
        node = self._unfolded_mask(term)
        if term.dead is None:
            node = self._scaled(node, term.factor)
            if not term.finished:
                return node
            zero = self.emitter.call(
                node,
                aten.full.default,
                ([], 0.0),
                {"dtype": require_fake(node).dtype, "device": require_fake(node).device},
            )
            return self.emitter.call(
                node, aten.where.self, (self.emitter.call(node, aten.le.Scalar, (node, DEAD)), node, zero)
            )
        if require_fake(node).dtype is not torch.bool:
            node = self.emitter.call(node, aten.to.dtype, (node, torch.bool))
        dtype = (
            require_fake(query).dtype
            if term.value >= torch.finfo(require_fake(query).dtype).min or term.value == -torch.inf
            else torch.float32
        )
        options = {"dtype": dtype, "device": require_fake(node).device}
        dead = self.emitter.call(node, aten.full.default, ([], term.value), options)
        zero = self.emitter.call(node, aten.full.default, ([], 0.0), options)
        return self.emitter.call(
            node, aten.where.self, (node, dead, zero) if term.dead else (node, zero, dead)
        )

    def _unfolded_mask(self, term: ScoreTerm) -> fx.Node:
        axes = own_axes(require_fake(term.node), term.axes)
        mask: fx.Node = self.layer.layout.ordered(self._do, term.node, axes, (BATCH, HEAD, QUERY, KEY))
        return mask
