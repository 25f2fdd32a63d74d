"""Edits that change the text of a program and nothing of its meaning: one thing, at one place."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from generated.code import COMPLEX, TRUTHS, WHOLE, Function, expression, holds, is_tensor, replaced, walk

# What an edit of an expression does with it: the new expression, or None where it does not apply.
Rule = Callable[[ast.AST], ast.expr | None]


@dataclass(frozen=True)
class Edit:
    """The edit `kind` at the `place`-th place of the program it applies to, counted round."""

    kind: str
    place: int


def _binary(node: ast.AST, kind: type[ast.operator]) -> tuple[ast.expr, ast.expr] | None:
    """The operands of an operation of this kind on tensors."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, kind) or not is_tensor(node):
        return None
    return node.left, node.right


def _commuted(kind: type[ast.operator]) -> Rule:
    def rule(node: ast.AST) -> ast.expr | None:
        found = _binary(node, kind)
        return ast.BinOp(found[1], kind(), found[0]) if found else None

    return rule


def _rewritten(kind: type[ast.operator], text: str, *, both: bool = False) -> Rule:
    """`left` and `right` of an operation in another form; `both`: both have to be tensors, and no truth values."""

    def rule(node: ast.AST) -> ast.expr | None:
        found = _binary(node, kind)
        if found is None or (both and not all(map(is_tensor, found))):
            return None
        return expression(text, left=found[0], right=found[1])

    return rule


def _negation(text: str) -> Rule:
    def rule(node: ast.AST) -> ast.expr | None:
        if not isinstance(node, ast.UnaryOp) or not isinstance(node.op, ast.USub) or not is_tensor(node):
            return None
        return expression(text, x=node.operand)

    return rule


def _distributed(node: ast.AST) -> ast.expr | None:
    found = _binary(node, ast.Mult)
    for one, other in (found, found[::-1]) if found else ():
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Add | ast.Sub) and is_tensor(one):
            left, right = ast.BinOp(one.left, ast.Mult(), other), ast.BinOp(one.right, ast.Mult(), other)
            return ast.BinOp(left, one.op, right)
    return None


def _associated(node: ast.AST) -> ast.expr | None:
    """(a * b) * c as a * (b * c)."""
    found = _binary(node, ast.Mult)
    inner = _binary(found[0], ast.Mult) if found else None
    if found is None or inner is None:
        return None
    return ast.BinOp(inner[0], ast.Mult(), ast.BinOp(inner[1], ast.Mult(), found[1]))


def _multiplied_and_added(node: ast.AST) -> ast.expr | None:
    found = _binary(node, ast.Add)
    if found is None or holds(found[0], WHOLE) or holds(found[1], WHOLE):
        return None
    product = _binary(found[1], ast.Mult)
    if product is None or not all(map(is_tensor, (found[0], *product))):
        return None
    return expression("torch.addcmul(a, b, c)", a=found[0], b=product[0], c=product[1])


def _bounds(node: ast.AST) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """The tensor, start and stop of `x[..., start:stop]`."""
    if (
        not isinstance(node, ast.Subscript)
        or not is_tensor(node.value)
        or not isinstance(node.slice, ast.Tuple)
    ):
        return None
    if len(node.slice.elts) != 2 or not isinstance(cut := node.slice.elts[1], ast.Slice):
        return None
    dots = node.slice.elts[0]
    if not isinstance(dots, ast.Constant) or dots.value is not ... or not isinstance(node.ctx, ast.Load):
        return None
    return (node.value, cut.lower, cut.upper) if cut.lower and cut.upper and cut.step is None else None


def _cut(text: str) -> Rule:
    def rule(node: ast.AST) -> ast.expr | None:
        found = _bounds(node)
        return expression(text, x=found[0], a=found[1], b=found[2]) if found else None

    return rule


def _method(name: str, text: str) -> Rule:
    """`x.name()` in another form."""

    def rule(node: ast.AST) -> ast.expr | None:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.args:
            return None
        if node.func.attr != name or not is_tensor(node.func.value):
            return None
        return expression(text, x=node.func.value)

    return rule


