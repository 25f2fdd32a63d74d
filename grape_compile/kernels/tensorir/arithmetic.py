"""Functions of numbers that a CPU computes many at a time: calls into a C library would be one at a time.

What they use twice gets a name by `named`: by default a statement, so that they are called inside of the loop that
wants their value. In an expression of its own, `plain` leaves it to the compiler to see what is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from grape_compile.kernels.tensorir.engine import T

#: Gives a value a name, and returns it.
Named = Callable[[Any], Any]
#: Below this, exp(x) is no normal number of float32 and counts as nothing; above, it is infinite.
_LEAST: Final = -87.33654
_MOST: Final = 88.72284
#: ln 2 in two parts: a whole number of up to 8 bits times the first one is exact.
_LN2: Final = (0.693359375, -2.12194440054690583e-4)
#: exp(f) = sum f^i / i! for |f| <= ln(2) / 2: what is left out is below 6e-9 of it.
_EXP: Final = tuple(1.0 / math.factorial(i) for i in range(8))
# sin x = x + x^3 p(x^2) and cos x = 1 - x^2/2 + x^4 p(x^2) for |x| <= pi/4, minimax (Moshier, Cephes, sinf.c).
_SIN: Final = (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)
_COS: Final = (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)
# tanh x = x + x^3 p(x^2) for |x| <= 0.625, minimax (Moshier, Cephes, tanhf.c).
_TANH: Final = (
    -3.33332819422e-1,
    1.33314422036e-1,
    -5.37397155531e-2,
    2.06390887954e-2,
    -5.70498872745e-3,
)
# artanh z = z sum_i z^(2i) / (2i + 1), z <= 1/3: what is left out is below 1e-8 of it.
_ARTANH: Final = tuple(1.0 / (2 * i + 1) for i in range(8))


def number(value: float, dtype: str = "float32") -> Any:
    """Return a constant."""
    return T.cast(T.float64(value), dtype) if dtype != "float32" else T.float32(value)


def plain(value: Any) -> Any:
    """Return a value without a name."""
    return value


def polynomial(x: Any, coefficients: tuple[float, ...], named: Named = T.bind) -> Any:
    """Return sum_i coefficients[i] x^i in float32 by Horner's rule."""
    total = number(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + number(coefficient)
    return named(total)


def exp(x: Any, named: Named = T.bind) -> Any:
    """Return e^x = 2^n e^f of float32 numbers, zero where that is no normal number; relative error below 2^-22."""
    given = named(x)
    bounded = named(T.min(T.max(given, number(_LEAST)), number(_MOST)))
    whole = named(T.floor(bounded * number(math.log2(math.e)) + number(0.5)))
    part = named(bounded - whole * number(_LN2[0]) - whole * number(_LN2[1]))
    power = T.reinterpret("float32", T.shift_left(T.cast(whole, "int32") + 127, 23))
    return T.Select(given < number(_LEAST), number(0.0), polynomial(part, _EXP, named) * power)


def sigmoid(x: Any, named: Named = T.bind) -> Any:
    """Return 1 / (1 + e^-x) of float32 numbers."""
    return number(1.0) / (number(1.0) + exp(-x, named))


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


def tanh(x: Any, exp: Callable[[Any], Any], named: Named = T.bind) -> Any:
    """Return the hyperbolic tangent of float32 numbers."""
    given = named(x)
    square = named(given * given)
    near = named(given + given * square * polynomial(square, _TANH, named))
    size = named(T.max(given, -given))
    far = named(number(1.0) - number(2.0) / (exp(size * number(2.0)) + number(1.0)))
    return T.Select(size < number(0.625), near, T.Select(given < number(0.0), -far, far))


def log_sigmoid(x: Any, exp: Callable[[Any], Any]) -> Any:
    """Return log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + u), u = exp(-|x|), log(1 + u) = 2 artanh(u / (2 + u))."""
    given = T.bind(x)
    u = T.bind(exp(-T.max(given, -given)))
    z = T.bind(u / (u + number(2.0)))
    return T.min(given, number(0.0)) - number(2.0) * z * polynomial(T.bind(z * z), _ARTANH)
