"""Names of the field as points of the algebra."""

from __future__ import annotations

from collections.abc import Sequence

from grape_compile.encoding.bias import Bias
from grape_compile.encoding.clock import Accumulated, Positions, Steps
from grape_compile.encoding.compose import Nope
from grape_compile.encoding.gate import Gate
from grape_compile.encoding.path import LogSigmoid, PathBias
from grape_compile.encoding.planes import Axes, Half, Interleaved, Partial
from grape_compile.encoding.rotation import Rotation
from grape_compile.encoding.slopes import AlibiSlopes, Uniform
from grape_compile.encoding.spectrum import Geometric, Tiled
from grape_compile.encoding.tensors import Learned


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


def axial_rope(
    head_dim: int,
    axes: int = 2,
    base: float = 10000.0,
    interleaved: bool = False,
    positions: str = "positions",
) -> Rotation:
    """Return RoPE over several axes of equal rank: rows and columns of an image, or also time (GRAPE App. G).

    An equal share of the planes turns by each axis, with its own theta_j = base^(-j / share); `positions` names a
    tensor [axes, ...]. Raises EncodingError for planes that cannot be shared equally.

    >>> str(axial_rope(8))
    'rotation(axes(half(8), (0, 0, 1, 1)), tiled(geometric(10000.0), 2), positions("positions"))'
    """
    planes = Interleaved(head_dim) if interleaved else Half(head_dim)
    spectrum = Tiled(Geometric(base), axes)
    share = len(spectrum.frequencies(planes.count)) // axes
    by_axis = tuple(axis for axis in range(axes) for _ in range(share))
    return Rotation(Axes(planes, by_axis), spectrum, Positions(positions))


def mrope(
    head_dim: int, sections: Sequence[int], base: float = 10000.0, positions: str = "positions"
) -> Rotation:
    """Return M-RoPE: one spectrum, whose next `sections[axis]` planes turn by that axis (arXiv 2409.12191).

    `positions` names a tensor [axes, ...]: time, row and column in Qwen2-VL, whose text has all three equal.
    Raises EncodingError for sections that do not add up to the planes of the head.

    >>> str(mrope(8, (2, 1, 1)))
    'rotation(axes(half(8), (0, 0, 1, 2)), geometric(10000.0), positions("positions"))'
    """
    by_axis = tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    return Rotation(Axes(Half(head_dim), by_axis), Geometric(base), Positions(positions))


def grape_m(
    head_dim: int, theta: str = "theta", basis: str | None = None, rates: str | None = None
) -> Rotation:
    """Return GRAPE-M: a learned spectrum, a learned orthogonal basis where named, neighbours paired (GRAPE 3.1).

    `theta` holds the frequencies [planes], or [heads, 1, planes]. With `rates`, one positive number for each token
    (or token and head), it is GRAPE-M-ctx: their exclusive running sum takes the place of the position.

    >>> str(grape_m(8, rates="rates"))
    'rotation(interleaved(8), learned("theta"), accumulated("rates", false))'
    """
    clock = Steps() if rates is None else Accumulated(rates, False)
    return Rotation(Interleaved(head_dim), Learned(theta), clock, basis=basis)


def alibi(heads: int) -> Bias:
    """Return ALiBi, the bias beta_h (j - t) (Press et al. 2022, arXiv 2108.12409).

    >>> str(alibi(8))
    'bias(alibi_slopes(8), steps)'
    """
    return Bias(AlibiSlopes(heads), Steps())


def fox(log_forget: str = "log_forget") -> Bias:
    """Return the bias U_t - U_j, U the inclusive running sum of log f (FoX, Lin et al. 2025; GRAPE App. C).

    >>> str(fox())
    'bias(uniform(-1.0), accumulated("log_forget", true))'
    """
    return Bias(Uniform(-1.0), Accumulated(log_forget, True))


def gated_alibi(heads: int, query: str | None = "gate_query", key: str | None = "gate_key") -> Bias:
    """Return GRAPE-A-QK, slope_h (j - t) (lam_q[t] + lam_k[j]); -Q or -K with one name alone (GRAPE 4.6).

    >>> str(gated_alibi(8, key=None))
    'bias(alibi_slopes(8), steps, gate=gate(query="gate_query"))'
    """
    return Bias(AlibiSlopes(heads), Steps(), gate=Gate(query, key))


def grape_ap(heads: int, dim: int = 8, normalised: str = "keys") -> PathBias:
    """Return GRAPE-AP: log-sigmoid edges, ALiBi slopes, keys that turn by one radian a position (GRAPE 5.1-5.2).

    >>> str(grape_ap(8).turn)
    'rotation(interleaved(8), geometric(1.0), steps)'
    """
    turn = Rotation(Interleaved(dim), Geometric(1.0), Steps())
    return PathBias(LogSigmoid(), AlibiSlopes(heads), dim, normalised, turn)


def nope() -> Nope:
    """Return the encoding without position.

    >>> str(nope())
    'nope'
    """
    return Nope()
