"""Names of the field as points of the algebra."""

from __future__ import annotations

from grape_compile.encoding.bias import Bias
from grape_compile.encoding.clock import Steps
from grape_compile.encoding.compose import Nope
from grape_compile.encoding.planes import Half, Interleaved, Partial
from grape_compile.encoding.rotation import Rotation
from grape_compile.encoding.slopes import AlibiSlopes
from grape_compile.encoding.spectrum import Geometric


def rope(
    head_dim: int, base: float = 10000.0, interleaved: bool = False, rotary_dim: int | None = None
) -> Rotation:
    """Return RoPE over the first `rotary_dim` coordinates of a head (Su et al. 2021, arXiv 2104.09864).

    theta_j = base^(-2j/d) radians per position. Halves pair up as in Llama, or neighbours where
    `interleaved`. Raises EncodingError for odd sizes and for more rotated coordinates than the head has.

    >>> str(rope(64, rotary_dim=32))
    'rotation(partial(half(32), 0, 64), geometric(10000.0), steps)'
    """
    size = head_dim if rotary_dim is None else rotary_dim
    inner = Interleaved(size) if interleaved else Half(size)
    planes = inner if size == head_dim else Partial(inner, 0, head_dim)
    return Rotation(planes, Geometric(base), Steps())


def alibi(heads: int) -> Bias:
    """Return ALiBi, the bias beta_h (j - t) (Press et al. 2022, arXiv 2108.12409).

    >>> str(alibi(8))
    'bias(alibi_slopes(8), steps)'
    """
    return Bias(AlibiSlopes(heads), Steps())


def nope() -> Nope:
    """Return the encoding without position.

    >>> str(nope())
    'nope'
    """
    return Nope()
