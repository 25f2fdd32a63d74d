"""Recognise a softmax, be it one operator or written out with its exponentials.

    exp(x) / sum(exp(x)),   exp(x - logsumexp(x)),   exp(log_softmax(x))

With entries of exp(x) set to zero in between, keys are hidden as by a fill of x with minus infinity. What is taken off
from x beforehand is the same along a row, and for whoever reads x to see. A number beside the sum is a sink:

    exp(x) / (c + sum(exp(x))) = exp(x - m) / (c exp(-m) + sum(exp(x - m))),   a sink of logit log(c)

One beside the sum of exp(x - max(x)) is none, as it moves with the row; such weights are no softmax, though no number
that is added to a row changes them either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from grape_compile.passes.graph import Unreadable, fake, op_name, require_fake
from grape_compile.passes.movement import ints, keeps_numbers, operand_of
from grape_compile.passes.score_terms import PASSED, constant

_SOFTMAXES = {"aten::softmax", "aten::_softmax", "aten::special_softmax"}
_LOG_SOFTMAXES = {"aten::log_softmax", "aten::_log_softmax", "aten::special_log_softmax"}


@dataclass(frozen=True)
class Softmax:
    """`weights` are the softmax of `scores` along the axis `dim`, but for the keys that masks set to zero behind it.

    A mask comes with its truth value that hides. `product` is what the exponentials were multiplied with before they
    were divided by their sum, and `weights` the quotient, where the model divides as late. A `sink` takes its share of
    every row. What is `nearly` a softmax depends on the scores less the largest of their row.
    """

    weights: fx.Node
    scores: fx.Node
    dim: int
    hidden: tuple[tuple[fx.Node, bool], ...] = ()
    product: fx.Node | None = None
    sink: float | None = None
    nearly: bool = False

    @property
    def is_operator(self) -> bool:
        """Whether one operator is given the scores and makes the weights of them."""
        return op_name(self.weights) in _SOFTMAXES


def softmax_at(node: fx.Node) -> Softmax | None:
    """The softmax whose weights a node is."""
    name = op_name(node)
    try:
        if name in _SOFTMAXES:
            return _of(node, node)
        if name == "aten::exp":
            return _of_logarithms(node)
        return _quotient(node) if name == "aten::div" and "rounding_mode" not in node.kwargs else None
    except Unreadable:
        return None


def _of(weights: fx.Node, softmax: fx.Node) -> Softmax | None:
    scores, dim = operand_of(softmax, 0), softmax.args[1]
    return Softmax(weights, scores, dim % require_fake(scores).dim()) if isinstance(dim, int) else None


def _of_logarithms(node: fx.Node) -> Softmax | None:
    inside = _passed(operand_of(node, 0))
    if op_name(inside) in _LOG_SOFTMAXES:
        return _of(node, inside)
    if op_name(inside) != "aten::sub" or inside.kwargs:
        return None
    scores, total = operand_of(inside, 0), operand_of(inside, 1)
    dim = _reduced(total, "aten::logsumexp", scores)
    return None if dim is None else Softmax(node, scores, dim)


def _quotient(node: fx.Node) -> Softmax | None:
    above, below = _passed(operand_of(node, 0)), operand_of(node, 1)
    parts, hidden = _exponentials(above)
    if op_name(parts) == "aten::exp":
        dim, scores = _reduced(below, "aten::sum", above), operand_of(parts, 0)
        if dim is None:
            return _beside_a_number(node, above, scores, hidden)
        return Softmax(node, scores, dim, hidden)
    if op_name(above) not in ("aten::matmul", "aten::bmm"):
        return None
    weights = _passed(operand_of(above, 0))
    parts, hidden = _exponentials(weights)
    if op_name(parts) != "aten::exp":
        return None
    dim, rank = _reduced(below, "aten::sum", weights), require_fake(weights).dim()
    same = require_fake(node).dim() == rank and dim == rank - 1
    return Softmax(node, operand_of(parts, 0), rank - 1, hidden, above) if same else None


def _beside_a_number(
    node: fx.Node, above: fx.Node, scores: fx.Node, hidden: tuple[tuple[fx.Node, bool], ...]
) -> Softmax | None:
    """The quotient of exponentials and their sum with something added to it, or raised to it."""
    below = _passed(operand_of(node, 1))
    raised = op_name(below) in ("aten::clamp", "aten::clamp_min", "aten::maximum")
    if not raised and (op_name(below) != "aten::add" or below.kwargs):
        return None
    dims = [_reduced(each, "aten::sum", above) for each in below.all_input_nodes if fake(each) is not None]
    if not dims or len(found := [dim for dim in dims if dim is not None]) != 1:
        return None
    (dim,) = found
    number = constant(below.args[1]) if len(dims) == 1 and len(below.args) > 1 else None
    shifted = _less_its_largest(scores, dim)
    if shifted is None:
        sink = number is not None and number > 0 and not raised
        return Softmax(node, scores, dim, hidden, sink=math.log(number)) if sink and number else None
    plain, largest = shifted
    weight = _of_the_largest(below, largest) if len(dims) == 2 and not raised else None
    if weight is not None:
        return Softmax(node, plain, dim, hidden, sink=math.log(weight))
    read = {user for user in plain.users if op_name(user) != "aten::_assert_tensor_metadata"}
    alone = read <= {_passed(scores), _reducing(largest)}
    return Softmax(node, plain, dim, nearly=True) if number is not None and alone and not hidden else None


def _less_its_largest(node: fx.Node, dim: int) -> tuple[fx.Node, fx.Node] | None:
    """The x and the max(x) of x - max(x) along an axis."""
    node = _passed(node)
    alpha, tensors = node.kwargs.get("alpha", 1), all(isinstance(each, fx.Node) for each in node.args)
    if op_name(node) not in ("aten::sub", "aten::add") or not tensors or not isinstance(alpha, int | float):
        return None
    second = -alpha if op_name(node) == "aten::sub" else alpha
    one, other = _signed(operand_of(node, 0), 1), _signed(operand_of(node, 1), second)
    if {one[1], other[1]} != {1, -1}:
        return None
    (plain, _), (largest, _) = (one, other) if one[1] == 1 else (other, one)
    behind = _reducing(largest)
    given = behind.args
    along = ints(given[1]) if len(given) > 2 and isinstance(given[1], int | list | tuple) else []
    largest_of = op_name(behind) in ("aten::amax", "aten::max") and given[0] is plain and given[2:] == (True,)
    rank = require_fake(plain).dim()
    return (plain, largest) if largest_of and [each % rank for each in along] == [dim] else None


def _signed(node: fx.Node, factor: float) -> tuple[fx.Node, float]:
    """A value without its sign, and the factor with it."""
    return (operand_of(node, 0), -factor) if op_name(node) == "aten::neg" else (node, factor)


def _reducing(node: fx.Node) -> fx.Node:
    """The operator that a largest score comes from, its gradient cut off or not."""
    while op_name(node) == "aten::detach":
        node = operand_of(node, 0)
    return operand_of(node, 0) if op_name(node) == "getitem" and node.args[1] == 0 else node


def _of_the_largest(below: fx.Node, largest: fx.Node) -> float | None:
    """The number c of c exp(-m), which is added to a sum, for m this largest score."""
    for term in below.all_input_nodes:
        number, inner = 1.0, _passed(term)
        if op_name(inner) == "aten::mul" and isinstance(inner.args[1], int | float):
            number, inner = float(inner.args[1]), operand_of(inner, 0)
        power = operand_of(inner, 0) if op_name(inner) == "aten::exp" else None
        if power is not None and op_name(power) == "aten::neg" and power.args[0] is largest and number > 0:
            return number
    return None


def _exponentials(node: fx.Node) -> tuple[fx.Node, tuple[tuple[fx.Node, bool], ...]]:
    """What is behind zeros that were filled in, and where they were."""
    hidden: list[tuple[fx.Node, bool]] = []
    while True:
        name, args = op_name(node), node.args
        if name in PASSED and keeps_numbers(node):
            node = operand_of(node, 0)
        elif name == "aten::masked_fill" and constant(args[2]) == 0:
            node, mask = operand_of(node, 0), operand_of(node, 1)
            hidden.append((mask, True))
        elif name == "aten::mul" and (truth := _truth_beside(node)) is not None:
            node = next(each for each in node.all_input_nodes if each is not truth)
            hidden.append((_uncast(truth), False))
        elif name == "aten::where" and constant(args[2]) == 0:
            node, mask = operand_of(node, 1), operand_of(node, 0)
            hidden.append((mask, False))
        else:
            return node, tuple(hidden)


def _truth_beside(product: fx.Node) -> fx.Node | None:
    """A factor that is one or zero: what is true or not, be it cast."""
    factors = [each for each in product.all_input_nodes if fake(each) is not None]
    masks = [each for each in factors if require_fake(_uncast(each)).dtype is torch.bool]
    return masks[0] if len(factors) == 2 and len(masks) == 1 else None


def _uncast(node: fx.Node) -> fx.Node:
    while op_name(node) in PASSED and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _reduced(node: fx.Node, name: str, source: fx.Node) -> int | None:
    """The one axis along which a value sums up `source`, an axis of one entry in the result."""
    node, added = _passed(node), None
    if op_name(node) == "aten::unsqueeze":
        added, node = node.args[1], _passed(operand_of(node, 0))
    rank = require_fake(source).dim()
    if op_name(node) != name or _passed(operand_of(node, 0)) is not _passed(source) or len(node.args) < 2:
        return None
    given = node.args[1]
    dims = [dim % rank for dim in ints(given)] if isinstance(given, int | list | tuple) else []
    keeps = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    if len(dims) != 1 or keeps is (added is not None) or fake(node) is None:
        return None
    return dims[0] if keeps or (isinstance(added, int) and added % rank == dims[0]) else None


def _passed(node: fx.Node) -> fx.Node:
    """A value before it was cast or copied."""
    while op_name(node) in PASSED and keeps_numbers(node):
        node = operand_of(node, 0)
    return node
