"""Read distances between query and key that are no plain difference: Euclidean (GRAPE App. G) and cut-off ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grape_compile.passes.addends import Addend, AddendReader
from grape_compile.passes.graph import fake, op_name
from grape_compile.passes.movement import ints, is_symbolic, operand_of
from grape_compile.passes.operands import Operand
from grape_compile.passes.score_terms import constant
from grape_compile.passes.scores import as_key
from grape_compile.passes.terms import Index

_MOST_AXES = 8


def places_of(reader: AddendReader, pair: Operand, lead: Index) -> tuple[Operand, ...]:
    """The views r_a along the keys with pair = |r_j - r_t| over all axes a; empty for anything else."""
    node = pair.node
    if op_name(node) in ("aten::linalg_vector_norm", "aten::norm"):
        apart = _along_last_axis(reader, node, pair, lead)
    elif op_name(node) == "aten::sqrt":
        apart = _of_squares(reader, pair, lead)
    else:
        return ()
    places = [_place(addends) for addends in apart]
    return tuple(view for view in places if view is not None) if None not in places else ()


def _along_last_axis(reader: AddendReader, node: fx.Node, pair: Operand, lead: Index) -> list[list[Addend]]:
    """The differences on every axis of a norm over the last one."""
    inner = operand_of(node, 0)
    value = fake(inner)
    given: dict[str, Any] = {
        **dict(zip(("self", "ord", "dim", "keepdim"), node.args, strict=False)),
        **node.kwargs,
    }
    dims, order = given.get("dim"), given.get("ord", given.get("p", 2))
    if (
        value is None
        or dims is None
        or order != 2
        or [dim % value.dim() for dim in ints(dims)] != [value.dim() - 1]
    ):
        return []
    at, count = reader.scores.along(pair, lead), value.shape[-1]
    if given.get("keepdim"):
        at = at[:-1]
    if is_symbolic(count) or count > _MOST_AXES:
        return []
    rows = lead[0]
    return [reader.elements(inner, (*at, torch.full_like(rows, axis)), lead) for axis in range(count)]


def _of_squares(reader: AddendReader, pair: Operand, lead: Index) -> list[list[Addend]]:
    """The differences whose squares add up below a root."""
    found = []
    for addend in reader.operand(pair, lead, operand_of(pair.node, 0)):
        if addend.number != 1.0 or len(addend.pairs) != 1 or addend.heads or addend.queries or addend.keys:
            return []
        square = addend.pairs[0]
        if not _is_square(square.node):
            return []
        found.append(reader.operand(square, lead, operand_of(square.node, 0)))
    return found


def _is_square(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "aten::mul":
        return node.args[0] is node.args[1]
    return name == "aten::square" or (name == "aten::pow" and node.args[1] in (2, 2.0))


def _place(apart: list[Addend]) -> Operand | None:
    """The place that is taken at the key and at the query, and subtracted."""
    keys = [addend for addend in apart if len(addend.keys) == 1 and not addend.queries]
    queries = [addend for addend in apart if len(addend.queries) == 1 and not addend.keys]
    if len(apart) != 2 or len(keys) != 1 or len(queries) != 1 or abs(keys[0].number) != 1.0:
        return None
    (key,), (query,) = keys, queries
    same = key.number == -query.number and as_key(query.queries[0]) == key.keys[0]
    return key.keys[0] if same and not any((key.heads, key.pairs, query.heads, query.pairs)) else None


def cut_off(node: fx.Node) -> int:
    """1 for max(x, 0) and -1 for min(x, 0): the sign of the x that are left as they are; 0 for anything else."""
    name, args = op_name(node), node.args[1:]
    if name == "aten::relu":
        return 1
    if name in _BOUNDS:
        return _BOUNDS[name] if len(args) == 1 and constant(args[0]) == 0 else 0
    given = dict(zip(("min", "max"), args, strict=False)) | node.kwargs
    bounds = [given.get("min"), given.get("max")] if name == "aten::clamp" else []
    if len(bounds) != 2 or bounds.count(None) != 1:
        return 0
    sign = 1 if bounds[1] is None else -1
    return sign if constant(bounds[0] if sign == 1 else bounds[1]) == 0 else 0


_BOUNDS = {"aten::clamp_min": 1, "aten::maximum": 1, "aten::clamp_max": -1, "aten::minimum": -1}
