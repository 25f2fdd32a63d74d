"""Read RMSNorm back from the nodes that compute it: x * rsqrt(mean(x^2) + epsilon) * (weight + offset)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from grape_compile.passes.graph import op_name, require_fake

_CASTS = {"aten::to", "aten::_to_copy", "aten::type_as"}
_EXCHANGES = {"aten::transpose", "aten::permute"}
_MOVES = _EXCHANGES | {"aten::view", "aten::reshape", "aten::unflatten"}


@dataclass(frozen=True)
class NormRead:
    """A norm as it was found: `result` of `source` by `weight`, and the `moves` beside it, in their order.

    The moves lead from the result of a norm to the tensor that turns, or from a tensor that turned to the source.
    """

    source: fx.Node
    weight: fx.Node
    epsilon: float
    offset: float
    result: fx.Node
    moves: tuple[fx.Node, ...] = ()


def norm_before(node: fx.Node) -> NormRead | None:
    """Read the norm whose result, moved, is a value that nothing else reads; or give up."""
    moves: list[fx.Node] = []
    result = node
    while op_name(node) in _MOVES | _CASTS:
        if len(node.users) != 1 or not _keeps_last(node):
            return None
        if op_name(node) in _MOVES:
            moves.insert(0, node)
        node = _first(node)
    if len(node.users) != 1:
        return None
    for read in _candidates(node):
        return replace(read, result=result, moves=tuple(moves))
    return None


def norm_after(node: fx.Node) -> NormRead | None:
    """Read the norm of a value that nothing else reads, whose result has the value's dtype; or give up."""
    for result in _results(node):
        for read in _candidates(result):
            moves: list[fx.Node] = []
            source = read.source
            while op_name(source) in _EXCHANGES and _keeps_last(source):
                moves.insert(0, source)
                source = _first(source)
            if source is node:
                end = _narrowed(result, node)
                if end is not None and _leads_to(node, end):
                    return replace(read, source=node, result=end, moves=tuple(moves))
    return None


def _results(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what is computed from a value in the few steps of a norm."""
    seen, near = {node}, [node]
    for _ in range(9):
        near = [user for each in near for user in each.users if user not in seen]
        near = list(dict.fromkeys(near))
        seen.update(near)
        yield from (each for each in near if op_name(each) in ("aten::mul", "aten::rms_norm"))


def _narrowed(result: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return a result where it has been cast to the dtype of `node`, or None where it never is."""
    wanted = require_fake(node).dtype
    while require_fake(result).dtype != wanted:
        (user,) = result.users if len(result.users) == 1 else (None,)
        if user is None or op_name(user) not in _CASTS:
            return None
        result = user
    return result


def _leads_to(node: fx.Node, result: fx.Node) -> bool:
    """Whether all that reads a value is part of the result."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        for user in stack.pop().users:
            if user is result or user in seen:
                continue
            if not user.users or len(seen) > 32:
                return False
            seen.add(user)
            stack.append(user)
    return True


def _keeps_last(node: fx.Node) -> bool:
    """Whether a move leaves the last axis the last; a view is looked at where its shapes are known."""
    rank = require_fake(node).dim()
    if op_name(node) == "aten::transpose":
        return rank - 1 not in {int(axis) % rank for axis in node.args[1:3]}  # type: ignore[arg-type] # numbers
    if op_name(node) == "aten::permute":
        order = node.args[1]
        return isinstance(order, list | tuple) and int(order[-1]) % rank == rank - 1  # type: ignore[arg-type] # numbers
    return require_fake(node).is_floating_point()


def _candidates(node: fx.Node) -> Iterator[NormRead]:
    if op_name(node) == "aten::rms_norm":
        source, shape, weight, epsilon = (*node.args, None, None)[:4]
        known = isinstance(source, fx.Node) and isinstance(weight, fx.Node) and isinstance(epsilon, float)
        if known and isinstance(shape, list | tuple) and len(shape) == 1:
            yield NormRead(source, weight, epsilon, 0.0, node)  # type: ignore[arg-type] # checked above
        return
    for normed, scaled in _factors(node):
        weight, offset = _weight(scaled)
        found = _normalised(_uncast(normed))
        if weight is not None and found is not None:
            yield NormRead(found[0], weight, found[1], offset, node)


def _weight(node: fx.Node) -> tuple[fx.Node | None, float]:
    """Return the vector behind weight + offset and the offset, or None where it is none."""
    node, offset = _uncast(node), 0.0
    if op_name(node) == "aten::add" and not node.kwargs:
        numbers = [each for each in node.args if isinstance(each, int | float)]
        vectors = [each for each in node.args if isinstance(each, fx.Node)]
        if len(numbers) != 1 or len(vectors) != 1:
            return None, 0.0
        node, offset = _uncast(vectors[0]), float(numbers[0])
    return (node if node.op in ("placeholder", "get_attr") else None), offset


def _normalised(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Return x and epsilon of x * rsqrt(mean(x^2, -1) + epsilon)."""
    for wide, factor in _factors(node):
        if op_name(factor) != "aten::rsqrt":
            continue
        total = _first(factor)
        if op_name(total) != "aten::add" or total.kwargs or not isinstance(total.args[1], float):
            continue
        mean = _first(total)
        if op_name(mean) != "aten::mean" or mean.kwargs or not _is_last_mean(mean):
            continue
        if _is_square(_first(mean), wide):
            return _uncast(wide), total.args[1]
    return None


def _is_last_mean(mean: fx.Node) -> bool:
    rank = require_fake(_first(mean)).dim()
    return len(mean.args) >= 3 and mean.args[1] in ([-1], [rank - 1], (-1,)) and mean.args[2] is True


def _is_square(node: fx.Node, of: fx.Node) -> bool:
    if op_name(node) == "aten::pow":
        return node.args == (of, 2)
    if op_name(node) == "aten::mul":
        return node.args == (of, of)
    return op_name(node) == "aten::square" and node.args == (of,)


def _factors(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    if op_name(node) != "aten::mul":
        return
    one, two = node.args
    if isinstance(one, fx.Node) and isinstance(two, fx.Node):
        yield one, two
        yield two, one


def _uncast(node: fx.Node) -> fx.Node:
    """Skip casts between floating dtypes."""
    while op_name(node) in _CASTS and require_fake(_first(node)).is_floating_point():
        if not require_fake(node).is_floating_point():
            return node
        node = _first(node)
    return node


def _first(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand
