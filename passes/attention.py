"""Read an attention layer around its softmax: query, key, value, scale, and everything added to the scores.

What: `softmax(scale * q k^T + terms) v`, written with matmul, bmm, baddbmm or `scaled_dot_product_attention`; a soft
    cap on the scaled product below all terms, and sinks behind the keys.
Leaves alone: layers whose weights leave the layer, are dropped out at random, or pass a non-linear operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grape_compile.passes.contractions import einsum_letters
from grape_compile.passes.graph import Program, Taint, fake, op_name, require_fake
from grape_compile.passes.safe_softmax import guarded
from grape_compile.passes.score_terms import PASSED, ScoreTerm, constant, split_terms
from grape_compile.passes.sinks import joined_sinks, without_sinks

_RESHAPED = {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten"}
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
    """One attention layer: `output` is its value, `scores` the [B, H, Tq, Tk] argument of the softmax.

    A `plain` one is wanted as an operator even where it adds nothing.
    """

    softmax: fx.Node
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_transposed: bool
    scale: float
    terms: list[ScoreTerm] = field(default_factory=list)
    is_causal: bool = False
    obstacle: str = ""
    batch_heads: tuple[Any, Any] | None = None
    orders: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cap: float | None = None
    sinks: fx.Node | None = None
    plain: bool = False

    def is_folded(self, term: ScoreTerm) -> bool:
        """Whether a term's first axis is [B * H]: it was added below the view to four axes, or there is none."""
        return term.folded or (self.batch_heads is None and require_fake(self.query).dim() == 3)

    def size(self, part: str, axis: int) -> Any:
        """Size of an axis of query, key or value, counted as in [B, H, T, D] whatever order the model has."""
        shape = require_fake({"query": self.query, "key": self.key, "value": self.value}[part]).shape
        order = self.orders.get(part)
        return shape[axis] if order is None else shape[order[axis]]


def find_attention(program: Program, plain: Callable[[Attention], bool] = lambda _: False) -> list[Attention]:
    """Every attention layer whose scores carry terms beside the product of query and key, and `plain` ones."""
    found = []
    for node in program.graph.nodes:
        name = op_name(node)
        if name in ("aten::softmax", "aten::_softmax", "aten::special_softmax"):
            layer = _Reader(program).around_softmax(node)
        elif name == "aten::scaled_dot_product_attention":
            layer = _fused(program, node)
        else:
            continue
        if layer is not None:
            layer.plain = plain(layer)
            found += [layer] if layer.plain or _adds(layer) else []
    return found


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
    rank = require_fake(query).dim()
    if rank < 4:
        return None
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return None
    width = int(require_fake(query).shape[-1])
    layer = Attention(
        node, node, query, key, value, False, float(scale) if scale is not None else width**-0.5
    )
    layer.is_causal = bool(given.get("is_causal", False))
    if mask is not None:
        chosen = require_fake(mask).dtype is torch.bool
        hidden = ScoreTerm(mask, dead=False, value=-torch.inf)
        layer.terms = [hidden] if chosen else split_terms(program, mask, 1.0)
    if rank > 4:
        layer.obstacle = _too_many_axes(rank)
    elif given.get("dropout_p", 0.0):
        layer.obstacle = f"attention weights are dropped out with probability {given['dropout_p']}"
    return layer


