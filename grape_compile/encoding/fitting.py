"""Read the rule off frequencies that follow one straight line, then another: the ramps of YaRN and of Llama 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from grape_compile.encoding.scaling import ByParts, Llama3, Rule, Yarn
from grape_compile.encoding.spectrum import Geometric, Scaled

#: exp of a larger number leaves the range of a double.
_LARGEST_LOG: Final = 700.0
_DIGITS: Final = 17
#: A number somebody chose has few digits; more of them would fit anything.
_CHOSEN: Final = 4


def describe_ramp(values: Sequence[float], rtol: float) -> Scaled | None:
    """Return the one rule over a geometric spectrum whose frequencies all planes have to `rtol`, or None.

    The first planes tell the base or the last ones do, the last ones tell the factor, those between how much of
    theta_j is kept, s_j = (theta'_j factor / theta_j - 1) / (factor - 1), and s_j tells the rule: linear in j
    between whole corners it is `ByParts`, between others the `Yarn` (not truncated) of `beta_slow` 1 that has a
    whole `original`; linear in theta_j it is the `Llama3` of `low` 1, which stands for all with the same ratios.
    Numbers that two rules share, or that ask for numbers of more than a few digits, stay unnamed.
    """
    lines = _Lines([math.log(value) for value in values], math.log1p(rtol))
    base = lines.base()
    factor = None if base is None else lines.factor(base)
    if base is None or factor is None or base <= 1.0 or factor <= 1.0:
        return None
    spectrum = Geometric(base)
    plain, count = spectrum.frequencies(len(values)), len(values)

    def follows(rule: Rule) -> bool:
        changed = Scaled(rule, spectrum).frequencies(count)
        return all(abs(a - b) <= rtol * b for a, b in zip(values, changed, strict=True))

    kept = [(a * factor / b - 1) / (factor - 1) for a, b in zip(values, plain, strict=True)]
    found = [rule for rule in _rules(kept, plain, factor, rtol, follows) if follows(rule)]
    return Scaled(found[0], spectrum) if len(found) == 1 else None


def _rules(
    kept: Sequence[float], plain: Sequence[float], factor: float, rtol: float, follows: Callable[[Rule], bool]
) -> Iterator[Rule]:
    """Yield the rules that planes between all kept and all divided may come from."""
    blur = 2 * rtol * factor / (factor - 1)
    full = sum(share >= 1 - blur for share in kept)
    last = sum(share > blur for share in kept) - 1
    if full > last:
        return
    yield ByParts(factor, full - 1, last + 1)
    if kept[full] <= kept[last]:
        return
    turn, step = 2 * math.pi, -math.log(plain[1])
    low, high = _ends((full, kept[full]), (last, kept[last]))
    yield from _of_whole_context(
        math.exp(step * high) * turn,
        step * (high - low),
        lambda original, fast: Yarn(factor, original, fast, 1.0, truncate=False),
        follows,
    )
    fast, slow = _ends((plain[full], kept[full]), (plain[last], kept[last]))
    if slow > 0:
        yield from _of_whole_context(
            turn / slow,
            math.log(fast / slow),
            lambda original, high: Llama3(factor, 1.0, high, original),
            follows,
        )


def _ends(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Return where the line through two points (x, s) has s = 1 and s = 0."""
    (x0, s0), (x1, s1) = one, other
    slope = (s1 - s0) / (x1 - x0)
    return x0 + (1 - s0) / slope, x0 - s0 / slope


def _of_whole_context(
    original: float, log_ratio: float, rule: Callable[[int, float], Rule], follows: Callable[[Rule], bool]
) -> Iterator[Rule]:
    """Yield the rule of the whole `original` context next to this one and a ratio of few digits, if no other fits."""

    def fitting(context: int) -> Rule | None:
        ratio = shortest(log_ratio, lambda ratio: ratio > 1 and follows(rule(context, ratio)), _CHOSEN)
        return None if ratio is None else rule(context, ratio)

    if not 1 <= original < 1e12 or log_ratio <= 0:
        return
    near = round(original)
    found = (
        [each for each in map(fitting, (near - 1, near, near + 1)) if each is not None] if near > 1 else []
    )
    if len(found) == 1:
        yield found[0]


class _Lines:
    """Logarithms of frequencies that fall along a straight line through 0 first and along a parallel one at the end."""

    def __init__(self, logs: Sequence[float], slack: float) -> None:
        self.logs, self.slack, self.count = logs, slack, len(logs)
        self.tail = self._run(range(self.count - 2, -1, -1), lambda j: logs[j:])
        self.head = self._run(range(2, self.count + 1), lambda j: logs[:j])

    def _run(self, ends: range, part: Callable[[int], Sequence[float]]) -> int:
        """Return the size of the largest part that is a straight line."""
        largest = 1
        for end in ends:
            if not holds(part(end), *line(part(end)), self.slack):
                break
            largest = len(part(end))
        return largest

    def base(self) -> float | None:
        """Return the base of the spectrum by the longer line; two points always make a line, so the last two count."""
        longer = self.logs[: self.head] if self.head > max(self.tail, 2) else self.logs[-self.tail :]
        if len(longer) < 2:
            return None
        return shortest(line(longer)[1] * self.count, self._has_base, _CHOSEN)

    def _has_base(self, base: float) -> bool:
        levels = self._levels(base)
        ends = [levels[-self.tail :]]
        if self.head > 2:
            ends.append([0.0, *levels[: self.head]])
        return abs(levels[0]) <= self.slack and all(max(each) - min(each) <= 2 * self.slack for each in ends)

    def factor(self, base: float) -> float | None:
        """Return the factor of the last planes."""
        levels = self._levels(base)[-self.tail :]
        return shortest(
            -math.fsum(levels) / len(levels),
            lambda number: all(abs(level + math.log(number)) <= self.slack for level in levels),
            _CHOSEN,
        )

    def _levels(self, base: float) -> list[float]:
        """Return ln of each frequency over that of the geometric spectrum."""
        return [log + j * math.log(base) / self.count for j, log in enumerate(self.logs)]


def line(logs: Sequence[float]) -> tuple[float, float]:
    """Return level and fall of logs[j] = level - j * fall, by least squares."""
    middle = (len(logs) - 1) / 2
    mean = math.fsum(logs) / len(logs)
    spread = math.fsum((j - middle) ** 2 for j in range(len(logs)))
    fall = -math.fsum((j - middle) * (log - mean) for j, log in enumerate(logs)) / spread if spread else 0.0
    return mean + middle * fall, fall


def holds(logs: Sequence[float], level: float, fall: float, slack: float) -> bool:
    """Tell whether every logs[j] is level - j * fall up to `slack`."""
    return all(abs(log - level + j * fall) <= slack for j, log in enumerate(logs))


def shortest(log: float, fits: Callable[[float], bool], digits: int = _DIGITS) -> float | None:
    """Return the number with the fewest decimal digits, at most `digits`, near exp(log) that fits, or None."""
    if abs(log) > _LARGEST_LOG:
        return None
    exact = math.exp(log)
    for places in range(digits):
        number = float(f"{exact:.{places}e}")
        if fits(number):
            return number
    return None
