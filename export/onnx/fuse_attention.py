"""Attention written out in ONNX nodes becomes one private node, which the target then has its own operator for.

What: `softmax(cap(scale * q k^T) + masks) v` over [B, H, T, D]; scale, soft cap, masks to add, masks to choose by.
Leaves alone: weights that something else reads, a softmax over anything but the keys, columns beside the keys (sinks),
    masks of unknown shape, scales that are computed.
Ensures: the same numbers but for rows that see no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from grape_compile.export.onnx.builder import BOOL, Builder, all_known, broadcast, dtype_of, sizes
from grape_compile.export.onnx.translate import FUSED, PRIVATE

#: A number that hides a key: as passes read it in a model's own code.
_NEVER = -1e4


@dataclass
class _Scores:
    """The product behind a softmax, and what happens to it on the way; `scale` is what stands before the cap."""

    product: ir.Node | None = None
    scale: float = 1.0
    cap: float = 0.0
    added: list[ir.Value] = field(default_factory=list)
    visible: list[ir.Value] = field(default_factory=list)


def fuse_attention(graph: ir.Graph) -> int:
    """Make one private node of every attention that is written out, and return how many there were."""
    count = 0
    for node in list(graph):
        if node.op_type == "Softmax" and node.domain == "" and _fuse(graph, node):
            count += 1
    return count


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    logits = softmax.inputs[0]
    if logits is None or logits.shape is None or len(logits.shape) != 4:
        return False
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return False
    scores, mixing = _read(logits), _mixing(softmax)
    if scores is None or scores.product is None or mixing is None:
        return False
    query, turned = (_unscaled(scores, operand) for operand in scores.product.inputs)
    value = mixing.inputs[1]
    if query is None or turned is None or value is None:
        return False
    if any(part.shape is None or len(part.shape) != 4 for part in (query, turned, value)):
        return False
    if not all_known([size for part in (query, value) for size in sizes(part)[1::2]]):
        return False
    builder = Builder(graph, mixing)
    key = _by_token(builder, turned)
    attributes = {"is_causal": 0, "scale": scores.scale, "cap": scores.cap}
    inputs = [query, key, value, _mask(builder, scores)]
    fused = ir.Node(PRIVATE, FUSED, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1)
    fused.metadata_props.update(mixing.metadata_props)
    old, new = mixing.outputs[0], fused.outputs[0]
    new.name, new.shape, new.type = f"{old.name}_fused", old.shape, old.type
    graph.insert_before(mixing, fused)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    return True


# -- before the softmax -----------------------------------------------------------------------------------------------


def _read(value: ir.Value) -> _Scores | None:
    """Follow the scores back to the product of query and key; None where something in between has no name here."""
    found = _Scores()
    while True:
        node = value.producer()
        if node is None or node.domain != "" or _read_elsewhere(value):
            return None
        if node.op_type == "MatMul":
            found.product = node
            return found
        step = _step(found, node)
        if step is None:
            return None
        value = step


def _step(found: _Scores, node: ir.Node) -> ir.Value | None:
    """Take one operator between product and softmax, and return what it acts on."""
    first = node.inputs[0]
    kind = node.op_type
    if kind in ("Cast", "Identity"):
        return first
    if kind == "Add":
        return _added(found, node)
    if kind == "Where":
        return _chosen(found, node)
    if kind in ("Mul", "Div"):
        return _scaled(found, node)
    if kind == "Tanh" and not found.cap and found.scale > 0:
        # Behind it stands the cap c of c tanh(s / c); scale * tanh(x) is that of s = scale * x.
        found.cap = found.scale
        return first
    return None


def _scaled(found: _Scores, node: ir.Node) -> ir.Value | None:
    left, right = node.inputs
    number = _number(right)
    inner = left
    if number is None and node.op_type == "Mul":
        number, inner = _number(left), right
    if number is None or inner is None or number == 0:
        return None
    found.scale *= number if node.op_type == "Mul" else 1.0 / number
    return inner


def _unscaled(found: _Scores, operand: ir.Value | None) -> ir.Value | None:
    """An operand of the product without the number it is multiplied by, which becomes part of the scale."""
    node = None if operand is None else operand.producer()
    if node is None or node.domain != "" or node.op_type not in ("Mul", "Div"):
        return operand
    bent = found.cap  # behind the product, where a factor in front of it does not reach
    found.cap = 0.0
    inner = _scaled(found, node)
    found.cap = bent
    return operand if inner is None else inner


def _added(found: _Scores, node: ir.Node) -> ir.Value | None:
    """The sum of scores and mask: the side that leads to a product is the scores."""
    if found.scale != 1.0 or found.cap:
        return None
    for scores, mask in (node.inputs, tuple(reversed(node.inputs))):
        if scores is None or mask is None or mask.shape is None or not _leads_to_product(scores):
            continue
        if not _may_be_mask(mask):
            return None
        found.added.append(mask)
        return scores
    return None


def _chosen(found: _Scores, node: ir.Node) -> ir.Value | None:
    """Scores where the mask is true, a number that hides elsewhere."""
    visible, scores, filled = node.inputs
    if found.scale != 1.0 or found.cap or visible is None or visible.shape is None:
        return None
    number = _number(filled)
    if number is None or number > _NEVER or not _may_be_mask(visible):
        return None
    found.visible.append(visible)
    return scores


def _may_be_mask(mask: ir.Value) -> bool:
    """Whether a value can be handed on as a mask: no axis of its own that the scores do not have."""
    return mask.shape is not None and len(mask.shape) <= 4


def _leads_to_product(value: ir.Value) -> bool:
    """Whether a value is a product of two activations, followed through factors and bends alone."""
    for _ in range(8):
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "MatMul":
            right = node.inputs[1]
            return right is not None and right.shape is not None and len(right.shape) == 4
        if node.op_type not in ("Mul", "Div", "Tanh", "Cast", "Add", "Where", "Identity"):
            return False
        following = node.inputs[1] if node.op_type == "Where" else node.inputs[0]
        if following is None:
            return False
        value = following
    return False


def _number(value: ir.Value | None) -> float | None:
    """The one number of a constant."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    if constant is None or constant.size != 1:
        return None
    return float(np.asarray(constant.numpy()).reshape(()))


