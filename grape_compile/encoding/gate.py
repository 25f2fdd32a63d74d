"""Gates: slopes that depend on the content of query and key (GRAPE 4.6)."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT, Term, check_roles


@dataclass(frozen=True, slots=True)
class Gate(Term):
    """Multiplies the slope by lam_q[t] + lam_k[j], or by the one that is named (GRAPE-A-Q, -K, -QK; GRAPE 4.6).

    `query` names the tensor of lam_q [B, H, T_q], `key` that of lam_k [B, H, T_k]: finished numbers, such as
    softplus(v_h . q_t / sqrt(d)); what makes them stays with the model. None: that term is not there.
    """

    query: str | None = field(default=None, metadata=SLOT)
    key: str | None = field(default=None, metadata=SLOT)

    def __post_init__(self) -> None:
        if self.query is None and self.key is None:
            checks.refuse(self, "query", "the name of a tensor for the query, the key or both")
        for name in ("query", "key"):
            if getattr(self, name) is not None:
                checks.slot(self, name)
        check_roles(self)
