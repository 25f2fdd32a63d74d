"""How each kind of encoding acts: one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from grape_compile.encoding import Encoding, Multiplicative, NonCommuting, Rank2, Rotation
from grape_compile.operators.action import Action
from grape_compile.operators.non_commuting import Mixing
from grape_compile.operators.planar import Planar
from grape_compile.operators.rank2 import Plane

ACTIONS: Final[Mapping[type[Encoding], Callable[[Any], Action]]] = {
    Rotation: Planar,
    Rank2: Plane,
    NonCommuting: Mixing,
}


@lru_cache(maxsize=1024)
def action_of(encoding: Multiplicative) -> Action:
    """Return how an encoding acts."""
    return ACTIONS[type(encoding)](encoding)
