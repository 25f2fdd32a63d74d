"""All passes over a program and over the graphs inside of it, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.export import ExportedProgram

from grape_compile.errors import UpgradeError, first_line
from grape_compile.passes.assignments import FunctionalAssignments
from grape_compile.passes.base import Outcome, Pass
from grape_compile.passes.bodies import Body, bodies_of
from grape_compile.passes.capture import capture_export, release_export
from grape_compile.passes.drop_nothing import DropNothing
from grape_compile.passes.graph import Program
from grape_compile.passes.loosen_views import LoosenViews
from grape_compile.passes.marks import marks_of
from grape_compile.passes.move_sites import MoveSites
from grape_compile.passes.note_given_tables import NoteGivenTables
from grape_compile.passes.rewrite_biases import RewriteBiases
from grape_compile.passes.rewrite_rotations import RewriteRotations
from grape_compile.passes.site import Refusal

_PASSES: Sequence[Pass] = (
    FunctionalAssignments(),
    DropNothing(),
    RewriteRotations(),
    RewriteBiases(),
    MoveSites(),
    NoteGivenTables(),
    LoosenViews(),
)


def rewrite_program(program: Program, *, every_attention: bool = False) -> Outcome:
    """All passes that find and replace, in place. A defect of theirs becomes a refusal.

    `every_attention`: also attention that adds no position becomes an operator, for a target that has it.
    Raises UpgradeError for a layer that was upgraded and cannot have its new encoding here.
    """
    every = [RewriteBiases(every_attention) if isinstance(each, RewriteBiases) else each for each in _PASSES]
    try:
        found = _run(program, every)
        for body in bodies_of(program):
            inside = _rewrite_body(body)
            found.sites += inside.sites
            found.refusals += inside.refusals
    except UpgradeError:
        raise
    except Exception as failure:
        return Outcome(refusals=[defect(failure)])
    return found


def defect(failure: Exception) -> Refusal:
    """What is told of a failure that is ours."""
    reason = (
        f"a pass of grape_compile failed ({first_line(failure)}); the original runs unchanged: report this"
    )
    return Refusal("defect", reason, "", "", "")


def rewrite_export(
    program: ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    every_attention: bool = False,
    is_final: bool = False,
) -> tuple[ExportedProgram, Outcome]:
    """An exported program with all passes done, and what they found; itself where they changed nothing.

    `every_attention` as for `rewrite_program`; `is_final`: nobody will load another state into it.
    Raises UpgradeError for layers that were upgraded and cannot have their new encoding here.
    """
    captured = capture_export(program, args, kwargs, is_final=is_final)
    upgraded = bool(marks_of(captured.graph))
    found = rewrite_program(captured, every_attention=every_attention)
    if marks_of(captured.graph):
        raise unmoved(found.refusals)
    return (release_export(program, captured) if found.sites or upgraded else program), found


def unmoved(refusals: Sequence[Refusal]) -> UpgradeError:
    """The failure of a graph with upgraded layers that stays as it was: they would have their old encoding."""
    reasons = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals))
    return UpgradeError(
        "give upgraded layers their encoding",
        f"a graph that cannot be rewritten ({reasons})",
        "a model whose layers are captured whole: see the reason",
    )


def find_sites(program: Program) -> Outcome:
    """The sites of a program as operators, and every attention that can be one, whatever it adds."""
    return _run(
        program, (FunctionalAssignments(), DropNothing(), RewriteRotations(), RewriteBiases(True, looks=True))
    )


def _run(program: Program, passes: Sequence[Pass] = _PASSES) -> Outcome:
    whole = Outcome()
    for step in passes:
        try:
            outcome = step(program)
        except UpgradeError as failure:
            raise _with_reasons(failure, whole.refusals) from None
        whole.sites = [
            site for site in whole.sites if not any(site is part for part in outcome.absorbed)
        ] + outcome.sites
        whole.refusals += outcome.refusals
    return whole


def _with_reasons(failure: UpgradeError, refusals: Sequence[Refusal]) -> UpgradeError:
    """The failure of a layer, and why places of it were not found."""
    reasons = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals))
    return UpgradeError(
        failure.asked, f"{failure.found} ({reasons})" if reasons else failure.found, failure.works
    )


def _rewrite_body(body: Body) -> Outcome:
    """What a condition or a loop runs; of what another operator runs it is only said that something is there."""
    found = rewrite_program(body.program)
    if not body.may_change:
        places = [*(str(site.encoding) for site in found.sites), *(each.nearest for each in found.refusals)]
        return Outcome(refusals=[body.refusal(place or "a position encoding") for place in places])
    if found.sites:
        body.put_back()
    return found
