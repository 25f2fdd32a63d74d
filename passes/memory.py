"""What a node does to memory: whether it is pure, what it writes into, which values share memory with which.

The schemas of operators say all of it: an alias between an argument and a result is a view, or may be one (`reshape`,
`contiguous`, `to`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """Name of the operator without its overload ("aten::mul"), "getitem", or ""."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else ""


def is_pure(node: fx.Node) -> bool:
    """True when the node neither mutates nor draws random numbers."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if (
        node.target is torch.ops.aten.detach_.default
    ):  # `torch.tensor(...)` in a forward: writes nothing anyone reads
        return True
    if node.target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags or _never_draws(node)


def _never_draws(node: fx.Node) -> bool:
    """A dropout that is switched off, and attention without one."""
    name = op_name(node)
    if name == "aten::dropout":
        return node.args[1] in (0, 0.0) or node.args[2] is False
    if name != "aten::scaled_dot_product_attention":
        return False
    return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) in (0, 0.0)


def writes(node: fx.Node) -> bool:
    """True when the node writes into one of its operands."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and bool(schema.is_mutable) and not is_pure(node)


#: May return their operand, or views of it, though their schemas do not say so.
_MAY_SHARE = {
    f"aten::{name}"
    for name in (
        "type_as", "dropout", "einsum", "lift_fresh", "positive", "_unsafe_view", "unsafe_split",
        "unsafe_split_with_sizes", "unsafe_chunk",
    )
}  # fmt: skip

#: Return a view of each of several operands.
_TOGETHER = {"aten::meshgrid", "aten::broadcast_tensors"}

#: Certainly views of their operand, be it of any strides.
CERTAIN_VIEWS = {
    f"aten::{name}"
    for name in (
        *("slice", "select", "view", "unsqueeze", "squeeze", "transpose", "permute", "t", "mT", "narrow"),
        *("expand", "unflatten", "view_as", "detach", "alias", "movedim", "swapaxes"),
    )
}


def written(write: fx.Node) -> list[fx.Node]:
    """The operands a node writes into."""
    schema = write.target._schema  # type: ignore[union-attr] # only operators with a schema write
    found: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = write.args[position] if position < len(write.args) else write.kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else [value]
            found += [each for each in values if isinstance(each, fx.Node)]
    return found


def is_data(node: fx.Node) -> bool:
    """`x.data`: the memory of x, unknown to autograd; no operator of ATen."""
    return node.op == "call_function" and node.target is torch._C._autograd._get_data_attr  # type: ignore[attr-defined]


def viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory the result of a pure node shares, or may share."""
    if is_data(node):
        return node.all_input_nodes[0]
    if node.op != "call_function" or not is_pure(node):
        return None
    if node.target is operator.getitem:
        source, which = node.args
        if isinstance(source, fx.Node) and op_name(source) in _TOGETHER:
            source = source.args[0][which]  # type: ignore[index] # a list of tensors and a number
        return source if isinstance(source, fx.Node) else None
    if op_name(node) in _MAY_SHARE:
        return node.all_input_nodes[0] if node.all_input_nodes else None
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and position < len(node.args):
            operand = node.args[position]
            return operand if isinstance(operand, fx.Node) else None
    return None


#: Composite operators, whose schemas do not tell whether they may return their operand, that never do.
_COMPOSITES_THAT_MAKE = {
    f"aten::{name}" for name in ("linear", "matmul", "layer_norm", "rms_norm", "cat", "stack")
}


def is_fresh(node: fx.Node) -> bool:
    """True when all that a pure operator returns stands in new memory, or is no tensor."""
    if node.op != "call_function" or not is_pure(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return True
    if node.target.namespace not in ("aten", "grape"):
        return False
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return op_name(node) in _COMPOSITES_THAT_MAKE or not node.target.has_kernel_for_dispatch_key(composite)


def owner(node: fx.Node) -> fx.Node:
    """The value whose memory a value is a view of."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def aliases(root: fx.Node) -> list[fx.Node]:
    """A value and all views of it."""
    found = [root]
    for node in found:
        together = [user for user in node.users if op_name(user) in _TOGETHER]
        users = dict.fromkeys([*node.users, *(each for user in together for each in user.users)])
        found += [user for user in users if viewed(user) is node and user not in found]
    return found


def late_readers(write: fx.Node, order: Mapping[fx.Node, int]) -> Iterator[fx.Node]:
    """Nodes behind a write that read what it wrote into by a name from before it."""
    for root in dict.fromkeys(map(owner, written(write))):
        for alias in aliases(root):
            if order.get(alias, -1) < order[write]:
                yield from (user for user in alias.users if order.get(user, -1) > order[write])
