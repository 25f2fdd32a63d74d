"""Trainable encodings by the names of the field, for a layer of given size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from grape_compile.encoding import Encoding, alibi, nope, rope
from grape_compile.errors import OperandError
from grape_compile.nn.forget import ForgetGate
from grape_compile.nn.path import PathEdges
from grape_compile.nn.rotation import LearnedRotation
from grape_compile.nn.slopes import GatedSlopes
from grape_compile.nn.trainable import Fixed, Sum, TrainableEncoding

_MADE: Final[Mapping[str, Callable[[int, int, int], TrainableEncoding]]] = {
    "nope": lambda hidden, heads, size: Fixed(nope()),
    "rope": lambda hidden, heads, size: Fixed(rope(size)),
    "alibi": lambda hidden, heads, size: Fixed(alibi(heads)),
    "grape-m": lambda hidden, heads, size: LearnedRotation(rope(size)),
    "grape-m-ctx": lambda hidden, heads, size: LearnedRotation(rope(size), context=hidden),
    "grape-a-q": lambda hidden, heads, size: GatedSlopes(heads, size, key=False),
    "grape-a-k": lambda hidden, heads, size: GatedSlopes(heads, size, query=False),
    "grape-a-qk": lambda hidden, heads, size: GatedSlopes(heads, size),
    "fox": lambda hidden, heads, size: ForgetGate(hidden, heads),
    "grape-ap": lambda hidden, heads, size: PathEdges(hidden, heads),
}


def trainable(
    encoding: str | Encoding | TrainableEncoding, hidden_size: int, heads: int, head_dim: int
) -> TrainableEncoding:
    """Return the encoding of a layer as a module: from a name or a sum of names, from an `Encoding`, or as it is.

    The names are "nope", "rope", "alibi", "grape-m", "grape-m-ctx", "grape-a-q", "grape-a-k", "grape-a-qk", "fox" and
    "grape-ap", started as in the authors' models. Raises OperandError for any other.

    >>> str(trainable("rope+fox", 64, 4, 16).encoding)
    'compose((rotation(half(16), geometric(10000.0), steps), bias(uniform(-1.0), accumulated("log_forget", true))))'
    """
    if isinstance(encoding, TrainableEncoding):
        return encoding
    if isinstance(encoding, Encoding):
        return Fixed(encoding)
    names = encoding.split("+")
    unknown = [name for name in names if name not in _MADE]
    if unknown:
        raise OperandError(
            f"the encoding {encoding!r}",
            f"no encoding named {unknown[0]!r}",
            ", ".join(_MADE) + ", or a sum with +",
        )
    parts = {name.replace("-", "_"): _MADE[name](hidden_size, heads, head_dim) for name in names}
    return Sum(parts) if len(parts) > 1 else next(iter(parts.values()))