RULES: dict[str, Rule] = {
    "commute a product": _commuted(ast.Mult),
    "commute a sum": _commuted(ast.Add),
    "name a product": _rewritten(ast.Mult, "torch.mul(left, right)", both=True),
    "name a sum": _rewritten(ast.Add, "torch.add(left, right)", both=True),
    "name a difference": _rewritten(ast.Sub, "torch.sub(left, right)", both=True),
    "add the negative": _rewritten(ast.Sub, "left + -right", both=True),
    "add the negative first": _rewritten(ast.Sub, "-right + left", both=True),
    "add minus one times": _rewritten(ast.Sub, "torch.add(left, right, alpha=-1)", both=True),
    "reverse a difference": _rewritten(ast.Sub, "-(right - left)", both=True),
    "subtract the negative": _rewritten(ast.Add, "left - -right", both=True),
    "negate both factors": _rewritten(ast.Mult, "-left * -right", both=True),
    "negate by name": _negation("torch.neg(x)"),
    "negate by a factor": _negation("x * -1"),
    "negate by a quotient": _negation("x / -1"),
    "negate from zero": _negation("0 - x"),
    "distribute a product": _distributed,
    "associate a product": _associated,
    "multiply and add": _multiplied_and_added,
    "cut by narrow": _cut("x.narrow(-1, a, b - a)"),
    "cut by selection": _cut("x.index_select(-1, torch.arange(a, b))"),
    "cut by split": _cut("x.split([a, b - a, x.shape[-1] - b], dim=-1)[1]"),
    "cut by tensor_split": _cut("torch.tensor_split(x, [a, b], dim=-1)[1]"),
    "cut by a list": _cut("x[..., list(range(a, b))]"),
    "cosine by name": _method("cos", "torch.cos(x)"),
    "sine of the negative": _method("sin", "-torch.sin(-x)"),
    "cosine of the negative": _method("cos", "(-x).cos()"),
}

# What is put behind `x = ...` as `x = <text>`: nothing happens to the numbers.
NOTHING: dict[str, str] = {
    "clone": "x.clone()",
    "make contiguous": "x.contiguous()",
    "view as itself": "x.reshape(x.shape)",
    "add and drop an axis": "x.unsqueeze(0).squeeze(0)",
    "index an axis added": "x[None][0]",
    "transpose twice": "x.transpose(0, -1).transpose(-1, 0)",
    "expand to its shape": "x.expand(x.shape)",
    "expand and select": "x.unsqueeze(0).expand(2, *x.shape)[1]",
    "flip twice": "x.flip(-1).flip(-1)",
    "roll there and back": "x.roll(1, -1).roll(-1, -1)",
    "stack and unbind": "torch.stack((x, x)).unbind(0)[1]",
    "join with nothing": "torch.cat((x,), dim=-1)",
}
# The same for numbers that are real.
NOTHING_REAL: dict[str, str] = {
    "cast to its type": "x.to(x.dtype)",
    "cast up and down": "x.double().to(x.dtype)",
    "multiply by one": "x * 1.0",
    "divide by one": "x / 1",
    "add zero": "x + 0.0",
    "negate twice": "-(-x)",
    "type as itself": "x.type_as(x)",
}
KINDS: tuple[str, ...] = (*RULES, *NOTHING, *NOTHING_REAL)


def apply(edit: Edit, functions: list[Function]) -> bool:
    """Edit the functions in place; False where the edit applies nowhere."""
    if edit.kind in RULES:
        return _apply_rule(RULES[edit.kind], edit.place, functions)
    return _apply_nothing(edit, functions)


def _apply_rule(rule: Rule, place: int, functions: list[Function]) -> bool:
    found = [
        (function, node, new) for function in functions for node in walk(function) if (new := rule(node))
    ]
    if not found:
        return False
    function, node, new = found[place % len(found)]
    replaced(function, node, new)
    return True


def _apply_nothing(edit: Edit, functions: list[Function]) -> bool:
    real = edit.kind in NOTHING_REAL
    found = []
    for function in functions:
        if real and _makes_complex(function):
            continue
        for position, step in enumerate(function.body):
            if not isinstance(step, ast.Assign) or len(step.targets) != 1:
                continue
            target = step.targets[0]
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            found += [
                (function, position, name.id)
                for name in targets
                if isinstance(name, ast.Name) and is_tensor(name) and _allowed(name.id, real)
            ]
    if not found:
        return False
    function, position, name = found[edit.place % len(found)]
    text = NOTHING_REAL[edit.kind] if real else NOTHING[edit.kind]
    value = expression(text, x=ast.Name(name, ast.Load()))
    function.body.insert(position + 1, ast.Assign([ast.Name(name, ast.Store())], value))
    return True


def _makes_complex(function: Function) -> bool:
    """Whether complex numbers are made in a function: which of its values are real is not told by their names."""
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("complex", "polar", "view_as_complex")
        for node in walk(function)
    )


def _allowed(name: str, real: bool) -> bool:
    if name in TRUTHS:
        return False
    return name not in COMPLEX | WHOLE if real else True
