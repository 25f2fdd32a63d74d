"""From numbers back to formulas: a formula is named only where it holds to a given tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grape_compile.encoding.fitting import describe_ramp, holds, line, shortest
from grape_compile.encoding.scaling import Linear, Proportional
from grape_compile.encoding.slopes import AlibiSlopes, Constant
from grape_compile.encoding.spectrum import Geometric, Scaled
from grape_compile.errors import EncodingError


def describe_frequencies(values: Sequence[float], count: int, rtol: float) -> Geometric | Scaled | None:
    """Return the one spectrum in closed form that all `values` follow, or None.

    `values` are the frequencies of planes 0, 1, ... of `count`, in radians per position (all of them, or the
    first few). Tried are theta_j = base^(-j / count) / factor, the same with planes at the end that stand still
    (`Proportional`), and, of all planes, the ramps of `ByParts`, `Yarn` and `Llama3`. The fit is by least squares
    in ln theta; it counts only where every value agrees to the relative tolerance `rtol`. Factor and base are then
    shortened to the fewest digits that still agree, factor 1 first. A single frequency says nothing of the base:
    it is described with base 1. Raises EncodingError for a tolerance that is not positive, and for more values
    than planes.

    >>> str(describe_frequencies([1.0, 0.1, 0.01, 0.001], 4, 1e-6))
    'geometric(10000.0)'
    """
    if not 1 <= len(values) <= count or not 0 < rtol < math.inf:
        raise EncodingError(
            f"a formula for {len(values)} frequencies of {count} planes to {rtol}",
            "no values, more values than planes, or no tolerance",
            "1 to count values and a positive relative tolerance",
        )
    turning = len(values)
    while turning > 1 and values[turning - 1] == 0:
        turning -= 1
    if not all(0 < value < math.inf for value in values[:turning]):
        return None
    found = _falling([math.log(value) for value in values[:turning]], count, math.log1p(rtol))
    if turning < len(values):
        return None if found is None else Scaled(Proportional(turning), found)
    return found or (describe_ramp(values, rtol) if turning == count else None)


def _falling(logs: Sequence[float], count: int, slack: float) -> Geometric | Scaled | None:
    """Return base^(-j / count) / factor for logs that fall on a straight line."""
    if (base := _base(logs, count, slack)) is not None:
        return Geometric(base)
    level, fall = line(logs)
    if not holds(logs, level, fall, slack):
        return None

    def base_for(factor: float) -> float | None:
        return _base([log + math.log(factor) for log in logs], count, slack)

    factor = shortest(-level, lambda number: base_for(number) is not None)
    base = None if factor is None else base_for(factor)
    return None if factor is None or base is None else Scaled(Linear(factor), Geometric(base))


def describe_slopes(values: Sequence[float], rtol: float) -> AlibiSlopes | Constant:
    """Return ALiBi's slopes where every value agrees to the relative tolerance `rtol`, else the values.

    Raises EncodingError for values that are not finite numbers.

    >>> str(describe_slopes([0.0625, 0.00390625], 1e-6))
    'alibi_slopes(2)'
    """
    constant = Constant(tuple(values))
    alibi = AlibiSlopes(len(constant.per_head))
    near = (abs(value - slope) <= rtol * slope for value, slope in zip(values, alibi.values(), strict=True))
    return alibi if all(near) else constant


def _base(logs: Sequence[float], count: int, slack: float) -> float | None:
    """Return the shortest base whose logs fall from 0, by least squares through theta_0 = 1."""
    squares = math.fsum(j * j for j in range(len(logs)))
    fall = -math.fsum(j * log for j, log in enumerate(logs)) / squares if squares else 0.0
    return shortest(fall * count, lambda base: holds(logs, 0.0, math.log(base) / count, slack))
