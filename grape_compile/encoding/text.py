"""The text form read back, by one table of names over Python's own syntax tree."""

from __future__ import annotations

import ast
import difflib
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Final

from grape_compile.encoding.base import Encoding, Term, term_name
from grape_compile.encoding.bias import Absolute, Bias, Euclidean, Signed
from grape_compile.encoding.clock import Accumulated, Positions, Steps, Tables
from grape_compile.encoding.compose import Compose, Nope
from grape_compile.encoding.gate import Gate
from grape_compile.encoding.non_commuting import NonCommuting
from grape_compile.encoding.path import Identity, LogSigmoid, NegativeExp, PathBias
from grape_compile.encoding.planes import Axes, Half, Interleaved, Pairs, Partial
from grape_compile.encoding.rank2 import Rank2
from grape_compile.encoding.rotation import Rotation
from grape_compile.encoding.scaling import (
    ByParts,
    DynamicNtk,
    Linear,
    Llama3,
    Longrope,
    Ntk,
    PerPlane,
    Proportional,
    Yarn,
)
from grape_compile.encoding.slopes import AlibiSlopes, Constant, Uniform
from grape_compile.encoding.spectrum import Geometric, Scaled, Tiled
from grape_compile.encoding.tensors import Learned, Table
from grape_compile.errors import EncodingError

#: Every class of the algebra by its name in the text form.
VOCABULARY: Final[dict[str, type[Term]]] = {
    term_name(kind): kind
    for kind in (
        *(Rotation, Rank2, NonCommuting, Bias, PathBias, Compose, Nope),
        *(Half, Interleaved, Partial, Pairs, Axes),
        *(Geometric, Scaled, Tiled, Learned, Table),
        *(Linear, Ntk, DynamicNtk, ByParts, Yarn, Llama3, PerPlane, Longrope, Proportional),
        *(Steps, Positions, Accumulated, Tables),
        *(AlibiSlopes, Constant, Uniform),
        Gate,
        *(Signed, Absolute, Euclidean),
        *(LogSigmoid, NegativeExp, Identity),
    )
}
_CONSTANTS: Final[dict[str, bool | None]] = {"none": None, "true": True, "false": False}


@lru_cache(maxsize=4096)
def parse(text: str) -> Encoding:
    """Return the encoding that `text` writes: calls of known names, literals and tuples; nothing runs.

    Raises EncodingError for anything else, and for values that the constructors refuse.

    >>> parse("rotation(half(64), geometric(1e4), steps)").canonical().slots
    ()
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, EncodingError):
            raise
        raise EncodingError(
            f"an encoding from {_short(text)}",
            f"text that is no expression ({type(error).__name__})",
            "call syntax such as rotation(half(64), geometric(10000.0), steps)",
        ) from error
    if not isinstance(value, Encoding):
        encodings = sorted(name for name, kind in VOCABULARY.items() if issubclass(kind, Encoding))
        raise EncodingError(
            f"an encoding from {_short(text)}",
            "a part of an encoding or a literal",
            f"one of {', '.join(encodings)}",
        )
    return value


def _value(node: ast.expr) -> object:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as literal):
            return literal
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Tuple(elts=items):
            return tuple(map(_value, items))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Name(id=name):
            return _call(name, [], [])
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords):
            return _call(name, arguments, keywords)
    raise EncodingError(
        f"a value from {_short(ast.unparse(node))}",
        f"Python syntax of kind {type(node).__name__}",
        "calls of known names, numbers, strings, tuples, none, true and false",
    )


def _call(name: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> Term:
    kind = VOCABULARY.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, VOCABULARY, n=3) or sorted(VOCABULARY)
        raise EncodingError(
            f"a value called {name!r}", "a name that the algebra does not have", ", ".join(near)
        )
    known = [field.name for field in fields(kind)]
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    given = [*known[: len(arguments)], *(each.arg or "**" for each in keywords)]
    fits = len(arguments) <= len(known) and len(set(given)) == len(given)
    if not fits or not needed <= set(given) <= set(known):
        written = ", ".join(ast.unparse(each) for each in (*arguments, *keywords))
        raise EncodingError(f"the arguments of {name}", f"({_short(written)})", _signature(kind))
    values = [_value(node) for node in (*arguments, *(each.value for each in keywords))]
    return kind(**dict(zip(given, values, strict=True)))


def _signature(kind: type[Term]) -> str:
    parts = [each.name if each.default is MISSING else f"{each.name}=..." for each in fields(kind)]
    return f"{term_name(kind)}({', '.join(parts)})" if parts else f"{term_name(kind)} without arguments"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
