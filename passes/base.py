"""A pass: a frozen value with what it requires, what it does and what it ensures, checked by the caller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import fx

from grape_compile.errors import CaptureError
from grape_compile.passes.graph import Program
from grape_compile.passes.site import Refusal, Site


@dataclass
class Outcome:
    """What a pass found and did. `modified` is measured by the base class, not promised by the pass.

    `absorbed` are sites of earlier passes that became part of a site of this one.
    """

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    modified: bool = False
    absorbed: list[Site] = field(default_factory=list)


@dataclass(frozen=True)
class Pass(ABC):
    """One step over a program. Subclasses implement `run`; `requires` and `ensures` raise CaptureError when broken."""

    def requires(self, program: Program) -> None:  # noqa: B027 - most passes require nothing
        """Conditions before the pass; none by default."""

    @abstractmethod
    def run(self, program: Program) -> Outcome:
        """Do the work, changing `program.module` in place."""

    def ensures(self, program: Program) -> None:
        """Conditions after the pass: the graph is well formed."""
        program.graph.lint()

    def __call__(self, program: Program) -> Outcome:
        """Check, run, measure whether the graph changed, check again."""
        self.requires(program)
        before = _snapshot(program.graph)
        outcome = self.run(program)
        outcome.modified = _snapshot(program.graph) != before
        if outcome.modified:
            program.forget()
            self.ensures(program)
            program.module.recompile()
        return outcome


def _snapshot(graph: fx.Graph) -> list[tuple[object, ...]]:
    """Differs whenever a node, its operator or its operands changed: arguments of a node are never changed in place."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def broken(what: str, found: str) -> CaptureError:
    """The error of a condition that does not hold: a defect of this library, never a user's mistake."""
    return CaptureError(what, found, "the original model runs unchanged; please report this graph")
