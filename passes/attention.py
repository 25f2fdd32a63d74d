"""Read an attention layer around its softmax: query, key, value, scale, and everything added to the scores.

What: `softmax(scale * q k^T + terms) v`, written with matmul, bmm, baddbmm, einsum or `scaled_dot_product_attention`,
    with axes in any order, heads folded into the batch or split into groups that share a key; a soft cap on the scaled
    product below all terms, and sinks behind the keys.
Leaves alone: layers whose weights pass a non-linear operation. Of weights that leave the layer or are dropped out at
    random it is said that they have to stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from grape_compile.passes.axes import Axes, Layout, Letters
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import PERMUTES, RESHAPES
from grape_compile.passes.products import Product, layout_of, mixed, product_of
from grape_compile.passes.safe_softmax import guarded
from grape_compile.passes.score_terms import PASSED, ScoreTerm, split_terms
from grape_compile.passes.score_walk import ScoreWalk
from grape_compile.passes.sinks import joined_sinks, without_sinks
from grape_compile.passes.softmaxes import Softmax, softmax_at

FUSED: Final = "aten::scaled_dot_product_attention"


@dataclass
class Attention:
    """One attention layer: `output` is its value; `axes` are those of scores, query, key, value and output.

    `product` is the one of query and key, or the fused call; `floored` scores are raised to a lowest number.

    A `plain` one is wanted as an operator even where it adds nothing. `stays` says why its weights have to stay the
    model's own: they are dropped out at random by `drops`, or used elsewhere, or `nearly` a softmax. The softmax is
    `given` its scores. `sinks` are a value, or the logit of all heads.
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
    sinks: fx.Node | float | None = None
    floored: bool = False
    plain: bool = False
    stays: str = ""
    drops: list[fx.Node] = field(default_factory=list)
    given: fx.Node | None = None
    nearly: bool = False

    @property
    def is_fused(self) -> bool:
        return op_name(self.softmax) == FUSED


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
    if op_name(node) == FUSED:
        return _fused(program, node)
    softmax = softmax_at(node)
    return None if softmax is None else _Reader(program).around(softmax)


def _adds(layer: Attention) -> bool:
    """Whether a layer has terms, be it in a mask of a fused call that is added, which a choice of keys is not."""
    return bool(layer.terms) and not (layer.is_fused and all(term.dead is False for term in layer.terms))


def fused_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of `scaled_dot_product_attention`, by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _fused(program: Program, node: fx.Node) -> Attention | None:
    """A call of `scaled_dot_product_attention`."""
    given = fused_arguments(node)
    query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
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
            dropped = f"attention weights are dropped out with probability {given['dropout_p']}"
            if layer.axes["scores"] == layer.layout.roles[:4]:
                layer.stays, layer.drops = dropped, [node]
            else:
                layer.obstacle = dropped
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


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.walk = ScoreWalk(program)
        self.column: fx.Node | None = None
        self.stays = ""
        self.drops: list[fx.Node] = []

    def around(self, softmax: Softmax) -> Attention | None:
        scores = softmax.scores
        if self.program.taints[scores] is not Taint.DATA:
            return None
        rank = require_fake(scores).dim()
        if rank < 3:
            return None
        joined = joined_sinks(self.program, scores) if rank == 4 and softmax.dim == 3 else None
        if joined is not None:
            if softmax.nearly or softmax.sink is not None:
                return None
            scores, self.column = joined.scores, joined.sinks
        core = self.walk.read(scores, 1.0)
        if core is None or not self._hide(softmax, core.axes):
            return None
        key = self.walk.letters.split(core.axes[softmax.dim])
        if len(key) != 1:
            return None
        if softmax.product is not None:
            operands = softmax.product.args
            output, value = softmax.weights, operands[1]
            both = mixed(core.axes, value, self.walk.letters) if isinstance(value, fx.Node) else None
        else:
            consumed = self._consumer(softmax, core.axes, key[0])
            if consumed is None:
                return None
            output, value, both = consumed
        if both is None or not isinstance(value, fx.Node):
            return None
        layer = _layer(
            self.program, self.walk.letters, core.product.seen_from(key[0], self.walk.letters), softmax.weights,
            (core.axes, *both), value, output, core.scale, self.walk.terms,
        )  # fmt: skip
        if layer is not None:
            sinks = softmax.sink if self.column is None else self.column
            if sinks is not None and layer.axes["scores"] != layer.layout.roles[:4]:
                self.walk.hinder("sinks stand beside scores whose axes are not batch, head, query and key")
            if sinks is not None and any(
                self._is_of_rows(term, rank - softmax.dim) for term in self.walk.terms
            ):
                self.walk.hinder(
                    "a number of each row, made of activations, is added to its scores beside a sink"
                )
            if softmax.nearly:
                self.stays = self.stays or (
                    "a number beside the sum of its exponentials makes its weights other than a softmax"
                )
            elif self.stays and not softmax.is_operator:
                self.walk.hinder(self.stays)
            layer.obstacle, layer.cap, layer.sinks = self.walk.obstacle, self.walk.cap, sinks
            layer.floored, layer.nearly = self.walk.floored, softmax.nearly
            layer.stays, layer.drops, layer.given = self.stays, self.drops, scores
        return layer

    def _is_of_rows(self, term: ScoreTerm, place: int) -> bool:
        """Whether an activation is added to whole rows, keys being the axis at this place from the end."""
        shape = require_fake(term.node).shape
        along = len(shape) >= place and str(shape[-place]) != "1"
        return self.program.taints[term.node] is Taint.DATA and not along

    def _hide(self, softmax: Softmax, axes: Axes) -> bool:
        """Masks that set weights to zero hide keys as fills of the scores do."""
        for mask, dead in softmax.hidden:
            if self.program.taints[mask] >= Taint.PARAMETER:
                return False
            self.walk.terms.insert(0, ScoreTerm(mask, dead=dead, value=-torch.inf, whole=True, axes=axes))
        return True

    # -- behind the softmax ------------------------------------------------------------------------------------------

    def _consumer(
        self, softmax: Softmax, axes: Axes, key: str
    ) -> tuple[fx.Node, fx.Node, tuple[Axes, Axes] | None] | None:
        """The product with the values, the values and the axes of both, when nothing else looks at the weights."""
        node, whole = guarded(softmax.weights, softmax.scores), self.column is not None
        while True:
            users = [user for user in node.users if op_name(user) != "aten::_assert_tensor_metadata"]
            if not users:
                return None
            if whole and len(users) == 1 and without_sinks(users[0], node):
                node, whole = users[0], False
                continue
            product = next((user for user in users if _multiplies(user)), None)
            if len(users) > 1:
                self.stays = self.stays or (
                    "the attention weights are used elsewhere (returned, masked or averaged)"
                )
            if product is not None:
                given = product.args[1] if op_name(product) == "aten::einsum" else product.args
                assert isinstance(given, list | tuple)
                values = [each for each in given if each is not node]
                if whole or len(values) != 1 or not isinstance(values[0], fx.Node):
                    return None  # the sinks have values, or the weights are multiplied with themselves
                return product, values[0], mixed(axes, values[0], self.walk.letters, product, node, key)
            user = users[0]
            if op_name(user) == "aten::dropout":
                if user.args[2] and user.args[1]:
                    self.drops.append(user)
                    self.stays = self.stays or (
                        f"attention weights are dropped out with probability {user.args[1]} in training"
                    )
            elif op_name(user) not in PASSED and not _is_safe(user):
                found = self.walk.letters.moved(user, axes) if _moves(user) else None
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
