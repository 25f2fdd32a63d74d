"""Cosine and sine inside a kernel: the library's take the slow path for large angles, and its registers spill."""

import triton
import triton.language as tl
from triton import knobs

#: The interpreter multiplies and adds with two roundings, where a GPU has one.
ROUNDS_TWICE = tl.constexpr(bool(knobs.runtime.interpret))

#: pi / 2 as a sum of three float32 numbers (Cody and Waite 1980, 8): 1e-23 is left out.
QUARTER_0 = tl.constexpr(1.5707963705062866)
QUARTER_1 = tl.constexpr(-4.371138828673793e-08)
QUARTER_2 = tl.constexpr(-1.7151245100058819e-15)


@triton.jit
def _fma(x, y, z):
    if ROUNDS_TWICE:
        return (x.to(tl.float64) * y + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, tl.full(x.shape, y, tl.float32), z)


@triton.jit
def _of_quarter(rest, quarter):
    """Cosine and sine of `rest` + quarter pi / 2 for |rest| up to pi / 4: minimax polynomials, off by 1e-7."""
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square
    cosine = cosine * square - 0.5 * square + 1.0
    odd = (quarter & 1) != 0
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    return cos, sin


@triton.jit
def cos_sin(angle):
    """Cosine and sine of float32 radians; off by 1e-7 up to 2^24 radians, where float32 numbers are 2 apart.

    Beyond them the result is that of some angle.
    """
    count = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = _fma(count, -QUARTER_0, angle)
    rest = _fma(count, -QUARTER_1, rest)
    rest = _fma(count, -QUARTER_2, rest)
    nan: tl.constexpr = tl.PropagateNan.ALL
    rest = tl.minimum(tl.maximum(rest, -0.8, propagate_nan=nan), 0.8, propagate_nan=nan)
    return _of_quarter(rest, count.to(tl.int32))


@triton.jit
def units(turns):
    """Turns, modulo one, in units of 2^-64 turns."""
    return ((turns - tl.floor(turns + 0.5)) * 18446744073709551616.0).to(tl.int64)


@triton.jit
def cos_sin_exact(position, frequency):
    """Cosine and sine of a position times a frequency in radians, off by 1e-7 at any position below 2^53.

    The whole part of a float64 position multiplies turns in whole numbers that wrap at one turn, as angles do.
    """
    turns = frequency.to(tl.float64) * 0.15915494309189535
    whole = tl.floor(position + 0.5)
    angle = whole.to(tl.int64) * units(turns) + units((position - whole) * turns)
    angle = (angle >> 32).to(tl.int32)
    quarter = (angle + 536870912) >> 30
    rest = (angle - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-9
    return _of_quarter(rest, quarter)
