"""Read an attention layer around its softmax: query, key, value, scale, and everything added to the scores.

What: `softmax(scale * q k^T + terms) v`, written with matmul, bmm, baddbmm, einsum or `scaled_dot_product_attention`,
    with axes in any order, heads folded into the batch or split into groups that share a key; a soft cap on the scaled
    product below all terms, and sinks behind the keys.
Leaves alone: layers whose weights leave the layer, are dropped out at random, or pass a non-linear operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grape_compile.passes.axes import Axes, Layout, Letters
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import PERMUTES, RESHAPES
from grape_compile.passes.products import Product, layout_of, mixed, product_of
from grape_compile.passes.safe_softmax import guarded
from grape_compile.passes.score_terms import PASSED, ScoreTerm, constant, split_terms
from grape_compile.passes.sinks import joined_sinks, without_sinks
from grape_compile.passes.softmaxes import Softmax, softmax_at

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
class Attention:
    """One attention layer: `output` is its value; `axes` are those of scores, query, key, value and output.

    `product` is the one of query and key, or the fused call.

    A `plain` one is wanted as an operator even where it adds nothing.
    """

    softmax: fx.Node
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    layout: Layout
    axes: dict[str, Axes]
    product: fx.Node
    terms: list[ScoreTerm] = field(default_factory=list)
    is_causal: bool = False
    obstacle: str = ""
    cap: float | None = None
    sinks: fx.Node | None = None
    plain: bool = False


def find_attention(
    program: Program, plain: Callable[[Attention], bool] = lambda _: False
) -> tuple[list[Attention], set[fx.Node]]:
    """Every attention layer whose scores carry terms beside the product of query and key, and `plain` ones.

    With them the products of all layers that were read.
    """
    found, products = [], set()
    for node in program.graph.nodes:
        try:
            layer = _layer_at(program, node)
        except Unreadable:
            continue
        if layer is not None:
            layer.plain = plain(layer)
            products.add(layer.product)
            found += [layer] if layer.plain or _adds(layer) else []
    return found, products


def _layer_at(program: Program, node: fx.Node) -> Attention | None:
    if op_name(node) == "aten::scaled_dot_product_attention":
        return _fused(program, node)
    softmax = softmax_at(node)
    return None if softmax is None else _Reader(program).around(softmax)


def _adds(layer: Attention) -> bool:
    """Whether a layer has terms, be it in a mask of a fused call that is added, which a choice of keys is not."""
    fused = op_name(layer.softmax) == "aten::scaled_dot_product_attention"
    return bool(layer.terms) and not (fused and all(term.dead is False for term in layer.terms))


def _fused(program: Program, node: fx.Node) -> Attention | None:
    """A call of `scaled_dot_product_attention`."""
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value, mask = (given.get(name) for name in names[:4])
    if not all(isinstance(part, fx.Node) for part in (query, key, value)):
        return None
    if mask is not None and (not isinstance(mask, fx.Node) or fake(mask) is None):
        return None
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    added = mask is not None and require_fake(mask).dtype is not torch.bool
    if require_fake(query).dim() < (3 if added else 4):
        return None
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return None
    letters = Letters()
    product = product_of(node, query, key, letters)
    both = None if product is None else mixed(product.axes, value, letters)
    if product is None or both is None:
        return None
    terms: list[ScoreTerm] = []
    if mask is not None:
        hidden = ScoreTerm(mask, dead=False, value=-torch.inf, axes=product.axes)
        terms = split_terms(program, mask, 1.0, product.axes) if added else [hidden]
    width = int(require_fake(query).shape[-1])
    layer = _layer(
        program, letters, product, node, (product.axes, *both), value, node,
        float(scale) if scale is not None else width**-0.5, terms,
    )  # fmt: skip
    if layer is not None:
        layer.is_causal = bool(given.get("is_causal", False))
        if given.get("dropout_p", 0.0):
            layer.obstacle = f"attention weights are dropped out with probability {given['dropout_p']}"
    return layer


def _layer(
    program: Program,
    letters: Letters,
    product: Product,
    softmax: fx.Node,
    axes: tuple[Axes, Axes, Axes],
    value: fx.Node,
    output: fx.Node,
    scale: float,
    terms: list[ScoreTerm],
) -> Attention | None:
    """The layer with the letters of its axes told apart; `axes` are those of its weights, its values and its output."""
    told = layout_of(program, letters, product, axes, terms)
    if told is None:
        return None
    layout, renamed, query, key = told
    own = dict(zip(("scores", "value", "output"), map(renamed, axes), strict=True))
    own |= {"query": query[1], "key": key[1]}
    terms = [term.along(renamed(term.axes)) for term in terms]
    return Attention(softmax, output, query[0], key[0], value, scale, layout, own, product.node, terms)


@dataclass
class _Core:
    """The product of query and key under the scores, the factor before it, and the axes of the scores so far."""

    product: Product
    scale: float
    axes: Axes


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.letters = Letters()
        self.terms: list[ScoreTerm] = []
        self.obstacle = ""
        self.cap: float | None = None
        self.sinks: fx.Node | None = None

    def around(self, softmax: Softmax) -> Attention | None:
        scores = softmax.scores
        if self.program.taints[scores] is not Taint.DATA:
            return None
        rank = require_fake(scores).dim()
        if rank < 3:
            return None
        joined = joined_sinks(self.program, scores) if rank == 4 and softmax.dim == 3 else None
        if joined is not None:
            scores, self.sinks = joined.scores, joined.sinks
        core = self._scores(scores, 1.0)
        if core is None or not self._hide(softmax, core.axes):
            return None
        key = self.letters.split(core.axes[softmax.dim])
        if len(key) != 1:
            return None
        if softmax.product is not None:
            operands = softmax.product.args
            output, value = softmax.weights, operands[1]
            both = mixed(core.axes, value, self.letters) if isinstance(value, fx.Node) else None
        else:
            consumed = self._consumer(softmax, core.axes, key[0])
            if consumed is None:
                return None
            output, value, both = consumed
        if both is None or not isinstance(value, fx.Node):
            return None
        layer = _layer(
            self.program, self.letters, core.product.seen_from(key[0], self.letters), softmax.weights,
            (core.axes, *both), value, output, core.scale, self.terms,
        )  # fmt: skip
        if layer is not None:
            if self.sinks is not None and layer.axes["scores"] != layer.layout.roles[:4]:
                self._hinder("sinks stand beside scores whose axes are not batch, head, query and key")
            layer.obstacle, layer.cap, layer.sinks = self.obstacle, self.cap, self.sinks
        return layer

    def _hide(self, softmax: Softmax, axes: Axes) -> bool:
        """Masks that set weights to zero hide keys as fills of the scores do."""
        for mask, dead in softmax.hidden:
            if self.program.taints[mask] >= Taint.PARAMETER:
                return False
            self.terms.insert(0, ScoreTerm(mask, dead=dead, value=-torch.inf, whole=True, axes=axes))
        return True

    # -- before the softmax ------------------------------------------------------------------------------------------

    def _scores(self, node: fx.Node, factor: float) -> _Core | None:
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
            return self._scores(data[0], factor)
        if name == "aten::neg":
            return self._scores(data[0], -factor)
        if name in RESHAPES | PERMUTES:
            return self._moved(node, self._scores(data[0], factor))
        if name in ("aten::mul", "aten::div") and len(operands) == 1 and isinstance(args[1], int | float):
            return self._scores(data[0], factor * args[1] if name == "aten::mul" else factor / args[1])
        if name in ("aten::masked_fill", "aten::where"):
            return self._masked(node, name, data[0], factor)
        if name == "aten::tanh" and factor and self.cap is None:
            return self._capped(data[0], factor)
        if name in _BENDING:
            self._hinder(f"the scores pass {name.removeprefix('aten::')} on their way to the softmax")
            return self._scores(data[0], factor)
        return None

    def _moved(self, node: fx.Node, core: _Core | None) -> _Core | None:
        axes = None if core is None else self.letters.moved(node, core.axes)
        return None if core is None or axes is None else _Core(core.product, core.scale, axes)

    def _capped(self, data: fx.Node, factor: float) -> _Core | None:
        """`factor * tanh(s q k^T)` is the product scaled by `factor * s` under a soft cap of that size."""
        self.cap = abs(factor)
        core = self._scores(data, 1.0)
        if core is None:
            return None
        if self.terms:
            self._hinder("something is added to the scores below their soft cap, not above it")
        return _Core(core.product, factor * core.scale, core.axes)

    def _hinder(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle

    def _sum(self, node: fx.Node, name: str, data: list[fx.Node], factor: float) -> _Core | None:
        """A sum with the scores on one side: of two activations, the one that leads to a product of query and key."""
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

    def _added(self, node: fx.Node, name: str, data: fx.Node, factor: float) -> _Core | None:
        other = node.args[1] if node.args[0] is data else node.args[0]
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type] # a number by the operator's schema
        second = -alpha if name == "aten::sub" else alpha
        own, others = (second, 1.0) if node.args[1] is data else (1.0, second)
        added = isinstance(other, fx.Node) and fake(other) is not None
        if not added and not isinstance(other, int | float):
            return None
        if not added and self.cap is not None:
            self._hinder("a number is added to the scores below their soft cap")
        core = self._spread(node, data, self._scores(data, factor * own))
        if core is not None and isinstance(other, fx.Node):
            self.terms = split_terms(self.program, other, factor * others, core.axes) + self.terms
        return core

    def _spread(self, node: fx.Node, data: fx.Node, core: _Core | None) -> _Core | None:
        """The scores after something was done to each of them, which may have put axes of one entry before them."""
        before, after = require_fake(data).shape, require_fake(node).shape
        extra = len(after) - len(before)
        if core is None or list(map(str, after)) != ["1"] * extra + list(map(str, before)):
            return None
        return _Core(core.product, core.scale, ((),) * extra + core.axes)

    def _masked(self, node: fx.Node, name: str, data: fx.Node, factor: float) -> _Core | None:
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
        core = self._spread(node, data, self._scores(data, factor))
        if core is not None:
            term = ScoreTerm(mask, dead=dead, value=value * factor, whole=True, axes=core.axes)
            self.terms.insert(0, term)
        return core

    def _product(self, node: fx.Node, name: str, factor: float) -> _Core | None:
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
        return _Core(product, factor, product.axes)

    # -- behind the softmax ------------------------------------------------------------------------------------------

    def _consumer(
        self, softmax: Softmax, axes: Axes, key: str
    ) -> tuple[fx.Node, fx.Node, tuple[Axes, Axes] | None] | None:
        """The product with the values, the values and the axes of both, when nothing else looks at the weights."""
        node, whole = guarded(softmax.weights, softmax.scores), self.sinks is not None
        while True:
            users = [user for user in node.users if op_name(user) != "aten::_assert_tensor_metadata"]
            if not users:
                return None
            if whole and len(users) == 1 and without_sinks(users[0], node):
                node, whole = users[0], False
                continue
            product = next((user for user in users if _multiplies(user)), None)
            if len(users) > 1:
                self._hinder("the attention weights are used elsewhere (returned, masked or averaged)")
            if product is not None:
                given = product.args[1] if op_name(product) == "aten::einsum" else product.args
                assert isinstance(given, list | tuple)
                values = [each for each in given if each is not node]
                if whole or len(values) != 1 or not isinstance(values[0], fx.Node):
                    return None  # the sinks have values, or the weights are multiplied with themselves
                return product, values[0], mixed(axes, values[0], self.letters, product, node, key)
            user = users[0]
            if op_name(user) == "aten::dropout":
                if user.args[2] and user.args[1]:
                    self._hinder(
                        f"attention weights are dropped out with probability {user.args[1]} in training"
                    )
            elif op_name(user) not in PASSED and not _is_safe(user):
                found = self.letters.moved(user, axes) if _moves(user) else None
                if found is None:
                    return None
                axes = found
            node = user


def _is_safe(node: fx.Node) -> bool:
    """Zero in place of the weights of a row that has none, which is what an operator gives it."""
    return op_name(node) == "aten::nan_to_num" and all(each in (None, 0) for each in node.args[1:2])


def _multiplies(node: fx.Node) -> bool:
    return op_name(node) in ("aten::matmul", "aten::bmm", "aten::einsum")


def _moves(node: fx.Node) -> bool:
    """A movement of axes, or an expand to the shape a value has already, as decompositions of a product leave it."""
    return op_name(node) in {"aten::expand", *RESHAPES, *PERMUTES}
