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

from grape_compile.passes.channel_maps import ChannelMap
from grape_compile.passes.chosen_tables import turned_by_chosen_tables
from grape_compile.passes.contractions import CONTRACTIONS
from grape_compile.passes.elements import COMPLEX, PICKS, PRODUCTS, SUMS
from grape_compile.passes.exponentials import exponential_behind, turned_by_exponentials
from grape_compile.passes.filled import holds_zeros
from grape_compile.passes.graph import Changing, Program, Taint, Unreadable, fake, is_pure, op_name
from grape_compile.passes.movement import JOINS, LIKE, MOVEMENTS, PERMUTES, RESHAPES, operand_of
from grape_compile.passes.pieces import SCATTERS
from grape_compile.passes.plans import Miss, RotationPlan
from grape_compile.passes.replay import Replay
from grape_compile.passes.unread import unread_matrices, unread_turns


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
        operands = [each for each in _read_by(node) if name not in SUMS or not holds_zeros(each)]
        taints = [self.program.taints[operand] for operand in operands]
        if any(taint is Taint.PARAMETER for taint in taints):
            return None
        if name in CONTRACTIONS and any(map(exponential_behind, operands)):  # read by itself
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

        A factor common to all channels (the score scale) stays outside of the rotation, unless that begins before it
        (channels seen in pairs and scaled as such). Where paths meet again behind it (queries and keys stacked, to be
        turned as one) there is another place to begin.
        """
        members, order = set(region), self.program.order
        before: list[fx.Node] = []
        trunk: list[fx.Node] = []
        meetings: list[fx.Node] = []
        split, reach = False, 0
        for node in region:
            users = [user for user in node.users if user in members and node in _read_by(user)]
            if not split:
                if self._is_scaling(node):
                    before, trunk = before + trunk, []
                trunk.append(node)
            elif order[node] >= reach:
                meetings.append(node)
            split = split or len(users) != 1
            reach = max([reach, *(order[user] for user in users)])
        return trunk + meetings + before

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
        turned, near = turned_by_exponentials(self.program, self.replay)
        found += turned
        refused = [*self._refusals(found, misses), *near, *turned_by_chosen_tables(self.program)]
        regions = [*(plan.region for plan in found), *(region for _, miss, region in misses if miss.depth)]
        known = {node for region in regions for node in region} | {node for node, _ in near}
        unread = [*unread_turns(self.program, known), *unread_matrices(self.program, known)]
        return self._maximal(found), [*refused, *unread]

    def _maximal(self, found: list[RotationPlan]) -> list[RotationPlan]:
        """Of rotations one inside the other keep the one over the most elements; of equals that whose angles differ
        along the fewest axes (planes are channels, no axis), then that of the smallest head, which says more than
        several heads side by side, and the earliest.
        """

        def rank(plan: RotationPlan) -> tuple[int, int, int, int]:
            elements = torch.Size(self.replay.sizes.shape(plan.output)).numel()
            axes = {axis for operand in plan.operands for axis in operand.token_axes}
            return -elements, len(axes), plan.encoding.head_dim, self.program.order[plan.output]

        kept: list[RotationPlan] = []
        for plan in sorted(found, key=rank):
            if not any(set(plan.region[1:]) & set(other.region[1:]) for other in kept):
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
            place = nodes.index(plan.input)
            return replace(plan, input=region[place], output=output, region=region[place:])
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
                between = region[region.index(source) :]
                result = ChannelMap(self.program, self.replay, source, output, between).plan()
            except Unreadable as reason:
                result = Miss(
                    "readable",
                    f"the values between {source.name} and {output.name} cannot be read: {reason}",
                    1 if isinstance(reason, Changing) else 0,
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
    | RESHAPES
    | PERMUTES
    | {"aten::add", "aten::sub", "aten::addcmul", "aten::sum", "aten::mul"}
)
