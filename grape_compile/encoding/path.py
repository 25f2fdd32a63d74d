"""Path integrals: a bias that sums what lies between key and query (GRAPE-AP, GRAPE 5)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, replace

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT, Encoding, Term, check_roles
from grape_compile.encoding.rotation import Rotation
from grape_compile.encoding.slopes import Slopes

#: Which sides of the product an encoding divides by their root mean square.
SIDES = ("none", "keys", "both")


@dataclass(frozen=True, slots=True)
class Link(Term, ABC):
    """What becomes of the product of a query and an edge before it is summed: the g of GRAPE 5.1."""


@dataclass(frozen=True, slots=True)
class LogSigmoid(Link):
    """g(x) = log(1 / (1 + exp(-x))): never positive, so the bias falls with the distance (GRAPE 5.2)."""


@dataclass(frozen=True, slots=True)
class NegativeExp(Link):
    """g(x) = -exp(x): never positive, without a floor on the decay of an edge that points away."""


@dataclass(frozen=True, slots=True)
class Identity(Link):
    """g(x) = x: the sum of the products themselves, of either sign."""


@dataclass(frozen=True, slots=True)
class PathBias(Encoding):
    """Adds b[h, t, j] = slope_h * sum_{l = j+1 ... t} g(<p_t, R_l r_l> / dim) to the logits of j <= t (GRAPE 5.1-5.2).

    `query` names p [B, H, T_q, dim], `key` names r [B, H, T_k, dim]; the sum is empty for j = t and includes
    l = t otherwise. `turn` is the rotation R_l of the keys, in GRAPE-AP every plane by l radians; None: the
    tensor holds R_l r_l already, as a cache does. `normalised` says which sides the encoding divides by their
    root mean square first: "none", "keys" (the authors' code) or "both" (the paper). Causal only: for j > t
    there is no path.
    """

    link: Link
    slopes: Slopes
    dim: int
    normalised: str = "none"
    turn: Rotation | None = None
    query: str = field(default="path_query", metadata=SLOT)
    key: str = field(default="path_key", metadata=SLOT)

    def __post_init__(self) -> None:
        checks.member(self, "link", Link)
        checks.member(self, "slopes", Slopes)
        checks.whole(self, "dim", 1)
        checks.choice(self, "normalised", SIDES)
        checks.member(self, "turn", Rotation, optional=True)
        if self.turn is not None and self.turn.head_dim != self.dim:
            checks.refuse(self, "turn", f"a rotation of {self.dim} coordinates, as many as `dim`")
        checks.slot(self, "query")
        checks.slot(self, "key")
        check_roles(self)

    def inverse(self) -> PathBias:
        """Return the bias of opposite slopes; EncodingError for slopes that only a tensor has."""
        return replace(self, slopes=self.slopes.negated())

    def canonical(self) -> PathBias:
        """Return the one path bias of this meaning: simplest slopes and turn."""
        turn = None if self.turn is None else self.turn.canonical()
        return replace(self, slopes=self.slopes.canonical(), turn=turn)
