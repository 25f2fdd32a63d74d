"""Walk from a softmax back to the product of query and key, and note what is added to the scores on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from grape_compile.passes.axes import Axes, Letters
from grape_compile.passes.graph import Program, Taint, fake, op_name, require_fake
from grape_compile.passes.movement import PERMUTES, RESHAPES, keeps_numbers
from grape_compile.passes.products import Product, product_of
from grape_compile.passes.replay import Replay
from grape_compile.passes.score_terms import ABSORBING, LOWEST, PASSED, ScoreTerm, constant, split_terms
from grape_compile.passes.truths import is_truth

_BENDING = {
    "aten::max",
    "aten::maximum",
    "aten::clamp_min",
    "aten::tanh",
    "aten::clamp",
    "aten::relu",
    "aten::sigmoid",
    "aten::exp",
    "aten::abs",
    "aten::hardtanh",
    "aten::silu",
    "aten::gelu",
    "aten::pow",
}


@dataclass
class Core:
    """The product of query and key under the scores, the factor before it, and the axes of the scores so far."""

    product: Product
    scale: float
    axes: Axes


class ScoreWalk:
    """What was met so far: `terms` beside the product, the soft `cap` below them, the first `obstacle`.

    `floored` scores are raised to a lowest number where a mask left less.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.replay = program, Replay(program)
        self.letters = Letters()
        self.terms: list[ScoreTerm] = []
        self.obstacle = ""
        self.cap: float | None = None
        self.floored = False

    def read(self, node: fx.Node, factor: float) -> Core | None:
        """Walk from the softmax back to the product of query and key, collecting what was added on the way."""
        name, args = op_name(node), node.args
        operands = [arg for arg in args if isinstance(arg, fx.Node) and fake(arg) is not None]
        data = [operand for operand in operands if self.program.taints[operand] is Taint.DATA]
        if name in ("aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum"):
            return self._product(node, name, factor)
        if name in ("aten::add", "aten::sub") and data:
            return self._sum(node, name, data, factor)
        if len(data) != 1:
            return None
        if name in PASSED:
            return self.read(data[0], factor)
        if name == "aten::neg":
            return self.read(data[0], -factor)
        if name in RESHAPES | PERMUTES:
            return self._moved(node, self.read(data[0], factor))
        if name in ("aten::mul", "aten::div") and len(operands) == 1 and isinstance(args[1], int | float):
            return self.read(data[0], factor * args[1] if name == "aten::mul" else factor / args[1])
        if name in ("aten::masked_fill", "aten::where"):
            return self._masked(node, name, data[0], factor)
        if name == "aten::tanh" and factor and self.cap is None:
            return self._capped(data[0], factor)
        if name in ("aten::max", "aten::maximum") and self._is_lowest(args, data[0]):
            self.floored = True
            return self.read(data[0], factor)
        if name in _BENDING:
            self.hinder(f"the scores pass {name.removeprefix('aten::')} on their way to the softmax")
            return self.read(data[0], factor)
        return None

    def _is_lowest(self, args: tuple[Any, ...], data: fx.Node) -> bool:
        """Whether scores are compared with a number below all of them that are no mask's."""
        others = [constant(each, self.program) for each in args if each is not data]
        return len(others) == 1 and others[0] is not None and others[0] <= ABSORBING

    def _moved(self, node: fx.Node, core: Core | None) -> Core | None:
        axes = None if core is None else self.letters.moved(node, core.axes)
        return None if core is None or axes is None else Core(core.product, core.scale, axes)

    def _capped(self, data: fx.Node, factor: float) -> Core | None:
        """`factor * tanh(s q k^T)` is the product scaled by `factor * s` under a soft cap of that size."""
        self.cap = abs(factor)
        core = self.read(data, 1.0)
        if core is None:
            return None
        if self.terms:
            self.hinder("something is added to the scores below their soft cap, not above it")
        return Core(core.product, factor * core.scale, core.axes)

    def hinder(self, obstacle: str) -> None:
        """Note why the layer is not rewritten; the first reason stays."""
        self.obstacle = self.obstacle or obstacle

    def _sum(self, node: fx.Node, name: str, data: list[fx.Node], factor: float) -> Core | None:
        """A sum with the scores on one side: of two activations, the one that leads to a product of query and key."""
        blended = self._blended(node, name, factor)
        if blended is not None:
            return blended
        found = []
        held = self._state()
        for candidate in dict.fromkeys(data):
            self._restore(held)
            core = self._added(node, name, candidate, factor)
            if core is not None:
                found.append((core, self._state()))
        if len(found) != 1 or (len(data) == 2 and data[0] is data[1]):
            self._restore(held)
            return None
        self._restore(found[0][1])
        return found[0][0]

    def _state(self) -> tuple[Any, ...]:
        return list(self.terms), self.obstacle, self.letters.copy(), self.cap

    def _restore(self, state: tuple[Any, ...]) -> None:
        terms, self.obstacle, letters, self.cap = state
        self.terms, self.letters = list(terms), letters.copy()

    def _added(self, node: fx.Node, name: str, data: fx.Node, factor: float) -> Core | None:
        other = node.args[1] if node.args[0] is data else node.args[0]
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type] # a number by the operator's schema
        second = -alpha if name == "aten::sub" else alpha
        own, others = (second, 1.0) if node.args[1] is data else (1.0, second)
        added = isinstance(other, fx.Node) and fake(other) is not None
        if not added and not isinstance(other, int | float):
            return None
        if not added and self.cap is not None:
            self.hinder("a number is added to the scores below their soft cap")
        core = self._spread(node, data, self.read(data, factor * own))
        if core is not None and isinstance(other, fx.Node):
            self.terms = split_terms(self.program, other, factor * others, core.axes) + self.terms
        return core

    def _blended(self, node: fx.Node, name: str, factor: float) -> Core | None:
        """`scores * mask + number * (1 - mask)` is a fill where the mask, of ones and zeros, is zero (GPT-2)."""
        alpha = node.kwargs.get("alpha", 1)
        if not all(isinstance(each, fx.Node) for each in node.args[:2]) or not isinstance(alpha, int | float):
            return None
        for kept, other in (node.args[:2], node.args[1::-1]):
            assert isinstance(kept, fx.Node)
            assert isinstance(other, fx.Node)
            signs = 1.0, float(-alpha if name == "aten::sub" else alpha)
            own, others = signs if kept is node.args[0] else signs[::-1]
            operands = kept.all_input_nodes if op_name(kept) == "aten::mul" else []
            scores = [each for each in operands if self.program.taints[each] is Taint.DATA]
            masks = [each for each in operands if each not in scores and fake(each) is not None]
            if len(scores) != 1 or len(masks) != 1:
                continue
            mask = _uncast(masks[0])
            if op_name(mask) == "aten::neg":
                mask, own = _uncast(mask.all_input_nodes[0]), -own
            number = self._of_complement(other, mask)
            if number is None:
                continue
            value = number * others * factor
            if value > LOWEST:
                return None
            if not is_truth(self.program, mask, self.replay):
                self.hinder(
                    "its scores are multiplied by a mask of which nothing shows that it holds ones and zeros alone in "
                    "every call: make it of truth values, or keep it with persistent=False"
                )
            core = self._spread(node, scores[0], self.read(scores[0], factor * own))
            if core is not None:
                self.terms.insert(0, ScoreTerm(mask, dead=False, value=value, whole=True, axes=core.axes))
            return core
        return None

    def _of_complement(self, node: fx.Node, mask: fx.Node) -> float | None:
        """The number that 1 - mask is multiplied by; None for anything else."""
        start, rise, numbers = 0.0, 1.0, self.program.value_numbers
        while numbers[_uncast(node)] != numbers[mask]:
            name, args = op_name(node), node.args
            if name == "aten::sub" and constant(args[0]) is not None:
                name, args = "aten::rsub", args[1::-1]
            given = constant(args[1]) if len(args) > 1 else 0
            plain = isinstance(given, int | float) and not node.kwargs and len(args) < 3
            if not args or not isinstance(args[0], fx.Node) or not (plain or name in PASSED):
                return None
            number = float(given) if isinstance(given, int | float) else 0.0
            if name in ("aten::add", "aten::sub", "aten::rsub"):
                start += rise * (-number if name == "aten::sub" else number)
                rise = -rise if name == "aten::rsub" else rise
            elif name in ("aten::mul", "aten::div") and number:
                rise = rise * number if name == "aten::mul" else rise / number
            elif name == "aten::neg":
                rise = -rise
            elif name not in PASSED:
                return None
            node = args[0]
        return start if start == -rise else None

    def _spread(self, node: fx.Node, data: fx.Node, core: Core | None) -> Core | None:
        """The scores after something was done to each of them, which may have put axes of one entry before them."""
        before, after = require_fake(data).shape, require_fake(node).shape
        extra = len(after) - len(before)
        if core is None or list(map(str, after)) != ["1"] * extra + list(map(str, before)):
            return None
        return Core(core.product, core.scale, ((),) * extra + core.axes)

    def _masked(self, node: fx.Node, name: str, data: fx.Node, factor: float) -> Core | None:
        mask, filled, dead = (
            (node.args[1], node.args[2], True)
            if name == "aten::masked_fill"
            else (node.args[0], node.args[2], False)
        )
        if filled is data:
            filled, dead = node.args[1], True
        value = constant(filled, self.program)
        if not isinstance(mask, fx.Node) or self.program.taints[mask] >= Taint.PARAMETER or value is None:
            return None
        if value * factor > 0:  # such entries are chosen, not hidden
            return None
        core = self._spread(node, data, self.read(data, factor))
        if core is not None:
            term = ScoreTerm(mask, dead=dead, value=value * factor, whole=True, axes=core.axes)
            self.terms.insert(0, term)
        return core

    def _product(self, node: fx.Node, name: str, factor: float) -> Core | None:
        operands = list(node.args)
        if name == "aten::einsum":
            given = node.args[1]
            if not isinstance(given, list | tuple) or len(given) != 2:
                return None
            operands = list(given)
        bias, number = None, 0.0
        if name == "aten::baddbmm":
            bias = operands.pop(0)
            numbers = [node.kwargs.get(key, 1) for key in ("beta", "alpha")]
            if not all(isinstance(number, int | float) for number in numbers):
                return None
            number, alpha = (float(number) for number in numbers)  # type: ignore[arg-type] # checked above
            number, factor = number * factor, factor * alpha
        query, key = operands[0], operands[1]
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
            return None
        product = product_of(node, query, key, self.letters)
        if product is None:
            return None
        if number and isinstance(bias, fx.Node):
            self.terms = split_terms(self.program, bias, number, product.axes)
        return Core(product, factor, product.axes)


def _uncast(node: fx.Node) -> fx.Node:
    while op_name(node) in PASSED and keeps_numbers(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
