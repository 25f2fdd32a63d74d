"""What an encoding means: plain Python written from the equations, independent of the operators."""

from __future__ import annotations

import math
import operator
import random
import zlib
from collections.abc import Sequence

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    Bias,
    Clock,
    Compose,
    Encoding,
    Euclidean,
    Gate,
    Identity,
    LogSigmoid,
    Multiplicative,
    NegativeExp,
    NonCommuting,
    Nope,
    PathBias,
    Rank2,
    Rotation,
    Signed,
    Slopes,
    Spectrum,
    Steps,
    Tables,
    Uniform,
)

AXES = 3
#: Tokens of the sequence, where a spectrum asks for their number.
LENGTH = 5000


def numbers(slot: str, count: int) -> list[float]:
    """The content of a slot, the same at each reading."""
    source = random.Random(zlib.crc32(slot.encode()))
    return [source.uniform(-2.0, 2.0) for _ in range(count)]


def head_dim(encoding: Encoding) -> int:
    """The head size of the rotations inside, or 2 where any size will do."""
    if isinstance(encoding, Multiplicative):
        return encoding.head_dim
    return max(map(head_dim, encoding.parts)) if isinstance(encoding, Compose) else 2


def matrix(encoding: Encoding, size: int, token: int) -> list[list[float]]:
    """The matrix whose rows are the images of the unit vectors for the token at this index."""
    units = [[float(i == k) for i in range(size)] for k in range(size)]
    return [image(encoding, unit, token) for unit in units]


def image(encoding: Encoding, vector: list[float], token: int) -> list[float]:
    if isinstance(encoding, Compose):
        for part in encoding.parts:
            vector = image(part, vector, token)
        return vector
    if isinstance(encoding, Rotation):
        return _rotated(encoding, vector, token)
    if isinstance(encoding, Rank2 | NonCommuting):
        return _generated(encoding, vector, token)
    assert isinstance(encoding, Bias | PathBias | Nope)
    return vector


def bias(encoding: Encoding, head: int, query: int, key: int) -> float:
    """The number added to the logit."""
    if isinstance(encoding, Compose):
        return math.fsum(bias(part, head, query, key) for part in encoding.parts)
    if isinstance(encoding, PathBias):
        return _along(encoding, head, query, key)
    if not isinstance(encoding, Bias):
        return 0.0
    here, there = _times(encoding.clock, query), _times(encoding.clock, key)
    slopes = _slopes(encoding.slopes)
    slope = slopes[head % len(slopes)] * _gate(encoding.gate, head, query, key)
    match encoding.distance:
        case Signed():
            return slope * (there[0] - here[0])
        case Absolute():
            return -slope * abs(there[0] - here[0])
        case Euclidean():
            return -slope * math.dist(there, here)
    raise AssertionError(encoding)


def _gate(gate: Gate | None, head: int, query: int, key: int) -> float:
    if gate is None:
        return 1.0
    sides = ((gate.query, query), (gate.key, key))
    return math.fsum(numbers(f"{name}{head}", at + 1)[at] for name, at in sides if name is not None)


def _along(path: PathBias, head: int, query: int, key: int) -> float:
    """The sum of the edges behind the key up to the query."""
    slopes = _slopes(path.slopes)
    edges = []
    for at in range(key + 1, query + 1):
        ends = (path.query, query), (path.key, at)
        start, end = (numbers(f"{name}{head}{token}", path.dim) for name, token in ends)
        start = _size_one(start) if path.normalised == "both" else start
        end = end if path.normalised == "none" else _size_one(end)
        end = end if path.turn is None else _rotated(path.turn, end, at)
        product = math.fsum(a * b for a, b in zip(start, end, strict=True)) / path.dim
        match path.link:
            case LogSigmoid():
                edges.append(-math.log1p(math.exp(-product)))
            case NegativeExp():
                edges.append(-math.exp(product))
            case Identity():
                edges.append(product)
    return slopes[head % len(slopes)] * math.fsum(edges)


def _size_one(vector: list[float]) -> list[float]:
    size = math.sqrt(math.fsum(x * x for x in vector) / len(vector) + 1e-6)
    return [x / size for x in vector]


