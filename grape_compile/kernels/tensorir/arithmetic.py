"""Functions of numbers that a CPU computes many at a time: calls into a C library would be one at a time.

They write the names of what they use twice, so they are called inside of the loop that wants their value.
"""

from __future__ import annotations

import math
from typing import Any, Final

from grape_compile.kernels.tensorir.engine import T

#: Below this, 2^x is no normal number of float32 and counts as nothing.
_LEAST: Final = -126.0
#: 2^f = sum c_i f^i for |f| <= 1/2, the Taylor series up to (ln 2)^7 / 7!: relative error 2e-9 before rounding.
_EXP2: Final = tuple(math.log(2.0) ** i / math.factorial(i) for i in range(8))
# sin x = x + x^3 p(x^2) and cos x = 1 - x^2/2 + x^4 p(x^2) for |x| <= pi/4, minimax (Moshier, Cephes, sinf.c).
_SIN: Final = (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)
_COS: Final = (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)


def number(value: float, dtype: str = "float32") -> Any:
    """Return a constant."""
    return T.cast(T.float64(value), dtype) if dtype != "float32" else T.float32(value)


def polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Return sum_i coefficients[i] x^i in float32 by Horner's rule."""
    total = number(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + number(coefficient)
    return T.bind(total)


def exp2(x: Any) -> Any:
    """Return 2^x of float32 numbers x <= 128, zero where that is no normal number; relative error below 2^-23."""
    given = T.bind(x)
    bounded = T.bind(T.max(given, number(_LEAST)))
    whole = T.bind(T.floor(bounded + number(0.5)))
    power = T.reinterpret("float32", T.shift_left(T.cast(whole, "int32") + 127, 23))
    part = T.bind(bounded - whole)
    return T.Select(given < number(_LEAST), number(0.0), polynomial(part, _EXP2) * power)


def quarter_turns(angle: Any) -> tuple[Any, Any]:
    """Return (k, r), angle = k pi/2 + r, |r| <= pi/4, of a float64 angle in radians."""
    whole = T.bind(angle)
    turns = T.bind(T.floor(whole * T.float64(2.0 / math.pi) + T.float64(0.5)))
    rest = T.bind(T.cast(whole - turns * T.float64(math.pi / 2.0), "float32"))
    return T.bind(T.cast(turns, "int64")), rest


def cos_sin(turns: Any, rest: Any) -> tuple[Any, Any]:
    """Return (cos, sin) of turns * pi/2 + rest in float32, |rest| <= pi/4."""
    square = T.bind(rest * rest)
    sine = T.bind(rest + rest * square * polynomial(square, _SIN))
    cosine = T.bind(number(1.0) - number(0.5) * square + square * square * polynomial(square, _COS))
    odd = T.bitwise_and(turns, T.int64(1)) == T.int64(1)
    lower = T.bitwise_and(turns, T.int64(2)) == T.int64(2)
    left = T.bitwise_and(turns + T.int64(1), T.int64(2)) == T.int64(2)
    cos = T.bind(T.Select(odd, sine, cosine))
    sin = T.bind(T.Select(odd, cosine, sine))
    return T.Select(left, -cos, cos), T.Select(lower, -sin, sin)