def _read_elsewhere(value: ir.Value) -> bool:
    return value.is_graph_output() or len(list(value.uses())) != 1


# -- behind the softmax -----------------------------------------------------------------------------------------------


def _mixing(softmax: ir.Node) -> ir.Node | None:
    """The product with the values, where nothing else reads the weights."""
    weights = softmax.outputs[0]
    while True:
        uses = list(weights.uses())
        guard = _guard(weights)
        if guard is not None:
            weights = guard.outputs[0]
            continue
        if len(uses) != 1 or weights.is_graph_output():
            return None
        user, place = uses[0]
        if user.op_type == "MatMul" and place == 0:
            return user
        if user.op_type not in ("Cast", "Identity"):
            return None
        weights = user.outputs[0]


def _guard(weights: ir.Value) -> ir.Node | None:
    """What puts zeros in place of weights that are no numbers, as torch does for rows that see no key."""
    users = {user.op_type: user for user, _ in weights.uses()}
    if set(users) != {"IsNaN", "Where"} or len(list(weights.uses())) != 2 or weights.is_graph_output():
        return None
    asked, chosen = users["IsNaN"].outputs[0], users["Where"]
    if chosen.inputs[0] is not asked or _number(chosen.inputs[1]) != 0 or _read_elsewhere(asked):
        return None
    return chosen


# -- what the private node is given -----------------------------------------------------------------------------------


def _by_token(builder: Builder, turned: ir.Value) -> ir.Value:
    """Return the keys [B, H, T, D] from the operand [B, H, D, T] of the product."""
    node = turned.producer()
    order = [0, 1, 3, 2]
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        own = node.attributes.get_ints("perm", (3, 2, 1, 0))
        if node.inputs[0].shape is not None and len(own) == 4:
            turned, order = node.inputs[0], [own[at] for at in order]
    elif (whole := _turned_in_one(turned)) is not None:
        return whole
    return turned if order == [0, 1, 2, 3] else builder.transpose(turned, *order)


def _turned_in_one(turned: ir.Value) -> ir.Value | None:
    """The keys [B, H, T, D] that were seen as [B * H, T, D], transposed, and seen as [B, H, D, T]."""
    kinds, value = ("Reshape", "Transpose", "Reshape"), turned
    for kind in kinds:
        node = value.producer()
        if node is None or node.op_type != kind or node.inputs[0] is None or value.shape is None:
            return None
        if kind == "Transpose" and node.attributes.get_ints("perm", ()) != (0, 2, 1):
            return None
        value = node.inputs[0]
    if value.shape is None or len(value.shape) != 4:
        return None
    (batch, heads, tokens, width), own = sizes(value), sizes(turned)
    return value if own == (batch, heads, width, tokens) and None not in own else None


def _mask(builder: Builder, scores: _Scores) -> ir.Value | None:
    shown = _both(builder, scores.visible, "And")
    added = _both(builder, scores.added, "Add")
    if shown is None or added is None:
        return added if shown is None else shown
    hidden = builder.constant(float(np.finfo(dtype_of(added).numpy()).min) / 2, dtype_of(added))
    shape = broadcast(sizes(shown), sizes(added))
    return builder.op("Where", shown, added, hidden, dtype=dtype_of(added), shape=shape)


def _both(builder: Builder, masks: Sequence[ir.Value], kind: str) -> ir.Value | None:
    if not masks:
        return None
    first, *others = masks
    for mask in others:
        shape = broadcast(sizes(first), sizes(mask))
        first = builder.op(kind, first, mask, dtype=BOOL if kind == "And" else None, shape=shape)
    return first
