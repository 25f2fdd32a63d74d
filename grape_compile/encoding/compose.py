"""Several encodings at once, and none."""

from __future__ import annotations

from dataclasses import dataclass

from grape_compile.encoding import checks
from grape_compile.encoding.base import Encoding, Multiplicative, check_roles
from grape_compile.errors import EncodingError


@dataclass(frozen=True, slots=True)
class Nope(Encoding):
    """No position: the generator is zero and G(n) = I (GRAPE, one law with X = 0)."""

    def inverse(self) -> Nope:
        return self

    def canonical(self) -> Nope:
        return self


@dataclass(frozen=True, slots=True)
class Compose(Encoding):
    """All `parts` act: rotations on queries and keys, the first part first; biases add up (GRAPE App. E).

    l[t, j] = (R_t q_t) . (R_j k_j) / sqrt(d) + b[t, j].
    """

    parts: tuple[Encoding, ...]

    def __post_init__(self) -> None:
        checks.members(self, "parts", Encoding)
        sizes = sorted({part.head_dim for part in _flat(self.parts) if isinstance(part, Multiplicative)})
        if len(sizes) > 1:
            raise EncodingError(
                "several rotations of one head",
                f"they are made for head sizes {' and '.join(map(str, sizes))}",
                "rotations of one head size: partial(planes, start, size) places smaller planes in a head",
            )
        check_roles(self)

    def inverse(self) -> Compose:
        """Return the inverse parts in reverse order; EncodingError where a part has no inverse."""
        return Compose(tuple(part.inverse() for part in reversed(self.parts)))

    def canonical(self) -> Encoding:
        """Return the one encoding of this meaning: flat, no `Nope`, rotations in order, then biases by text.

        A single part stands for itself, and no part is `Nope`.
        """
        parts = [part.canonical() for part in _flat(self.parts) if not isinstance(part, Nope)]
        rotations = [part for part in parts if isinstance(part, Multiplicative)]
        others = sorted((part for part in parts if not isinstance(part, Multiplicative)), key=str)
        match ordered := (*rotations, *others):
            case ():
                return Nope()
            case (single,):
                return single
            case _:
                return Compose(ordered)


def _flat(parts: tuple[Encoding, ...]) -> tuple[Encoding, ...]:
    return tuple(
        leaf for part in parts for leaf in (_flat(part.parts) if isinstance(part, Compose) else (part,))
    )
