"""Find rotations by what they compute.

What: every value that is, token by token, a block rotation of one earlier activation: 2 x 2 planes turned by angles
    that depend on the position alone, other coordinates untouched.
How: regions linear in one activation are read exactly (elements.py); their coefficients are followed back to cos and
    sin of clock times frequency ("proved"), or to tables whose use is a rotation whatever they hold ("tables").
Leaves alone: anything else. A place that mixes channels with position-dependent coefficients and is not a rotation
    becomes a refusal.
Cost: one structural pass over the graph; one reading per distinct region, identical layers share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx

from grape_compile.passes.chosen_tables import turned_by_chosen_tables
from grape_compile.passes.contractions import CONTRACTIONS
from grape_compile.passes.elements import COMPLEX, PICKS, PRODUCTS, SUMS, Reader
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, is_pure, op_name, require_fake
from grape_compile.passes.movement import JOINS, LIKE, MOVEMENTS, operand_of
from grape_compile.passes.pieces import SCATTERS
from grape_compile.passes.planes import name_rotation
from grape_compile.passes.plans import Entry, Miss, Reading, RotationPlan
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Factor, Index, Term
from grape_compile.passes.unread import unread_turns

_SAMPLES = 48


def detect_rotations(program: Program) -> tuple[list[RotationPlan], list[tuple[fx.Node, Miss]]]:
    """All rotations of a program, and the places that mix channels by position without being one."""
    return _Finder(program).find()


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.roots = self._roots()
        self.cache: dict[object, tuple[RotationPlan, tuple[fx.Node, ...]] | Miss] = {}
        self.replay = Replay(program)

    # -- regions -----------------------------------------------------------------------------------------------------

    def _roots(self) -> dict[fx.Node, tuple[fx.Node, bool]]:
        """For every activation: the activation it is linear in, and whether a position-side factor is involved."""
        roots: dict[fx.Node, tuple[fx.Node, bool]] = {}
        for node in self.program.graph.nodes:
            if self.program.taints[node] is not Taint.DATA:
                continue
            roots[node] = self._linear_root(node, roots) or (node, False)
        return roots

    def _linear_root(
        self, node: fx.Node, roots: dict[fx.Node, tuple[fx.Node, bool]]
    ) -> tuple[fx.Node, bool] | None:
        name = op_name(node)
        if name not in _LINEAR or node in self.program.stale:
            return None
        if not is_pure(node) or (
            name != "getitem" and not isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
        ):
            return None
        operands = _read_by(node)
        taints = [self.program.taints[operand] for operand in operands]
        if any(taint is Taint.PARAMETER for taint in taints):
            return None
        data = [
            roots[operand] for operand, taint in zip(operands, taints, strict=True) if taint is Taint.DATA
        ]
        if len({root for root, _ in data}) != 1:
            return None
        if name in ("aten::add", "aten::sub", "aten::rsub", "aten::complex", *JOINS) and len(data) != len(
            operands
        ):
            return None
        if name in CONTRACTIONS and len(data) == len(operands) > 1:
            return None
        product = name in PRODUCTS or name in CONTRACTIONS
        factor = product and len(data) < len(operands) and self._varies(operands)
        return data[0][0], factor or any(mixed for _, mixed in data)

    def _varies(self, operands: Iterable[fx.Node]) -> bool:
        for operand in operands:
            value = fake(operand)
            if self.program.taints[operand] is not Taint.DATA and value is not None and value.dim() > 0:
                return True
        return False

    def _candidates(self) -> Iterable[fx.Node]:
        for node, (root, mixed) in self.roots.items():
            if mixed and root is not node and op_name(node) in _COMPLETIONS and fake(node) is not None:
                yield node

    def region(self, output: fx.Node) -> tuple[fx.Node, ...]:
        """The activations between the root and `output`, in graph order, root first."""
        root = self.roots[output][0]
        seen, stack = {output}, [output]
        while stack:
            node = stack.pop()
            if node is root:
                continue
            for operand in _read_by(node):
                if self.program.taints[operand] is Taint.DATA and operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return tuple(sorted(seen, key=self.program.order.__getitem__))

    def inputs(self, region: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes of the region every path runs through, earliest first: where the operator's input may be taken.

        A factor common to all channels (the score scale) stays outside of the rotation.
        """
        members = set(region)
        trunk: list[fx.Node] = []
        for node in region:
            trunk = [node] if self._is_scaling(node) else [*trunk, node]
            users = [user for user in node.users if user in members and node in _read_by(user)]
            if len(users) != 1:
                break
        return trunk

    def _is_scaling(self, node: fx.Node) -> bool:
        return (
            op_name(node) in PRODUCTS
            and sum(fake(operand) is not None for operand in node.all_input_nodes) == 1
        )

    # -- search ------------------------------------------------------------------------------------------------------

    def find(self) -> tuple[list[RotationPlan], list[tuple[fx.Node, Miss]]]:
        found: list[RotationPlan] = []
        misses: list[tuple[fx.Node, Miss, tuple[fx.Node, ...]]] = []
        for output in self._candidates():
            region = self.region(output)
            result = self._read(output, region)
            if isinstance(result, RotationPlan):
                found.append(result)
            elif result is not None:
                misses.append((output, result, region))
        refused = [*self._refusals(found, misses), *turned_by_chosen_tables(self.program)]
        regions = [*(plan.region for plan in found), *(region for _, miss, region in misses if miss.depth)]
        known = {node for region in regions for node in region}
        return self._maximal(found), [*refused, *unread_turns(self.program, known)]

    def _maximal(self, found: list[RotationPlan]) -> list[RotationPlan]:
        """Of rotations one inside the other keep the one over the most elements; of equals that whose angles differ
        along the fewest axes (planes are channels, no axis), then that of the smallest head, which says more than
        several heads side by side, and the earliest.
        """

        def rank(plan: RotationPlan) -> tuple[int, int, int, int]:
            elements = torch.Size(self.replay.sizes.shape(plan.output)).numel()
            axes = {axis for operand in plan.operands for axis in operand.token_axes}
            return -elements, len(axes), plan.encoding.planes.head_dim, self.program.order[plan.output]

        kept: list[RotationPlan] = []
        for plan in sorted(found, key=rank):
            if not any(set(plan.region[1:]) & set(other.region[1:]) - _trunk(plan, other) for other in kept):
                kept.append(plan)
        return sorted(kept, key=lambda plan: self.program.order[plan.output])

    def _refusals(
        self, found: list[RotationPlan], misses: list[tuple[fx.Node, Miss, tuple[fx.Node, ...]]]
    ) -> list[tuple[fx.Node, Miss]]:
        """Of the failures around one activation keep the nearest miss, unless the place became a rotation after all."""
        covered = {node for plan in found for node in plan.region if self.roots[node][1]}
        nearest: dict[frozenset[fx.Node], tuple[fx.Node, Miss]] = {}
        for output, miss, region in misses:
            core = frozenset(node for node in region if self._is_seed(node))
            if miss.depth == 0 or not core or core & covered:
                continue
            group = next((key for key in nearest if key & core), core)
            held = nearest.pop(group, None)
            best = (output, miss) if held is None or miss.depth > held[1].depth else held
            nearest[group | core] = best
        return list(nearest.values())

    def _is_seed(self, node: fx.Node) -> bool:
        root, mixed = self.roots[node]
        return mixed and not any(
            self.roots.get(operand, (root, False))[1] for operand in node.all_input_nodes
        )

    def _read(self, output: fx.Node, region: tuple[fx.Node, ...]) -> RotationPlan | Miss | None:
        signature = self.program.signature((output,), region[:1])
        held = self.cache.get(signature)
        if isinstance(held, Miss):
            return held
        if held is not None:
            plan, nodes = held
            return replace(plan, input=region[nodes.index(plan.input)], output=output, region=region)
        result = self._read_new(output, region)
        if isinstance(result, RotationPlan):
            result = replace(result, key=signature)
            self.cache[signature] = (result, region)
        elif result is not None:
            self.cache[signature] = result
        return result

    def _read_new(self, output: fx.Node, region: tuple[fx.Node, ...]) -> RotationPlan | Miss | None:
        nearest: Miss | None = None
        for source in self.inputs(region):
            if fake(source) is None or source is output:
                continue
            try:
                result = _Reading(self.program, self.replay, source, output, region).plan()
            except Unreadable as reason:
                result = Miss(
                    "readable",
                    f"the values between {source.name} and {output.name} cannot be read: {reason}",
                    0,
                )
            if isinstance(result, RotationPlan):
                return result
            if nearest is None or result.depth >= nearest.depth:
                nearest = result
        return nearest


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The operands whose numbers a node reads: not those it is given for their type or shape."""
    return [operand_of(node, 0)] if op_name(node) in LIKE else node.all_input_nodes


_LINEAR = MOVEMENTS | SUMS | PRODUCTS | CONTRACTIONS | COMPLEX | PICKS | SCATTERS
_COMPLETIONS = (
    JOINS
    | SCATTERS
    | CONTRACTIONS
    | {
        "aten::transpose",
        "aten::permute",
        "aten::mT",
        "aten::add",
        "aten::sub",
        "aten::addcmul",
        "aten::sum",
        "aten::view",
        "aten::reshape",
        "aten::flatten",
        "aten::mul",
    }
)


def _trunk(plan: RotationPlan, other: RotationPlan) -> set[fx.Node]:
    """Nodes two regions share because both start at the same activation, before either has rotated anything."""
    shared = set(plan.region) & set(other.region)
    inside = {node for each in (plan, other) for node in each.region[each.region.index(each.input) + 1 :]}
    return shared - inside


class _Reading:
    """One candidate: the map from `source` to `output`, read at sampled tokens for all channels."""

    def __init__(
        self, program: Program, replay: Replay, source: fx.Node, output: fx.Node, region: tuple[fx.Node, ...]
    ) -> None:
        self.program, self.replay = program, replay
        self.source, self.output, self.region = source, output, region
        self.reader = Reader(program, replay)

    def plan(self) -> RotationPlan | Miss:
        shape = self.reader.shape(self.output)
        if len(shape) < 2 or self.reader.shape(self.source) != shape:
            return Miss("shape", "input and output differ in shape", 0)
        if not _same_shape(self.source, self.output):
            return Miss("shape", "input and output have different symbolic shapes", 0)
        if 0 in shape:
            return Miss("shape", "the example has no elements", 0)
        terms = self._read(len(shape) - 1)
        channel = self._mixed_axis(terms)
        if channel is not None and channel != len(shape) - 1:
            terms = self._read(channel)
        if self.width < 2:
            return Miss("shape", "there is one channel", 0)
        entries = self._entries(terms)
        if isinstance(entries, Miss):
            return entries
        return self._classify(entries)

    def _read(self, channel: int) -> list[Term]:
        """The terms of all channels, on this axis, at sampled tokens."""
        shape = self.reader.shape(self.output)
        self.order = (*(axis for axis in range(len(shape)) if axis != channel), channel)
        self.shape = tuple(shape[axis] for axis in self.order)
        self.width = self.shape[-1]
        self.lead, self.index = _sample(self.shape)
        self.rows = torch.arange(self.index[-1].numel())
        where = tuple(self.index[self.order.index(axis)] for axis in range(len(shape)))
        terms = self.reader.linear(self.output, self.source, where, self.rows)
        return [
            term
            if term.source is None
            else replace(term, source=(term.source[0], tuple(term.source[1][axis] for axis in self.order)))
            for term in terms
        ]

    def _mixed_axis(self, terms: list[Term]) -> int | None:
        """The one axis, of a size known beforehand, along which elements are made of others."""
        axes = {
            axis
            for term in terms
            if term.source is not None
            for axis, at in enumerate(term.source[1])
            if not torch.equal(at, self.index[axis][term.rows])
        }
        alone = len(axes) == 1 and isinstance(require_fake(self.output).shape[min(axes)], int)
        return axes.pop() if alone else None

    def _entries(self, terms: list[Term]) -> list[list[Entry]] | Miss:
        """The per-token matrix, one list of entries per output channel, the same for every sampled token."""
        columns: list[list[Entry]] = [[] for _ in range(self.width)]
        samples = self.rows.numel() // self.width
        for term in terms:
            if term.source is None:
                return Miss("linear", "a position-dependent constant is added", 0)
            if any(
                not torch.equal(axis, at[term.rows])
                for axis, at in zip(term.source[1][:-1], self.index[:-1], strict=True)
            ):
                return Miss("token-local", "an output token is made of several tokens", 0)
            if bool((term.coefficient.imag != 0).any()):
                return Miss("real", "a coefficient is not real", 0)
            miss = self._columns(term, samples, columns)
            if miss is not None:
                return miss
        return columns

    def _columns(self, term: Term, samples: int, columns: list[list[Entry]]) -> Miss | None:
        assert term.source is not None
        channel = self.index[-1][term.rows]
        order = torch.argsort(channel, stable=True)
        channels, counts = torch.unique_consecutive(channel[order], return_counts=True)
        if bool((counts != samples).any()):
            return Miss("token-local", "tokens are treated differently", 0)
        by_channel = order.reshape(len(channels), samples)
        sources, numbers = term.source[1][-1][by_channel], term.coefficient.real[by_channel]
        if bool((sources != sources[:, :1]).any()) or bool((numbers != numbers[:, :1]).any()):
            return Miss("token-local", "tokens are treated differently", 0)
        for position, out in enumerate(channels.tolist()):
            number = float(numbers[position, 0])
            if number != 0:
                factors = term.take(by_channel[position]).factors
                _merge(columns[out], Entry(out, int(sources[position, 0]), number, factors))
        return None

    def _classify(self, columns: list[list[Entry]]) -> RotationPlan | Miss:
        through: dict[int, int] = {}
        mixed: dict[int, list[Entry]] = {}
        factors = [entry.factors for column in columns for entry in column]
        if len(factors) > 1 and all(_equal(each, factors[0]) for each in factors[1:]):
            return Miss("mixing", "all channels are scaled alike", 0)
        for out, entries in enumerate(columns):
            if len(entries) == 2 and entries[0].source != entries[1].source:
                mixed[out] = sorted(entries, key=lambda entry: entry.source)
            elif len(entries) == 1 and not entries[0].factors and entries[0].number == 1.0:
                through[out] = entries[0].source
            elif not any(len(column) > 1 for column in columns):
                return Miss("mixing", "channels are only scaled", 0)
            else:
                return Miss(
                    "planes", f"output channel {out} is not a combination of exactly two input channels", 1
                )
        if not mixed:
            return Miss("mixing", "no two channels are mixed", 0)
        constant = [not entry.factors for pair in mixed.values() for entry in pair]
        if any(constant):
            return Miss("planes", "channels are mixed with constant coefficients", 0 if all(constant) else 1)
        reading = Reading(
            self.program,
            self.replay,
            self.reader,
            self.source,
            self.output,
            self.region,
            self.lead,
            self.shape,
            self.order,
        )
        try:
            return name_rotation(reading, mixed, through)
        except Unreadable as reason:
            told = f"channels are mixed two by two, but by what cannot be read: {reason}"
            return Miss("readable", told, 1, "a rotation by tables")


def _merge(column: list[Entry], entry: Entry) -> None:
    """Add an entry to a column; a second coefficient with the same factors adds up with the first."""
    for position, held in enumerate(column):
        if held.source == entry.source and _equal(held.factors, entry.factors):
            column[position] = replace(held, number=held.number + entry.number)
            return
    column.append(entry)


def _equal(one: tuple[Factor, ...], other: tuple[Factor, ...]) -> bool:
    return len(one) == len(other) and all(
        a.node is b.node
        and a.part == b.part
        and all(torch.equal(x, y) for x, y in zip(a.index, b.index, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Equal for every value of the symbols, not only at the captured sizes."""
    first, second = fake(one), fake(other)
    return (
        first is not None
        and second is not None
        and list(map(str, first.shape)) == list(map(str, second.shape))
    )


def _sample(shape: tuple[int, ...]) -> tuple[Index, Index]:
    """Sampled target positions (one row each) and the index of all their channels."""
    choices = [sorted({0, 1, size // 2, size - 1} & set(range(size))) for size in shape[:-1]]
    grid = torch.cartesian_prod(*(torch.tensor(choice) for choice in choices)).reshape(-1, len(choices))
    if len(grid) > _SAMPLES:
        generator = torch.Generator().manual_seed(0)
        inner = torch.randperm(len(grid) - 2, generator=generator)[: _SAMPLES - 2] + 1
        grid = torch.cat([grid[:1], grid[inner.sort().values], grid[-1:]])
    lead = tuple(grid[:, axis] for axis in range(len(choices)))
    width = shape[-1]
    channel = torch.arange(width).repeat(len(grid))
    return lead, (*(axis.repeat_interleave(width) for axis in lead), channel)
