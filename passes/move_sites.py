"""Give the layers that were upgraded their new encoding.

What: in every marked layer the rotations and the attention that were found and verified with the old encoding get the
    new one, with the tensors the mark carries; rotations that it does not have are taken out, and so is the mark.
Leaves alone: layers without a mark.
Requires: nothing; raises UpgradeError where a marked layer is not found whole: its own code has the old encoding.
Ensures: no mark is left.
Cost: one pass; one fake call per operator that changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Compose,
    Encoding,
    Learned,
    Multiplicative,
    Nope,
    PathBias,
    Positions,
    Rotation,
    Table,
    Tables,
)
from grape_compile.errors import GrapeError, UpgradeError
from grape_compile.operators.operands import compute_dtype, parse_encoding
from grape_compile.operators.upgraded import TOKENS, asks_for_places
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.graph import Program, Unreadable, op_name, require_fake
from grape_compile.passes.last_queries import LastQueries
from grape_compile.passes.marks import Mark, Marked, tokens_last
from grape_compile.passes.operands import Emitter, fake_value
from grape_compile.passes.rewrite_rotations import remove_unused
from grape_compile.passes.sizes import Sizes
from grape_compile.passes.table_clocks import emit_positions
from grape_compile.passes.unturned import RESHAPING, Unturned, put_behind

aten = torch.ops.aten
_ROTATE, _ATTEND = torch.ops.grape.rotate.default, torch.ops.grape.attend.default
_AWAITED = torch.ops.grape.awaited.default
PHASES = "phases"
"""The clock of a rotation whose rates were summed up by the layer that has them."""


@dataclass(frozen=True)
class MoveSites(Pass):
    """Marked layers get the encoding of their mark."""

    def run(self, program: Program) -> Outcome:
        marked = Marked(program)
        if not marked.marks:
            return Outcome()
        moves = {node: _Move(program, mark) for node, mark in marked.marks.items()}
        for call in program.graph.find_nodes(op="call_function", target=_ROTATE):
            turned = [value for value in call.users if value in program.rotated]
            mark = marked.mark(call, *call.args[0]) if turned else None
            if mark is not None:
                moves[mark.node].rotations[call] = turned
        for call in program.graph.find_nodes(op="call_function", target=_ATTEND):
            mark = marked.mark(call, *call.args[:2])
            if mark is not None:
                moves[mark.node].attentions.append(call)
        outcome = Outcome()
        for move in moves.values():
            found = move.run()
            outcome.sites += found.sites
            outcome.absorbed += found.absorbed
        for move in moves.values():
            move.fill_in()
        return outcome


class _Move:
    """One marked layer: the calls that turn its queries and keys, and those that attend."""

    def __init__(self, program: Program, mark: Mark) -> None:
        self.program, self.mark = program, mark
        self.emitter = Emitter(program, Sizes())
        self.rotations: dict[fx.Node, list[fx.Node]] = {}
        self.attentions: list[fx.Node] = []
        self.arrived: dict[fx.Node, fx.Node] = {}

    def run(self) -> Outcome:
        self._require_all()
        outcome, unused = Outcome(), [self.mark.node]
        unturned = self._unturned()
        for call, values in self.rotations.items():
            sites = [self.program.rotated[value] for value in values]
            outcome.absorbed += sites
            unused += [call, *call.args[1]]  # type: ignore[misc] # nodes
            if self.mark.rotations:
                self._turn(call)
                outcome.sites += [replace(site, encoding=_one(self.mark.rotations)) for site in sites]
            else:
                self._take_out(call, values)
        for call in self.attentions if self.mark.attended else ():
            site = self.program.attended[call]
            outcome.absorbed.append(site)
            unused += [call, *call.args[3]]  # type: ignore[misc] # nodes
            query, key = unturned.get(call, cast(tuple[fx.Node, fx.Node], call.args[:2]))
            self._attend(call, query, key)
            if call in self.program.weighted:
                unused.append(self._weigh(call))
            if self.mark.biases:
                outcome.sites.append(replace(site, encoding=_one(self.mark.biases)))
        self.mark.node.replace_all_uses_with(self.mark.hidden)
        remove_unused(self.program.graph, unused)
        return outcome

    def fill_in(self) -> None:
        """Let gates that were awaited be those of the keys; what reads them moves behind them."""
        for awaited, gate in self.arrived.items():
            awaited.replace_all_uses_with(gate)
            self.program.graph.erase_node(awaited)
            put_behind(self.program.graph, gate)

    def _require_all(self) -> None:
        turned = sum(map(len, self.rotations.values()))
        attended = len(self.attentions) if self.mark.attended else 0
        if (turned, attended) != (self.mark.turned, self.mark.attended):
            raise self._error(
                f"{turned} of {self.mark.turned} rotations and {attended} of {self.mark.attended} attentions in this "
                "graph"
            )

    def _error(self, found: str, works: str = "a graph that holds the whole layer") -> UpgradeError:
        return UpgradeError(
            f"give {self.mark.module or 'a layer'} the encoding {self.mark.encoding}", found, works
        )

    # -- queries and keys ----------------------------------------------------------------------------------------------

    def _turn(self, call: fx.Node) -> None:
        """Let a call turn its tensors by the rotations of the mark, one after the other."""
        arguments: tuple[Any, ...] = call.args
        tensors, slots, text = arguments
        original = parse_encoding(text)
        if not isinstance(original, Rotation):
            raise self._error(f"{original}", "a rotation by positions and frequencies")
        given: dict[str, Any] = dict(zip(original.slots, slots, strict=True))
        if isinstance(original.clock, Tables):
            original, given["positions"] = self._with_clock(original, given)
        if isinstance(original.clock, Positions):
            given["clock"] = given[original.clock.slot]
        given |= self.mark.slots
        *first, last = (self._like(original, part) for part in self.mark.rotations)
        for part in first:
            operands = [self._slot(name, given, tensors[0]) for name in part.slots]
            place = self.emitter.last([*tensors, *operands])
            turned = self._emit(place, _ROTATE, (list(tensors), operands, str(part)))
            tensors = [
                self.emitter.call(turned, operator.getitem, (turned, number))
                for number in range(len(tensors))
            ]
        if isinstance(last, Rotation) and self._is_by_head(last):
            self._turn_by_head(call, list(tensors), last, given)
            return
        operands = [self._slot(name, given, tensors[0]) for name in last.slots]
        self._change(call, (list(tensors), operands, str(last)))

    def _is_by_head(self, rotation: Rotation) -> bool:
        spectrum = rotation.spectrum
        return isinstance(spectrum, Learned) and require_fake(self.mark.slots[spectrum.slot]).dim() == 3

    def _turn_by_head(
        self, call: fx.Node, tensors: list[fx.Node], rotation: Rotation, given: dict[str, Any]
    ) -> None:
        """Turn tensors one by one: those of grouped queries and of keys have different numbers of heads."""
        assert isinstance(rotation.spectrum, Learned)
        name = rotation.spectrum.slot
        theta = self.mark.slots[name]
        for value in list(call.users):
            tensor = tensors[int(value.args[1])]  # type: ignore[arg-type] # the index of a getitem
            inner = self._tokens_last(tensor, given)
            heads = int(require_fake(tensor).shape[1 if inner else 2])
            groups = heads // int(require_fake(theta).shape[0])
            own = theta
            if groups > 1:
                own = self._emit(own, aten.repeat_interleave.self_int, (own, groups, 0))
            if not inner:
                own = self._emit(own, aten.squeeze.dim, (own, 1))
            operands = [self._slot(slot, {**given, name: own}, tensor) for slot in rotation.slots]
            place = self.emitter.last([tensor, *operands, call])
            turned = self._emit(place, _ROTATE, ([tensor], operands, str(rotation)))
            result = self._emit(turned, operator.getitem, (turned, 0))
            value.replace_all_uses_with(result)
            self.program.graph.erase_node(value)

    def _tokens_last(self, tensor: fx.Node, given: Mapping[str, Any]) -> bool:
        clock = given.get("clock")
        try:
            return tokens_last(tensor, () if clock is None else require_fake(clock).shape)
        except Unreadable as reason:
            raise self._error(str(reason)) from reason

    def _with_clock(self, original: Rotation, given: Mapping[str, Any]) -> tuple[Rotation, fx.Node]:
        """A rotation by tables as one by positions, and those."""
        assert isinstance(original.clock, Tables)
        tables = given[original.clock.cos], given[original.clock.sin]
        try:
            positions = emit_positions(self.emitter, *tables, self.mark.frequencies)
        except Unreadable as reason:
            raise self._error(str(reason), "a layer whose positions reach it as positions") from reason
        return replace(original, spectrum=Table("theta"), clock=Positions("positions")), positions

    def _like(self, original: Rotation, part: Multiplicative) -> Multiplicative:
        """A rotation of the mark with the planes, the clock and the conventions of the one that was found."""
        clock = Positions(PHASES) if isinstance(part.clock, Accumulated) else original.clock
        if isinstance(part, Rotation):
            planes = original.planes
            if len(self.mark.rotations) > 1:
                planes = part.planes
                if not set(planes.pairs()) <= set(original.planes.pairs()):
                    raise self._error(f"{original}, which has other planes")
            return replace(original, planes=planes, spectrum=part.spectrum, clock=clock, basis=part.basis)
        if part.head_dim != original.head_dim or original.out is not None or original.scale != 1.0:
            raise self._error(f"{original}, which turns otherwise than {part}")
        return replace(part.by(clock), orientation=original.orientation)  # type: ignore[call-arg] # a field of all

    def _slot(self, name: str, given: Mapping[str, Any], tensor: fx.Node) -> fx.Node:
        node = given.get(name)
        if not isinstance(node, fx.Node):
            raise self._error(f"nothing for its slot {name}")
        if name != PHASES:
            return node
        # [B, T] beside the tokens of the tensor.
        return self._emit(node, aten.unsqueeze.default, (node, 1 if self._tokens_last(tensor, given) else 2))

    def _take_out(self, call: fx.Node, values: list[fx.Node]) -> None:
        """Hand on what a call would have turned, times its scale."""
        tensors, _, text = call.args
        assert isinstance(tensors, list | tuple)
        original = parse_encoding(str(text))
        scale = original.scale if isinstance(original, Rotation) else 1.0
        for value in values:
            plain = tensors[int(value.args[1])]  # type: ignore[arg-type] # the index of a getitem
            assert isinstance(plain, fx.Node)
            if scale != 1.0:
                plain = self._emit(plain, aten.mul.Tensor, (plain, scale))
            value.replace_all_uses_with(plain)
            self.program.graph.erase_node(value)

    # -- logits --------------------------------------------------------------------------------------------------------

    def _unturned(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """The queries and new keys that gates read, where they turn, of each attention."""
        gates = [part.gate for part in self.mark.biases if isinstance(part, Bias) and part.gate is not None]
        if not gates or not self.mark.rotations:
            return {}
        plain, found = Unturned(self.emitter, self.rotations), {}
        for call in self.attentions:
            query, key = cast(Sequence[fx.Node], call.args[:2])
            self._require_ends_with_queries(query, key)
            try:
                if any(gate.query for gate in gates):
                    query = plain.of(query)
                if any(gate.key for gate in gates):
                    key = plain.of(plain.new(key))
            except Unreadable as reason:
                raise self._error(str(reason), "use_cache=False, or a cache that keeps keys") from reason
            found[call] = query, key
        return found

    def _attend(self, call: fx.Node, read_query: fx.Node, read_key: fx.Node) -> None:
        """Give an attention the biases of the mark, whose gates read these queries and keys."""
        query, key, value = (cast(fx.Node, node) for node in call.args[:3])
        encoding = _one(self.mark.biases)
        self._require_ends_with_queries(query, key)
        given: dict[str, Any] = dict(self.mark.slots)
        for part in self.mark.biases:
            gate = part.gate if isinstance(part, Bias) else None
            if gate is not None and gate.query is not None:
                given[gate.query] = self._gate(read_query, given[gate.query])
            if gate is not None and gate.key is not None:
                given[gate.key] = self._key_gate(read_key, key, given[gate.key])
            if isinstance(part, PathBias):
                given[part.key] = self._cut(given[part.key], -2, key)
            elif isinstance(part.clock, Accumulated):
                given[part.clock.slot] = self._cut(given[part.clock.slot], -1, key)
        if self._stands_elsewhere(query, key):
            if call in self.program.weighted:
                stays = self.program.weighted[call].layer.stays
                raise self._error(
                    f"keys in a cache of fixed size, while {stays}", "a cache that grows, or none"
                )
            key, value = self._in_order(call, key, value, given)
        operands = [self._slot(name, given, query) for name in encoding.slots]
        self._change(call, (query, key, value, operands, str(encoding)))

    def _weigh(self, call: fx.Node) -> fx.Node:
        """Let a layer that keeps its own weights make them of the scores of a call; return its old ones."""
        try:
            return self.program.weighted[call].give(self.emitter, call)
        except Unreadable as reason:
            raise self._error(str(reason)) from reason

    def _in_order(
        self, call: fx.Node, key: fx.Node, value: fx.Node, given: dict[str, Any]
    ) -> tuple[fx.Node, fx.Node]:
        """Keys and values that end with the queries, and so what is given for each of them."""
        try:
            keys = LastQueries(self.emitter, call, key, self.mark.slots[TOKENS])
            for part in self.mark.biases:
                if isinstance(part, PathBias):
                    given[part.key] = keys.of(given[part.key], -2)
                    continue
                of_keys = part.gate.key if part.gate is not None else None
                for name in (*part.clock.slots, *filter(None, (of_keys,))):
                    given[name] = keys.of(given[name], -1)
            return keys.of(key, 2), keys.of(value, 2)
        except Unreadable as reason:
            raise self._error(str(reason), "a cache that grows, or none") from reason

    def _require_ends_with_queries(self, query: fx.Node, key: fx.Node) -> None:
        """Raise unless the place of queries among the keys is known, where more than a row's constant depends on it."""
        if self._stands_elsewhere(query, key) and TOKENS not in self.mark.slots:
            raise self._error(
                "keys of which the queries are not known to be the last",
                "a cache that grows, such as transformers.DynamicCache, or none",
            )

    def _stands_elsewhere(self, query: fx.Node, key: fx.Node) -> bool:
        """Whether queries may stand elsewhere than at the end of the keys, and what is added asks where."""
        queries, keys = (str(require_fake(node).shape[2]) for node in (query, key))
        return queries != keys and not self.mark.grows and any(map(asks_for_places, self.mark.biases))

    def _cut(self, slot: fx.Node, axis: int, key: fx.Node) -> fx.Node:
        """A slot with an entry for every token of a cache, for the first of them where the keys are those."""
        kept = str(require_fake(slot).shape[axis])
        if kept == str(require_fake(key).shape[2]):
            return slot
        node: Any = key
        while op_name(node) in RESHAPING:
            places = dict(zip(("node", "dim", "start", "end", "step"), node.args, strict=False))
            if op_name(node) == "aten::slice" and places.get("dim", 0) in (2, -2):
                first = places.get("start") in (0, None) and places.get("step", 1) == 1
                if not first or str(require_fake(places["node"]).shape[2]) != kept:
                    return slot
                return self._emit(slot, aten.slice.Tensor, (slot, axis, 0, places["end"]))
            node = node.args[0]
        return slot

    def _key_gate(self, tokens: fx.Node, key: fx.Node, slot: fx.Node) -> fx.Node:
        """The gate of all keys: by its direction from them, or kept token by token, that of the new ones awaited."""
        if require_fake(slot).dim() == 2:
            if str(require_fake(tokens).shape[2]) != str(require_fake(key).shape[2]):
                raise self._error("a gate of keys that had turned before they were kept", "use_cache=False")
            return self._gate(tokens, slot)
        for awaited in self.program.graph.find_nodes(op="call_function", target=_AWAITED):
            hidden, direction = awaited.args
            if hidden is self.mark.hidden:
                gate, wanted = self._gate(tokens, cast(fx.Node, direction)), require_fake(awaited)
                if str(require_fake(gate).shape) != str(wanted.shape):
                    raise self._error("a cache that keeps something else than the keys", "use_cache=False")
                self.arrived[awaited] = self._emit(gate, aten.to.dtype, (gate, wanted.dtype))
        return self._cut(slot, -1, key)

    def _gate(self, tokens: fx.Node, direction: fx.Node) -> fx.Node:
        """softplus(direction_h . x / sqrt(d)) [B, H, T] of queries or keys [B, H or H_kv, T, d] (GRAPE 4.6)."""
        emit, value = self._emit, require_fake(tokens)
        heads, size = int(value.shape[1]), int(value.shape[3])
        groups = emit(direction, aten.to.dtype, (direction, value.dtype))
        groups = emit(groups, aten.reshape.default, (groups, [heads, -1, size]))
        groups = emit(groups, aten.transpose.int, (groups, 1, 2))
        product = emit(tokens, aten.matmul.default, (tokens, groups))
        product = emit(product, aten.to.dtype, (product, compute_dtype(value)))
        product = emit(product, aten.div.Tensor, (product, math.sqrt(size)))
        gate = emit(product, aten.softplus.default, (product,))
        gate = emit(gate, aten.transpose.int, (gate, 2, 3))
        return emit(gate, aten.flatten.using_ints, (gate, 1, 2))

    # -- the graph -----------------------------------------------------------------------------------------------------

    def _emit(self, after: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        try:
            return self.emitter.call(after, target, args)
        except Unreadable as reason:
            raise self._error(str(reason)) from reason

    def _change(self, call: fx.Node, args: tuple[Any, ...]) -> None:
        """Give a call other operands, of which it makes a result of the same kind."""
        call.args = args
        try:
            fake_value(call)
        except GrapeError as failure:
            raise self._error(f"{failure.asked}: {failure.found}", failure.works) from failure


def _one(parts: Sequence[Encoding]) -> Encoding:
    """Parts of a layer as one encoding."""
    return Compose(tuple(parts)).canonical() if parts else Nope()
