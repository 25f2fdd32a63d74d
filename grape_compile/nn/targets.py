"""From the encoding that a layer has to the trainable one that takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grape_compile.encoding import AlibiSlopes, Nope, Rotation
from grape_compile.errors import GrapeError, UpgradeError
from grape_compile.nn.forget import ForgetGate
from grape_compile.nn.path import PathEdges
from grape_compile.nn.rotation import LearnedRotation, MixedRotation
from grape_compile.nn.slopes import GatedSlopes
from grape_compile.nn.trainable import Fixed, Sum, TrainableEncoding

#: Targets that turn queries and keys, and targets that add to the logit.
TURNING: Final = ("grape-m", "grape-m-ctx")
ADDING: Final = ("grape-a-q", "grape-a-k", "grape-a-qk", "fox", "grape-ap")
_FORMS: Final = f"{', '.join((*TURNING, *ADDING))}, nope, or a sum such as grape-m+grape-ap"
#: How steep, of ALiBi's slopes, what is added beside a rotation begins: what the layer computes barely changes.
BESIDE: Final = 1e-3


@dataclass(frozen=True, eq=False)
class Origin:
    """What a layer has: `heads` of `head_dim`, hidden states of `hidden_size`, a rotation by `frequencies` or `slopes`.

    `alike`: all that turns has the planes of `rotation`. Where attention is not causal distances are symmetric.
    """

    hidden_size: int
    heads: int | None = None
    head_dim: int | None = None
    key_heads: int | None = None
    rotation: Rotation | None = None
    alike: bool = True
    frequencies: Tensor | None = None
    slopes: Tensor | None = None
    is_causal: bool = True


@dataclass(frozen=True)
class Target:
    """What layers get: `parts` by name; the options that belong to them."""

    parts: tuple[str, ...]
    basis: str | None = None
    per_head: bool = False
    non_commuting: int | None = None
    dim: int = 8

    @classmethod
    def read(cls, to: str, basis: str | None, per_head: bool, non_commuting: int | None, dim: int) -> Target:
        """A target from its text; UpgradeError for one that does not exist and for options that belong to another."""
        parts = tuple(str(to).split("+"))
        known = all(part in (*TURNING, *ADDING, "nope") for part in parts)
        turning = [part for part in parts if part in TURNING]
        if not known or len(set(parts)) < len(parts) or ("nope" in parts and len(parts) > 1):
            raise UpgradeError("upgrade a model", f"to={to!r}", _FORMS)
        if len(turning) > 1 or sum(part.startswith("grape-a-") for part in parts) > 1:
            raise UpgradeError("upgrade a model", f"to={to!r}, which names one kind twice", _FORMS)
        target = cls(parts, basis, per_head, non_commuting, dim)
        options = {"basis": basis, "per_head": per_head or None, "non_commuting": non_commuting}
        given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        if given and "grape-m" not in parts and not (parts[0] == "grape-m-ctx" and non_commuting is None):
            raise UpgradeError(f"upgrade a model to {to}", ", ".join(given), "these options for grape-m")
        if per_head and (basis is not None or non_commuting is not None):
            raise UpgradeError(
                f"upgrade a model to {to}", "a spectrum for each head and a basis of all", "one of the two"
            )
        if dim < 1 or (dim != 8 and "grape-ap" not in parts):
            raise UpgradeError(f"upgrade a model to {to}", f"dim={dim}", "dim of at least 2, for grape-ap")
        return target

    def __str__(self) -> str:
        return "+".join(self.parts)

    @property
    def adds(self) -> bool:
        """Whether it adds to the logit."""
        return any(part in ADDING for part in self.parts)

    @property
    def turns(self) -> bool:
        """Whether it turns queries and keys."""
        return any(part in TURNING for part in self.parts)

    def for_layer(self, origin: Origin, module: str) -> TrainableEncoding:
        """The trainable encoding of a layer; UpgradeError where the layer cannot have it."""
        if self.turns and origin.rotation is None:
            raise UpgradeError(
                f"upgrade {module} to {self}",
                "a layer that turns neither queries nor keys, but adds to its logits",
                ", ".join((*ADDING, "nope")),
            )
        if self.adds and origin.heads is None:
            raise UpgradeError(
                f"upgrade {module} to {self}", "an attention that cannot be read", "grape-m, which leaves it"
            )
        try:
            parts = {name.replace("-", "_"): self._part(name, origin) for name in self.parts}
        except UpgradeError:
            raise
        except GrapeError as failure:
            raise UpgradeError(
                f"upgrade {module} to {self}", f"{failure.asked}: {failure.found}", failure.works
            ) from failure
        return next(iter(parts.values())) if len(parts) == 1 else Sum(parts)

    def _part(self, name: str, origin: Origin) -> TrainableEncoding:
        if name in TURNING:
            return self._turning(name, origin)
        if name == "nope":
            return Fixed(Nope())
        size, heads, slopes = origin.hidden_size, origin.heads, origin.slopes
        assert heads is not None
        assert origin.head_dim is not None
        # Of several encodings the first starts as the layer was, the others add next to nothing.
        if name != self.parts[0]:
            slopes = BESIDE * torch.tensor(AlibiSlopes(heads).values())
        if name == "grape-ap":
            if not origin.is_causal:
                raise UpgradeError(
                    f"edges of {self}",
                    "an attention that is not causal in this example",
                    "fox or grape-a-qk, whose distances can be symmetric; a path leads from a key to a later query",
                )
            return PathEdges(size, heads, self.dim, slopes=slopes, factor=1.0)
        if name == "fox":
            return ForgetGate(size, heads, slopes=slopes, symmetric=not origin.is_causal)
        gates = name.removeprefix("grape-a-")
        return GatedSlopes(
            heads,
            origin.head_dim,
            slopes,
            query="q" in gates,
            key="k" in gates,
            unit=slopes is None,
            symmetric=not origin.is_causal,
        )

    def _turning(self, name: str, origin: Origin) -> TrainableEncoding:
        rotation = origin.rotation
        assert rotation is not None
        if not origin.alike and (self.basis is not None or self.non_commuting is not None):
            raise UpgradeError(
                f"a basis of {rotation}",
                "queries and keys that turn in different planes or heads of different size",
                "basis=None and non_commuting=None",
            )
        if self.non_commuting is not None:
            return MixedRotation(rotation, self.non_commuting, origin.frequencies, basis=self.basis)
        heads = origin.key_heads if self.per_head else None
        context = origin.hidden_size if name == "grape-m-ctx" else None
        return LearnedRotation(rotation, origin.frequencies, heads=heads, basis=self.basis, context=context)
