"""The text of functions as syntax trees: collected with everything they call, renamed, and told by what they hold."""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

Function = ast.FunctionDef

# Names that stand for numbers, modules or truth values; upper-case names are constants. All others are tensors.
NUMBERS = {"length", "batch", "times", "scale", "least", "math", "torch", "nn", "functional", "self"}
TRUTHS = {"seen", "hidden"}
COMPLEX = {"numbers"}
WHOLE = {"steps", "clock", "positions", "places", "partner"}
_NO_TENSOR = {
    "size",
    "item",
    "dim",
    "numel",
    "split",
    "chunk",
    "unbind",
    "meshgrid",
    "finfo",
    "sqrt",
    "is_complex",
}
_NO_TENSOR_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "min", "max"}


@functools.cache
def _tree(function: Callable[..., Any]) -> str:
    tree = ast.parse(inspect.getsource(function)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    tree.returns = None
    for argument in tree.args.args:
        argument.annotation = None
    for number, step in enumerate(tree.body):
        if isinstance(step, ast.AnnAssign) and step.value is not None:
            tree.body[number] = ast.copy_location(ast.Assign([step.target], step.value), step)
    return ast.unparse(tree)


def collected(function: Callable[..., Any], suffix: str = "") -> dict[str, Function]:
    """The function and all functions of ours it calls, by name, callees first; every name ends in `suffix`."""
    found: dict[str, Function] = {}
    _collect(function, suffix, found)
    return found


def _collect(function: Callable[..., Any], suffix: str, found: dict[str, Function]) -> None:
    name = function.__name__ + suffix
    if name in found:
        return
    tree = ast.parse(_tree(function)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    called: dict[str, Callable[..., Any]] = {}

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            value = function.__globals__.get(node.id)
            if isinstance(value, types.FunctionType):
                called[node.id] = value
                return ast.Name(node.id + suffix, node.ctx)
            return node

        def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
            owner = function.__globals__.get(node.value.id) if isinstance(node.value, ast.Name) else None
            if isinstance(owner, types.ModuleType) and not owner.__name__.startswith(("torch", "math")):
                called[node.attr] = getattr(owner, node.attr)
                return ast.Name(node.attr + suffix, node.ctx)
            self.generic_visit(node)
            return node

    Rename().visit(tree)
    for callee in called.values():
        _collect(callee, suffix, found)
    tree.name = name
    found[name] = tree


def is_tensor(node: ast.expr) -> bool:
    """Whether an expression is surely a tensor."""
    if isinstance(node, ast.Name):
        return node.id.islower() and node.id not in NUMBERS
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return True
        return node.attr not in _NO_TENSOR_ATTRIBUTES and is_tensor(node.value)
    if isinstance(node, ast.Call):
        called = node.func
        if not isinstance(called, ast.Attribute) or called.attr in _NO_TENSOR:
            return False
        if isinstance(called.value, ast.Name) and called.value.id in ("torch", "functional"):
            return True
        return is_tensor(called.value)
    if isinstance(node, ast.BinOp):
        return is_tensor(node.left) or is_tensor(node.right)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and is_tensor(node.operand)
    return isinstance(node, ast.Subscript) and is_tensor(node.value)


def holds(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression reads one of these names."""
    return any(isinstance(each, ast.Name) and each.id in names for each in ast.walk(node))


def walk(function: Function) -> Iterator[ast.AST]:
    """Every node of a function's body in the order of the text."""
    stack: list[ast.AST] = list(reversed(function.body))
    while stack:
        node = stack.pop()
        yield node
        stack += reversed(list(ast.iter_child_nodes(node)))


def replaced(function: Function, old: ast.AST, new: ast.AST) -> None:
    """Put one expression in the place of another, in place."""

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is old else self.generic_visit(node)

    Replace().visit(function)


def expression(text: str, **parts: ast.expr) -> ast.expr:
    """A piece of code with expressions in the places of its names."""
    tree = ast.parse(text, mode="eval").body

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return parts.get(node.id, node)

    filled: ast.expr = Fill().visit(tree)
    return filled
