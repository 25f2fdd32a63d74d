"""Hand the parts of a bias to the operator: the encoding that says what they are, and the tensors in its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Clock,
    Compose,
    Constant,
    Encoding,
    Gate,
    Learned,
    NegativeExp,
    Nope,
    PathBias,
    Positions,
    Rotation,
    Slopes,
    Steps,
    Table,
    Uniform,
    describe_slopes,
)
from grape_compile.passes.absorbed import Turn, turn_of
from grape_compile.passes.bias_parts import BiasPart, HeadSlopes
from grape_compile.passes.biases import BiasPlan
from grape_compile.passes.finished_tables import TablePart
from grape_compile.passes.graph import Taint, Unreadable, require_fake
from grape_compile.passes.operands import Axis, Emitter, Operand
from grape_compile.passes.paths import PathPart
from grape_compile.passes.replay import Replay
from grape_compile.passes.scores import BATCH, HEAD, KEY, QUERY

aten = torch.ops.aten
_SLOPE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Emitted:
    """The encoding as called and as described, the tensor of every slot, and the rotations taken in."""

    operator: Encoding
    described: Encoding
    slots: dict[str, fx.Node]
    turns: tuple[Turn, ...] = ()

    @property
    def operands(self) -> list[fx.Node]:
        """The tensors in the order of the operator's slots."""
        return [self.slots[name] for name in self.operator.slots]


