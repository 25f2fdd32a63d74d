"""Spoil one word of a program: the same text with one thing wrong. Whether that is another meaning is measured."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from generated.code import Function, expression, is_tensor, replaced, walk


@dataclass(frozen=True)
class Spoil:
    """The change `kind` at the `place`-th place of a part of the program ("query", "key", "value" or "bias")."""

    part: str
    kind: str
    place: int


def _sign(node: ast.AST, _: set[str]) -> list[ast.expr]:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub) or not is_tensor(node):
        return []
    return [ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)]


def _negation(node: ast.AST, _: set[str]) -> list[ast.expr]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and is_tensor(node):
        return [node.operand]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and is_tensor(node):
        return [ast.UnaryOp(ast.USub(), node)]
    return []


def _scale(node: ast.AST, _: set[str]) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and is_tensor(node):
        return [ast.BinOp(node, ast.Mult(), ast.Constant(1.1))]
    return []


def _factor(node: ast.AST, _: set[str]) -> list[ast.expr]:
    """A product that loses a factor."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and is_tensor(node):
        return [each for each in (node.left, node.right) if is_tensor(each)]
    return []


def _trigonometry(node: ast.AST, _: set[str]) -> list[ast.expr]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return []
    other = {"cos": "sin", "sin": "cos"}.get(node.func.attr)
    return [ast.Call(ast.Attribute(node.func.value, other, ast.Load()), node.args, [])] if other else []


def _name(node: ast.AST, names: set[str]) -> list[ast.expr]:
    """Another value in the place of one."""
    if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or node.id not in names:
        return []
    return [ast.Name(name, ast.Load()) for name in sorted(names - {node.id})]


def _number(node: ast.AST, _: set[str]) -> list[ast.expr]:
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return (
        [ast.Constant(value + 1), ast.Constant(value * 1.25)]
        if isinstance(value, float)
        else [ast.Constant(value + 1)]
    )


def _value(text: str) -> object:
    def change(node: ast.AST, names: set[str]) -> list[ast.expr]:
        named = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names
        return [expression(text, x=node)] if named and isinstance(node, ast.expr) else []

    return change


#: Changes that put something made of a value in its place.
_MADE = {
    "token before": _value("x.roll(1, -2)"),
    "another angle": _value("(x * 1.1)"),
    "square": _value("(x * x)"),
    "halves exchanged": _value("x.roll(x.shape[-1] // 2, -1)"),
    "reversed": _value("x.flip(-1)"),
}
VALUES = frozenset(_MADE)
CHANGES = {
    "sign": _sign,
    "negation": _negation,
    "scale": _scale,
    "factor": _factor,
    "cosine for sine": _trigonometry,
    "value": _name,
    "number": _number,
    **_MADE,
}
KINDS: tuple[str, ...] = tuple(CHANGES)


def apply(spoil: Spoil, functions: list[Function]) -> bool:
    """Spoil the functions in place; False where there is nothing of this kind to spoil."""
    change = CHANGES[spoil.kind]
    found = []
    for function in functions:
        nodes = list(walk(function))
        names = {node.id for node in nodes if isinstance(node, ast.Name) and is_tensor(node)} - {
            tree.name for tree in functions
        }
        found += [(function, node, new) for node in nodes for new in change(node, names)]  # type: ignore[operator]
    if not found:
        return False
    function, node, new = found[spoil.place % len(found)]
    replaced(function, node, new)
    return True