def _rotated(rotation: Rotation, vector: list[float], token: int) -> list[float]:
    if rotation.basis is not None:
        size = len(vector)
        basis = [numbers(f"{rotation.basis}{row}", size) for row in range(size)]
        vector = [
            math.fsum(vector[row] * basis[row][column] for row in range(size)) for column in range(size)
        ]
    source, target = rotation.planes.pairs(), (rotation.out or rotation.planes).pairs()
    result = dict(
        zip(_outside(target, len(vector)), (vector[i] for i in _outside(source, len(vector))), strict=True)
    )
    for (i0, i1), (o0, o1), (cos, sin) in zip(source, target, _angles(rotation, token), strict=True):
        sin *= rotation.orientation
        result[o0] = rotation.scale * (cos * vector[i0] - sin * vector[i1])
        result[o1] = rotation.scale * (sin * vector[i0] + cos * vector[i1])
    return [result[i] for i in range(len(vector))]


def _generated(encoding: Rank2 | NonCommuting, vector: list[float], token: int) -> list[float]:
    """x + sum_k (n L)^k x / k!, in n steps of a length where the series is short."""
    generator = _rank2(encoding) if isinstance(encoding, Rank2) else _mixture(encoding)
    (time, *_) = _times(encoding.clock, token)
    power = [[encoding.orientation * time * entry for entry in row] for row in generator]
    steps = math.ceil(max(sum(map(abs, row)) for row in power)) + 1
    for _ in range(steps):
        term = total = vector
        for k in range(1, 24):
            term = [math.fsum(map(operator.mul, row, term)) / (k * steps) for row in power]
            total = [whole + part for whole, part in zip(total, term, strict=True)]
        vector = total
    return vector


def _rank2(encoding: Rank2) -> list[list[float]]:
    a, b = (numbers(name, encoding.size) for name in (encoding.a, encoding.b))
    (w,) = _frequencies(encoding.spectrum, 1)
    return [[w * (a[i] * b[k] - b[i] * a[k]) for k in range(encoding.size)] for i in range(encoding.size)]


def _mixture(encoding: NonCommuting) -> list[list[float]]:
    """E L_r E^T for the whole head, E the identity."""
    size = encoding.size
    rows = [numbers(f"{encoding.generator}{encoding.basis}{row}", size) for row in range(size)]
    return [[(rows[i][k] - rows[k][i]) / 2 for k in range(size)] for i in range(size)]


def _angles(rotation: Rotation, token: int) -> list[tuple[float, float]]:
    """Cosine and sine of each plane before orientation."""
    count = rotation.planes.count
    if isinstance(rotation.clock, Tables):
        angles = numbers(f"{rotation.clock.cos}{rotation.clock.sin}{token}", count)
    else:
        assert rotation.spectrum is not None
        times = _times(rotation.clock, token)
        frequencies = _frequencies(rotation.spectrum, count)
        angles = [
            times[axis] * theta for axis, theta in zip(rotation.planes.axes(), frequencies, strict=True)
        ]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _times(clock: Clock, token: int) -> list[float]:
    if isinstance(clock, Steps):
        return [float(token)]
    (slot,) = clock.slots
    streams = [numbers(f"{slot}{axis}", token + 1) for axis in range(AXES)]
    if isinstance(clock, Accumulated):
        return [math.fsum(stream if clock.inclusive else stream[:-1]) for stream in streams]
    return [stream[-1] for stream in streams]


def _frequencies(spectrum: Spectrum, count: int) -> Sequence[float]:
    return numbers(spectrum.slots[0], count) if spectrum.slots else spectrum.at(LENGTH).frequencies(count)


def _slopes(slopes: Slopes) -> Sequence[float]:
    if isinstance(slopes, Uniform):
        return (slopes.slope,)
    return numbers(slopes.slots[0], 2) if slopes.slots else slopes.values()


def _outside(pairs: Sequence[tuple[int, int]], size: int) -> list[int]:
    inside = {coordinate for pair in pairs for coordinate in pair}
    return [coordinate for coordinate in range(size) if coordinate not in inside]
