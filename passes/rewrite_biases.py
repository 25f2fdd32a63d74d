"""Replace attention layers with an additive position bias by `grape::attend`.

What: softmax(scale * q k^T + slope * clock + mask) v, verified in fp64; a mask that is exactly causal becomes a flag.
Leaves alone: layers whose bias is not affine in the key, whose weights are used elsewhere, whose replay differs.
Ensures: consumers see a value of the same shape and dtype at the same place.
Cost: one replay per distinct layer structure.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grape_compile.encoding import Absolute, Bias, Learned, Positions, Steps, Table, describe_slopes
from grape_compile.operators import reference_attend
from grape_compile.passes.attention import ScoreTerm
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.biases import DEAD, BiasPlan, added_rows, detect_biases, last_row
from grape_compile.passes.graph import (
    Program,
    Sizes,
    Taint,
    Unreadable,
    module_path,
    require_fake,
    source_line,
)
from grape_compile.passes.operands import Emitter
from grape_compile.passes.plans import Miss
from grape_compile.passes.replay import Replay
from grape_compile.passes.rewrite_rotations import mutation_between, refusal, remove_unused
from grape_compile.passes.site import Site
from grape_compile.passes.verify import difference

aten = torch.ops.aten
_SLOPE_TOLERANCE = 1e-6
_LARGEST_REPLAY = 1 << 25


@dataclass(frozen=True)
class RewriteBiases(Pass):
    """Attention layers with an additive bias become `grape::attend` nodes."""

    def run(self, program: Program) -> Outcome:
        plans, misses = detect_biases(program)
        outcome = Outcome(refusals=[refusal(node, miss) for node, miss in misses])
        emitter = Emitter(program, Sizes())
        replay = Replay(program)
        outputs = []
        for plan in plans:
            try:
                site = _Layer(program, plan, emitter, replay).replace()
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
        remove_unused(program.graph, [*outputs, *reversed(list(emitter.ranks))])
        return outcome


class _Layer:
    def __init__(self, program: Program, plan: BiasPlan, emitter: Emitter, replay: Replay) -> None:
        self.program, self.plan, self.layer = program, plan, plan.layer
        self.emitter, self.replay = emitter, replay
        self.folded = require_fake(self.layer.query).dim() == 3

    def replace(self) -> Site:
        """Emit, verify, and only then redirect the consumers."""
        layer, plan = self.layer, self.plan
        hazard = mutation_between(self.program, [layer.query, layer.key, layer.value], layer.output)
        if hazard is not None:
            raise Unreadable(f"{hazard.name} changes query, key or value in place inside the layer")
        query, key, value = self._four_axes()
        slopes, positions = self._slots(query, key)
        operator_encoding = self._operator()
        slots = [node for node in (slopes, positions) if node is not None]
        mask = self._mask(query)
        output = require_fake(layer.output)
        place = max(
            [node for node in (query, key, value, *slots, mask) if node is not None],
            key=self.emitter.position,
        )
        kwargs = {"mask": mask, "is_causal": plan.is_causal, "scale": layer.scale, "window": plan.window}
        call = self.emitter.call(
            place, torch.ops.grape.attend.default, (query, key, value, slots, str(operator_encoding)), kwargs
        )
        error = self._verify(operator_encoding, (query, key, value), slots, mask)
        result = self._ordered(self.emitter.call(call, operator.getitem, (call, 0)), "output")
        if self.folded:
            result = self.emitter.call(result, aten.reshape.default, (result, self._folded_sizes()))
        if require_fake(result).dtype != output.dtype:
            result = self.emitter.call(result, aten.to.dtype, (result, output.dtype))
        for name in ("stack_trace", "nn_module_stack"):
            if name in layer.output.meta:
                call.meta[name] = result.meta[name] = layer.output.meta[name]
        layer.output.replace_all_uses_with(result)
        self.program.renamed[layer.output.name] = result.name
        described = self._describe(slopes, positions)
        evidence = "tables" if plan.table is not None else "proved"
        return Site(
            "bias",
            described,
            module_path(layer.output),
            source_line(layer.output),
            evidence,
            error,
            "grape::attend",
        )

    def _folded_sizes(self) -> list[Any]:
        """Sizes of the output [B * H, Tq, Dv]; symbolic ones are read from query and value at run time."""
        sizes: list[Any] = list(require_fake(self.layer.output).shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                source = self.layer.query if axis < 2 else self.layer.value
                sizes[axis] = self.emitter.call(source, aten.sym_size.int, (source, axis))
        return sizes

    # -- operands ------------------------------------------------------------------------------------------------------

    def _four_axes(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        layer = self.layer
        key = layer.key
        if layer.key_transposed:
            key = self.emitter.call(key, aten.transpose.int, (key, -1, -2))
        parts = [
            self._ordered(node, part)
            for node, part in ((layer.query, "query"), (key, "key"), (layer.value, "value"))
        ]
        if self.folded:
            parts = [self._unfold(part) for part in parts]
        dtype = require_fake(layer.value).dtype
        query, key, value = (
            part
            if require_fake(part).dtype == dtype
            else self.emitter.call(part, aten.to.dtype, (part, dtype))
            for part in parts
        )
        return query, key, value

    def _ordered(self, node: fx.Node, part: str) -> fx.Node:
        order = self.layer.orders.get(part, (0, 1, 2, 3))
        return (
            node
            if order == (0, 1, 2, 3)
            else self.emitter.call(node, aten.permute.default, (node, list(order)))
        )

    def _unfold(self, node: fx.Node) -> fx.Node:
        """[B * H, T, D] as [B, H, T, D]; -1 stands for one symbolic size."""
        shape = require_fake(node).shape
        batch, heads = self.layer.batch_heads or (1, shape[0])
        if isinstance(heads, torch.SymInt):
            raise Unreadable("the number of heads is symbolic")
        target: list[Any] = [batch, heads, shape[1], shape[2]]
        symbolic = [axis for axis, size in enumerate(target) if isinstance(size, torch.SymInt)]
        if not symbolic:
            return self.emitter.call(node, aten.reshape.default, (node, target))
        tokens = self.emitter.call(node, aten.sym_size.int, (node, 1)) if 2 in symbolic else target[2]
        return self.emitter.call(
            node, aten.reshape.default, (node, [-1 if 0 in symbolic else batch, heads, tokens, target[3]])
        )

    def _slots(self, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        plan = self.plan
        shape = (*require_fake(query).shape[:3], require_fake(key).shape[2])
        counts: dict[str | int, Any] = dict(enumerate(shape))
        if plan.table is not None:
            return self._from_table(counts)
        assert plan.slopes is not None
        slopes = self.emitter.operand(plan.slopes, [0, 1], counts)
        number = plan.number
        if isinstance(plan.distance, Absolute):
            return self._scaled(slopes, -number), None
        if plan.clock is None:
            return self._scaled(slopes, number), None
        if not isinstance(shape[2], int) and 2 in plan.clock.token_axes:
            raise Unreadable("a matrix of distances of symbolic size")
        clock = self.emitter.operand(last_row(plan.clock, self.replay.sizes(shape[2])), [0, 3], counts)
        if self._falls(clock):
            clock, number = self._scaled(clock, -1.0), -number
        return self._scaled(slopes, number), clock

    def _falls(self, clock: fx.Node) -> bool:
        """A clock that counts down from key to key (`t - j`)."""
        value = self.replay.tensor(clock).double()
        if value.shape[-1] < 2 or self.plan.given:
            return False
        rises = value[..., 1:] - value[..., :-1]
        return bool((rises < 0).sum() > (rises > 0).sum())

    def _from_table(self, counts: dict[str | int, Any]) -> tuple[fx.Node, None]:
        """The slope as the mean rise over the last row of a finished table, by steps."""
        assert self.plan.table is not None
        keys = counts[3]
        if not isinstance(keys, int):
            raise Unreadable("a table of biases of symbolic size")
        row = self.emitter.operand(self.plan.table, [0, 1, 3], counts)
        if require_fake(row).dim() == 1:
            row = self.emitter.call(row, aten.unsqueeze.default, (row, 0))
        first = self.emitter.call(row, aten.select.int, (row, -1, 0))
        last = self.emitter.call(row, aten.select.int, (row, -1, keys - 1))
        rise = self.emitter.call(last, aten.sub.Tensor, (last, first))
        return self._scaled(rise, self.plan.number / (keys - 1)), None

    def _scaled(self, node: fx.Node, number: float) -> fx.Node:
        return node if number == 1.0 else self.emitter.call(node, aten.mul.Tensor, (node, number))

    def _operator(self) -> Bias:
        clock = (
            Steps()
            if self.plan.clock is None or isinstance(self.plan.distance, Absolute)
            else Positions("positions")
        )
        operand = self.plan.slopes
        learned = operand is not None and self.program.taints[operand.node] is Taint.PARAMETER
        return Bias(Learned("slopes") if learned else Table("slopes"), clock, distance=self.plan.distance)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def _mask(self, query: fx.Node) -> fx.Node | None:
        """All masks as one additive value, or None where the causal flag says it all."""
        if self.plan.is_causal:
            return None
        total: fx.Node | None = None
        for term in self.plan.masks:
            value = self._additive(term, query)
            total = value if total is None else self.emitter.call(total, aten.add.Tensor, (total, value))
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
        shape = require_fake(term.node).shape
        if not self.layer.is_folded(term):
            return term.node
        if len(shape) == 3 and shape[0] != 1:
            batch, heads = self.layer.batch_heads or (1, shape[0])
            if any(isinstance(size, torch.SymInt) for size in (batch, heads, *shape)):
                raise Unreadable("a mask per head of symbolic size")
            return self.emitter.call(term.node, aten.reshape.default, (term.node, [batch, heads, *shape[1:]]))
        return (
            self.emitter.call(term.node, aten.unsqueeze.default, (term.node, 0))
            if len(shape) == 3
            else term.node
        )

    # -- verification --------------------------------------------------------------------------------------------------

    def _verify(
        self,
        encoding: Bias,
        tensors: tuple[fx.Node, fx.Node, fx.Node],
        slots: list[fx.Node],
        mask: fx.Node | None,
    ) -> float:
        """Random query, key and value through the original region and through the reference, in fp64."""
        layer, sizes = self.layer, self.replay.sizes
        scores = torch.Size((*sizes.shape(tensors[0])[:-1], sizes.shape(tensors[1])[2])).numel()
        if scores > _LARGEST_REPLAY:
            return self._verify_rows(encoding, slots, mask)
        generator = torch.Generator().manual_seed(0)
        bound = {
            node: torch.randn(sizes.shape(node), dtype=torch.float64, generator=generator)
            for node in dict.fromkeys((layer.query, layer.key, layer.value))
        }
        replay = self.replay.branch(bound)
        original = replay.tensor(layer.output)
        query, key, value = (replay.tensor(node) for node in tensors)
        values = dict(zip(encoding.slots, (self.replay.tensor(node) for node in slots), strict=True))
        rewritten = reference_attend(
            query, key, value, encoding, values, mask=None if mask is None else self.replay.tensor(mask),
            is_causal=self.plan.is_causal, scale=layer.scale, window=self.plan.window,
        )  # fmt: skip
        rewritten = rewritten.permute(layer.orders.get("output", (0, 1, 2, 3))).reshape(original.shape)
        return difference(original, rewritten, self.plan.table is not None)

    def _verify_rows(self, encoding: Bias, slots: list[fx.Node], mask: fx.Node | None) -> float:
        """A layer too long to replay: what is added to the scores of a few queries, up to a constant per row."""
        layer, sizes = self.layer, self.replay.sizes
        count = sizes(require_fake(layer.query).shape[1] if self.folded else layer.size("query", 2))
        queries = sorted({0, 1, count // 3, count // 2, count - 1} & set(range(count)))
        model = added_rows(self.program, self.replay, layer, queries)
        keys = model.shape[-1]
        slopes = self.replay.tensor(slots[0])
        clock = self.replay.tensor(slots[1]) if len(slots) > 1 else torch.arange(keys)
        rows = torch.tensor(queries)[:, None] + keys - count
        if isinstance(encoding.distance, Absolute):
            bias = -slopes[..., None, None] * (torch.arange(keys) - rows).abs()
        else:
            bias = slopes[..., None, None] * clock.double()[..., None, None, :]
        ours = bias.reshape(-1, *bias.shape[-3:]).expand(-1, -1, len(queries), -1).clone()
        if mask is not None:
            value = self.replay.tensor(mask).double()
            value = value[..., queries, :] if value.shape[-2] > 1 else value
            ours = ours + torch.where(value <= DEAD, -torch.inf, value)
        if self.plan.is_causal:
            offset = torch.arange(keys) - rows
            seen = (offset <= 0) & (offset > -(self.plan.window or keys))
            ours = ours.masked_fill(~seen, -torch.inf)
        model, ours = torch.broadcast_tensors(model, ours)
        if not torch.equal(model.isinf(), ours.isinf()):
            raise Unreadable("the masks of the model and of the operator differ")
        first = (~ours.isinf()).int().argmax(-1, keepdim=True)
        model, ours = (each - each.gather(-1, first) for each in (model, ours))
        live = ~ours.isinf() & ~ours.isnan()
        return difference(model[live], ours[live], self.plan.table is not None)

    def _describe(self, slopes: fx.Node, positions: fx.Node | None) -> Bias:
        operator_encoding = self._operator()
        clock = Steps() if positions is None or self._is_steps(positions) else Positions("positions")
        if isinstance(operator_encoding.slopes, Learned):
            return Bias(operator_encoding.slopes, clock, distance=self.plan.distance)
        values = self.replay.tensor(slopes)
        flat = values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
        if bool((flat != flat[:1]).any()):
            return Bias(Table("slopes"), clock, distance=self.plan.distance)
        return Bias(describe_slopes(flat[0].tolist(), _SLOPE_TOLERANCE), clock, distance=self.plan.distance)

    def _is_steps(self, positions: fx.Node) -> bool:
        if self.plan.clock is not None and self.program.taints[self.plan.clock.node] > Taint.STRUCTURE:
            return False
        value = self.replay.tensor(positions).double()
        return bool((value[..., 1:] - value[..., :-1] == 1).all())