def _too_many_axes(rank: int) -> str:
    """Why a layer cannot be an operator."""
    return f"its scores have {rank} axes, where an operator takes batch, head, query and key"


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.terms: list[ScoreTerm] = []
        self.obstacle = ""
        self.batch_heads: tuple[Any, Any] | None = None
        self.folded = False
        self.orders: dict[str, tuple[int, ...]] = {}
        self.cap: float | None = None
        self.sinks: fx.Node | None = None

    def around_softmax(self, softmax: fx.Node) -> Attention | None:
        scores = softmax.args[0]
        if not isinstance(scores, fx.Node) or self.program.taints[scores] is not Taint.DATA:
            return None
        rank = require_fake(scores).dim()
        if rank < 3 or softmax.args[1] not in (-1, rank - 1):
            return None
        if rank > 4:
            self.obstacle = _too_many_axes(rank)
        joined = joined_sinks(self.program, scores) if rank == 4 else None
        if joined is not None:
            scores, self.sinks = joined.scores, joined.sinks
        core = self._scores(scores, 1.0)
        if core is None:
            return None
        query, key, transposed, scale = core
        consumed = self._consumer(softmax)
        if consumed is None:
            return None
        output, value = consumed
        return Attention(
            softmax,
            output,
            query,
            key,
            value,
            transposed,
            scale,
            self.terms,
            False,
            self.obstacle,
            self.batch_heads,
            self.orders,
            self.cap,
            self.sinks,
        )

    # -- before the softmax ------------------------------------------------------------------------------------------

    def _scores(self, node: fx.Node, factor: float) -> tuple[fx.Node, fx.Node, bool, float] | None:
        """Walk from the softmax back to the product of query and key, collecting what was added on the way."""
        name, args = op_name(node), node.args
        operands = [arg for arg in args if isinstance(arg, fx.Node) and fake(arg) is not None]
        data = [operand for operand in operands if self.program.taints[operand] is Taint.DATA]
        if name in ("aten::matmul", "aten::bmm", "aten::baddbmm"):
            return self._product(node, name, factor)
        if name == "aten::einsum":
            return self._contraction(node, factor)
        if name in ("aten::add", "aten::sub") and data:
            return self._sum(node, name, data, factor)
        if len(data) != 1:
            return None
        if name in PASSED:
            return self._scores(data[0], factor)
        if name == "aten::neg":
            return self._scores(data[0], -factor)
        if name in _RESHAPED:
            return self._unfold(node, data[0], factor)
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

    def _capped(self, data: fx.Node, factor: float) -> tuple[fx.Node, fx.Node, bool, float] | None:
        """`factor * tanh(s q k^T)` is the product scaled by `factor * s` under a soft cap of that size."""
        above = len(self.terms)
        self.cap = abs(factor)
        core = self._scores(data, 1.0)
        if core is None:
            return None
        if len(self.terms) > above:
            self._hinder("something is added to the scores below their soft cap, not above it")
        query, key, transposed, scale = core
        return query, key, transposed, factor * scale

    def _hinder(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle

    def _sum(
        self, node: fx.Node, name: str, data: list[fx.Node], factor: float
    ) -> tuple[fx.Node, fx.Node, bool, float] | None:
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
        return list(self.terms), self.obstacle, self.batch_heads, self.folded, dict(self.orders), self.cap

    def _restore(self, state: tuple[Any, ...]) -> None:
        terms, self.obstacle, self.batch_heads, self.folded, orders, self.cap = state
        self.terms, self.orders = list(terms), dict(orders)

    def _added(
        self, node: fx.Node, name: str, data: fx.Node, factor: float
    ) -> tuple[fx.Node, fx.Node, bool, float] | None:
        other = node.args[1] if node.args[0] is data else node.args[0]
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type] # a number by the operator's schema
        second = -alpha if name == "aten::sub" else alpha
        own, others = (second, 1.0) if node.args[1] is data else (1.0, second)
        if isinstance(other, fx.Node) and fake(other) is not None:
            self.terms += split_terms(self.program, other, factor * others, self.folded)
        elif isinstance(other, int | float):
            if self.cap is not None:
                self._hinder("a number is added to the scores below their soft cap")
        else:
            return None
        return self._scores(data, factor * own)

    def _masked(
        self, node: fx.Node, name: str, data: fx.Node, factor: float
    ) -> tuple[fx.Node, fx.Node, bool, float] | None:
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
        self.terms.append(ScoreTerm(mask, dead=dead, value=value * factor, folded=self.folded, whole=True))
        return self._scores(data, factor)

    def _unfold(
        self, node: fx.Node, data: fx.Node, factor: float
    ) -> tuple[fx.Node, fx.Node, bool, float] | None:
        """The view from [B * H, Tq, Tk] to [B, H, Tq, Tk]."""
        shape, inner = require_fake(node).shape, require_fake(data).shape
        if len(shape) == 4 and len(inner) == 3:
            self.batch_heads, self.folded = (shape[0], shape[1]), True
        elif len(shape) != len(inner) and len(shape) <= 4:
            return None
        return self._scores(data, factor)

    def _product(
        self, node: fx.Node, name: str, factor: float
    ) -> tuple[fx.Node, fx.Node, bool, float] | None:
        operands = list(node.args)
        if name == "aten::baddbmm":
            bias = operands.pop(0)
            numbers = [node.kwargs.get(key, 1) for key in ("beta", "alpha")]
            if not all(isinstance(number, int | float) for number in numbers):
                return None
            beta, alpha = (float(number) for number in numbers)  # type: ignore[arg-type] # checked above
            if beta != 0 and isinstance(bias, fx.Node):
                self.terms += split_terms(self.program, bias, factor * beta, self.folded)
            factor *= alpha
        query, key = operands[0], operands[1]
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
            return None
        swapped = self._untransposed(key)
        return query, swapped or key, swapped is None, factor

    def _contraction(self, node: fx.Node, factor: float) -> tuple[fx.Node, fx.Node, bool, float] | None:
        """`einsum("bhtd,bhjd->bhtj", query, key)`, in any order of the operands' axes."""
        letters = einsum_letters(node)
        if letters is None:
            return None
        (query, key), (left, right, out) = letters
        if (
            len(out) != 4
            or len(left) != 4
            or len(right) != 4
            or set(left) & set(right) - set(out) != set(left) - set(out)
        ):
            return None
        if out[2] in right or out[3] in left:
            return None
        (summed,) = set(left) - set(out)
        self.orders["query"] = tuple(left.index(letter) for letter in (*out[:3], summed))
        self.orders["key"] = tuple(right.index(letter) for letter in (*out[:2], out[3], summed))
        return query, key, False, factor

    def _untransposed(self, key: fx.Node) -> fx.Node | None:
        rank = require_fake(key).dim()
        if op_name(key) in ("aten::transpose", "aten::swapaxes", "aten::swapdims"):
            dims = {int(dim) % rank for dim in key.args[1:3]}  # type: ignore[arg-type] # dimensions are ints
            if dims == {rank - 1, rank - 2} and isinstance(key.args[0], fx.Node):
                return key.args[0]
        return None

    # -- behind the softmax ------------------------------------------------------------------------------------------

    def _consumer(self, softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The product with the values, and the values, when nothing else looks at the weights."""
        node, whole = guarded(softmax), self.sinks is not None
        while True:
            users = [user for user in node.users if op_name(user) != "aten::_assert_tensor_metadata"]
            if not users:
                return None
            if whole and len(users) == 1 and without_sinks(users[0], node):
                node, whole = users[0], False
                continue
            product = next(
                (
                    user
                    for user in users
                    if op_name(user) in ("aten::matmul", "aten::bmm") and user.args[0] is node
                ),
                None,
            )
            contraction = next((user for user in users if op_name(user) == "aten::einsum"), None)
            if len(users) > 1:
                self._hinder("the attention weights are used elsewhere (returned, masked or averaged)")
            if whole and (product is not None or contraction is not None):
                return None  # the sinks have values
            if product is not None:
                value = product.args[1]
                return (product, value) if isinstance(value, fx.Node) else None
            if contraction is not None:
                return self._mixed_values(contraction, node)
            user = users[0]
            if op_name(user) == "aten::dropout":
                if user.args[2] and user.args[1]:
                    self._hinder(
                        f"attention weights are dropped out with probability {user.args[1]} in training"
                    )
            elif op_name(user) not in PASSED | _RESHAPED and not _keeps_shape(user):
                return None
            node = user

    def _mixed_values(self, node: fx.Node, weights: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """`einsum("bhtj,bhjd->bhtd", weights, value)`, the result in any order of axes."""
        letters = einsum_letters(node)
        if letters is None or letters[0][0] is not weights:
            return None
        (_, value), (left, right, out) = letters
        if (
            len(left) != 4
            or len(right) != 4
            or set(out) != set(left[:3]) | (set(right) - set(left))
            or len(out) != 4
        ):
            return None
        (width,) = set(right) - set(left)
        self.orders["value"] = tuple(right.index(letter) for letter in (*left[:2], left[3], width))
        self.orders["output"] = tuple((*left[:3], width).index(letter) for letter in out)
        return node, value


def _keeps_shape(node: fx.Node) -> bool:
    """An expand to the shape the value has already, as decompositions of a product leave it."""
    before, after = fake(node.args[0]) if isinstance(node.args[0], fx.Node) else None, fake(node)
    if op_name(node) != "aten::expand" or before is None or after is None:
        return False
    return list(map(str, before.shape)) == list(map(str, after.shape))
