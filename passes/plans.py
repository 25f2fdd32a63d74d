"""What detection hands to rewriting: plans (this value becomes that operator call) and misses (why not)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from grape_compile.encoding import Multiplicative, Rotation
from grape_compile.passes.elements import Reader
from grape_compile.passes.graph import Program
from grape_compile.passes.operands import Emitter, Operand
from grape_compile.passes.replay import Replay
from grape_compile.passes.terms import Factor, Index


@dataclass(frozen=True)
class RotationPlan:
    """A rotation found: `output` equals `encoding` applied to `input` with `operands` in the slots of `operator`.

    `encoding` describes, `operator` is what is called: it reads frequencies and positions from slots, so that a model
    may change them. `region` are the activations from `input` to `output`. Plans of equal `key` compute the same
    function of their input. `order` puts the channels last, where they are not.
    """

    input: fx.Node
    output: fx.Node
    encoding: Multiplicative
    operator: Multiplicative
    operands: tuple[Operand, ...]
    evidence: str
    region: tuple[fx.Node, ...]
    order: tuple[int, ...]
    key: object = None

    @property
    def inverse(self) -> list[int]:
        """What undoes `order`."""
        return [self.order.index(axis) for axis in range(len(self.order))]

    def emit(self, emitter: Emitter, source: fx.Node) -> tuple[fx.Node, ...]:
        """The tensors in the slots of the operator, for `source`: the input with its axes in `order`."""
        assert isinstance(self.operator, Rotation)
        planes = self.operator.planes.count
        return tuple(emitter.rotated(operand, source, planes) for operand in self.operands)


@dataclass(frozen=True)
class Miss:
    """Why a candidate is no rotation: the rule it broke, in a sentence, and how far it came (higher is nearer)."""

    rule: str
    reason: str
    depth: int
    nearest: str = ""


@dataclass(frozen=True)
class Entry:
    """One coefficient of the per-token matrix: output channel, input channel, number, and position-side factors."""

    out: int
    source: int
    number: float
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class Reading:
    """A candidate as it was read: the sampled target positions `lead` of a map from `source` to `output`.

    `lead` and `shape` are those of both with their axes in `order`, which puts the channels last.
    """

    program: Program
    replay: Replay
    reader: Reader
    source: fx.Node
    output: fx.Node
    region: tuple[fx.Node, ...]
    lead: Index
    shape: tuple[int, ...]
    order: tuple[int, ...]