class BiasSlots:
    """Emits the operands of one plan; `replay` holds the values of what is no activation."""

    def __init__(self, plan: BiasPlan, emitter: Emitter, replay: Replay) -> None:
        self.plan, self.emitter, self.replay = plan, emitter, replay
        self.program = emitter.program
        self.counts: dict[str | int, Any] = dict(enumerate(plan.scores.symbolic))
        self.slots: dict[str, fx.Node] = {}
        self.turns: list[Turn] = []

    def emit(self) -> Emitted:
        """All parts, each with names of its own."""
        pairs = [self._pair(part) for part in self.plan.parts] or [(Nope(), Nope())]
        operators, described = zip(*pairs, strict=True)
        if len(pairs) == 1:
            return Emitted(operators[0], described[0], self.slots, tuple(self.turns))
        return Emitted(Compose(operators), Compose(described), self.slots, tuple(self.turns))

    def _pair(self, part: BiasPart | PathPart | TablePart) -> tuple[Encoding, Encoding]:
        """A part as called and as described."""
        if isinstance(part, PathPart):
            return self._path(part)
        return self._table(part) if isinstance(part, TablePart) else self._part(part)

    def _part(self, part: BiasPart) -> tuple[Encoding, Encoding]:
        called, told = self._slopes(part)
        clock, seen = self._clock(part)
        gate = None
        if part.gate_query is not None or part.gate_key is not None:
            gate = Gate(
                self._gate(part.gate_query, QUERY, "gate_query"),
                self._gate(part.gate_key, KEY, "gate_key"),
            )
        return Bias(called, clock, gate, part.distance), Bias(told, seen, gate, part.distance)

    def _slopes(self, part: BiasPart | PathPart) -> tuple[Slopes, Slopes]:
        if isinstance(part, BiasPart) and part.by_head:
            return self._by_head(part.by_head)
        if not part.slopes:
            return Uniform(part.number), Uniform(part.number)
        node = self.emitter.operand(part.slopes[0], [BATCH, HEAD], self.counts)
        node = self._times(node, part.slopes[1:])
        return self._named_slopes(self._scaled(node, part.number), self._learned(part))

    def _times(self, node: fx.Node, slopes: Sequence[Operand]) -> fx.Node:
        for view in slopes:
            other = self.emitter.operand(view, [BATCH, HEAD], self.counts)
            node = self.emitter.call(node, aten.mul.Tensor, (node, other))
        return node

    def _learned(self, part: BiasPart | PathPart | TablePart) -> bool:
        return any(self.program.taints[view.node] >= Taint.PARAMETER for view in part.slopes)

    def _by_head(self, found: tuple[HeadSlopes, ...]) -> tuple[Slopes, Slopes]:
        """The slopes of a bias that is put together head by head, zero where a head has none."""
        count = self.plan.scores.shape[HEAD]
        numbers = {head: each.number for each in found for head in each.only}
        if not any(each.slopes for each in found):
            values = [numbers.get(head, 0.0) for head in range(count)]
            return Constant(tuple(values)), describe_slopes(values, 0.0)
        if any(axis.is_part for each in found for view in each.slopes for axis in view.axes):
            raise Unreadable("slopes of some heads are kept in groups")
        first = next(view for each in found for view in each.slopes)
        like = self.emitter.operand(replace(first, axes=tuple(map(_first, first.axes))), [HEAD], self.counts)
        parts: list[fx.Node] = []
        after = 0
        for each in found:
            start, stop = each.only[0], each.only[-1] + 1
            if each.only != tuple(range(start, stop)) or start < after:
                raise Unreadable("the heads that share slopes do not stand side by side")
            if start > after:
                parts.append(self.emitter.call(like, aten.new_zeros.default, (like, [start - after])))
            parts.append(self._stretch(each, start, stop, like))
            after = stop
        if after < count:
            parts.append(self.emitter.call(like, aten.new_zeros.default, (like, [count - after])))
        node = self.emitter.call(self.emitter.last(parts), aten.cat.default, (parts,))
        views = [view for each in found for view in each.slopes]
        return self._named_slopes(
            node, any(self.program.taints[view.node] >= Taint.PARAMETER for view in views)
        )

    def _stretch(self, found: HeadSlopes, start: int, stop: int, like: fx.Node) -> fx.Node:
        """The slopes of heads side by side, [heads]."""
        node = self.emitter.call(like, aten.new_full.default, (like, [stop - start], found.number))
        for view in found.slopes:
            axes = tuple(
                replace(axis, offset=axis.offset + axis.stride * start) if axis.role == HEAD else axis
                for axis in view.axes
            )
            own = self.emitter.operand(replace(view, axes=axes), [HEAD], {HEAD: stop - start})
            node = self.emitter.call(node, aten.mul.Tensor, (node, own))
        return node

    def _named_slopes(self, node: fx.Node, learned: bool) -> tuple[Slopes, Slopes]:
        name = self._fill("slopes", node)
        if learned:
            return Learned(name), Learned(name)
        values = self.replay.tensor(node)
        flat = values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
        if bool((flat != flat[:1]).any()):
            return Table(name), Table(name)
        return Table(name), describe_slopes(flat[0].tolist(), _SLOPE_TOLERANCE)

    def _clock(self, part: BiasPart) -> tuple[Clock, Clock]:
        view = part.clock
        if part.places:
            name = self._fill("positions", self._places(part.places))
            return Positions(name), Positions(name)
        if view is None:
            return Steps(), Steps()
        wanted = [BATCH, HEAD, KEY] if HEAD in view.token_axes else [BATCH, KEY]
        node = self.emitter.operand(view, wanted, self.counts)
        if HEAD in view.token_axes and require_fake(node).dim() == 2:
            # [H, Tk] in a batch of one; two axes would be batch and keys.
            node = self.emitter.call(node, aten.unsqueeze.default, (node, 0))
        if part.inclusive is not None:
            name = self._fill("rates" if part.slopes or part.number > 0 else "log_forget", node)
            return Accumulated(name, part.inclusive), Accumulated(name, part.inclusive)
        name = self._fill("positions", node)
        return Positions(name), Steps() if self._is_steps(view, node) else Positions(name)

    def _places(self, views: tuple[Operand, ...]) -> fx.Node:
        """[axes, B or 1, Tk]."""
        nodes = [self.emitter.operand(view, [BATCH, KEY], self.counts) for view in views]
        place = max(nodes, key=self.emitter.position)
        stacked = self.emitter.call(place, aten.stack.default, (nodes,))
        if require_fake(stacked).dim() == 2:
            stacked = self.emitter.call(stacked, aten.unsqueeze.default, (stacked, 1))
        return stacked

    def _is_steps(self, view: Operand, node: fx.Node) -> bool:
        if self.program.taints[view.node] > Taint.STRUCTURE:
            return False
        value = self.replay.tensor(node).double()
        return bool((value[..., 1:] - value[..., :-1] == 1).all())

    def _gate(self, view: Operand | None, role: int, name: str) -> str | None:
        if view is None:
            return None
        return self._fill(name, self.emitter.operand(view, [BATCH, HEAD, role], self.counts))

    def _path(self, part: PathPart) -> tuple[Encoding, Encoding]:
        """A path integral; a rotation of its keys by steps goes into it."""
        called, told = self._slopes(part)
        if isinstance(part.link, NegativeExp) and _rises(told):
            raise Unreadable(
                "a path of exponentials that adds more to a key the farther it is: its sums from the query on lose "
                "digits that other sums keep"
            )
        turn = turn_of(self.program, self.plan.scores, part)
        operator = described = None
        if turn is not None:
            self.turns.append(turn)
            names = {slot: self._fill(slot, node) for slot, node in turn.slots.items()}
            operator, described = _renamed(turn.operator, names), _renamed(turn.described, names)
        query = self._fill("path_query", self._vectors(part.query, QUERY, part.dim))
        key = self._fill("path_key", self._vectors(part.key if turn is None else turn.key, KEY, part.dim))
        return (
            PathBias(part.link, called, part.dim, "none", operator, query, key),
            PathBias(part.link, told, part.dim, "none", described, query, key),
        )

    def _vectors(self, view: Operand, role: int, dim: int) -> fx.Node:
        """[B, H, T, dim], whatever axes the model's own vectors are shared along."""
        counts: dict[str | int, Any] = {**self.counts, "plane": dim}
        node = self.emitter.operand(view, [BATCH, HEAD, role, "plane"], counts)
        axes = [axis for axis, size in enumerate(require_fake(node).shape) if size == 1]
        heads = self.counts[HEAD]
        if require_fake(node).dim() == 4 and axes and isinstance(heads, int) and axes[0] == 1:
            node = self.emitter.call(node, aten.expand.default, (node, [-1, heads, -1, -1]))
        return node

    def _table(self, part: TablePart) -> tuple[Encoding, Encoding]:
        """The slopes as the rise of a finished table, read off two of its entries, by steps."""
        first, last = (
            self.emitter.operand(view, [BATCH, HEAD], self.counts) for view in (part.first, part.last)
        )
        if require_fake(first).dtype not in (torch.float32, torch.float64):
            first, last = (
                self.emitter.call(node, aten.to.dtype, (node, torch.float32)) for node in (first, last)
            )
        rise = self.emitter.call(last, aten.sub.Tensor, (last, first))
        node = self._times(rise, part.slopes)
        called, told = self._named_slopes(self._scaled(node, part.number / part.steps), self._learned(part))
        return Bias(called, Steps(), None, part.distance), Bias(told, Steps(), None, part.distance)

    def _fill(self, name: str, node: fx.Node) -> str:
        """Put a tensor into a slot of this name, numbered where there is one already."""
        free = (
            name
            if name not in self.slots
            else f"{name}_{sum(each.startswith(name) for each in self.slots) + 1}"
        )
        self.slots[free] = node
        return free

    def _scaled(self, node: fx.Node, number: float) -> fx.Node:
        return node if number == 1.0 else self.emitter.call(node, aten.mul.Tensor, (node, number))


def _rises(slopes: Slopes) -> bool:
    """Whether some slope is known to be below zero."""
    known = slopes.per_head if isinstance(slopes, Constant) else ()
    return min((slopes.slope,) if isinstance(slopes, Uniform) else known, default=0.0) < 0.0


def _first(axis: Axis) -> Axis:
    return Axis("fixed", axis.offset)


def _renamed(rotation: Rotation, names: dict[str, str]) -> Rotation:
    """The rotation with its spectrum in a slot of another name."""
    spectrum = rotation.spectrum
    if not isinstance(spectrum, Learned | Table) or spectrum.slot not in names:
        return rotation
    return replace(rotation, spectrum=replace(spectrum, slot=names[spectrum.slot]))
