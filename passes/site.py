"""What detection found: a site that is a position encoding, or a refusal that says why a place is not rewritten."""

from __future__ import annotations

from dataclasses import dataclass

from grape_compile.encoding import Encoding


@dataclass(frozen=True)
class Site:
    """One rotated tensor, or one attention layer with an additive bias.

    `kind` is "rotation" or "bias". `encoding` describes the place as a value of the algebra. `module` is the qualified
    name of the module in the model and `source` the `file:line` of the model's code. `error` is the largest absolute
    difference between the operator and an fp64 replay of the original region (None until verified). `evidence` is
    "proved" when the coefficients were followed back to cos and sin of clock times frequency, "tables" when the tables
    themselves are handed to the operator. `lowering` names what runs in its place.
    """

    kind: str
    encoding: Encoding
    module: str
    source: str
    evidence: str
    error: float | None = None
    lowering: str = "none"


@dataclass(frozen=True)
class Refusal:
    """A place that looks like a position encoding and is left exactly as it was.

    `rule` names the test that failed, `reason` is a sentence a person can act on, `node` the graph node, `nearest` the
    encoding it came closest to (a sentence), or "".
    """

    rule: str
    reason: str
    node: str
    module: str
    source: str
    nearest: str = ""
