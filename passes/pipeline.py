"""All passes over a program and over the graphs inside of it, in their order."""

from __future__ import annotations

from grape_compile.errors import first_line
from grape_compile.passes.assignments import FunctionalAssignments
from grape_compile.passes.base import Outcome
from grape_compile.passes.bodies import Body, bodies_of
from grape_compile.passes.drop_nothing import DropNothing
from grape_compile.passes.graph import Program
from grape_compile.passes.loosen_views import LoosenViews
from grape_compile.passes.note_given_tables import NoteGivenTables
from grape_compile.passes.rewrite_biases import RewriteBiases
from grape_compile.passes.rewrite_rotations import RewriteRotations
from grape_compile.passes.site import Refusal

_PASSES = (
    FunctionalAssignments(),
    DropNothing(),
    RewriteRotations(),
    RewriteBiases(),
    NoteGivenTables(),
    LoosenViews(),
)


def rewrite_program(program: Program) -> Outcome:
    """All passes that find and replace, in place. A defect of theirs becomes a refusal."""
    try:
        found = _run(program)
        for body in bodies_of(program):
            inside = _rewrite_body(body)
            found.sites += inside.sites
            found.refusals += inside.refusals
    except Exception as failure:
        return Outcome(refusals=[defect(failure)])
    return found


def defect(failure: Exception) -> Refusal:
    """What is told of a failure that is ours."""
    reason = (
        f"a pass of grape_compile failed ({first_line(failure)}); the original runs unchanged: report this"
    )
    return Refusal("defect", reason, "", "", "")


def _run(program: Program) -> Outcome:
    whole = Outcome()
    for step in _PASSES:
        outcome = step(program)
        whole.sites = [
            site for site in whole.sites if not any(site is part for part in outcome.absorbed)
        ] + outcome.sites
        whole.refusals += outcome.refusals
    return whole


def _rewrite_body(body: Body) -> Outcome:
    """What a condition or a loop runs; of what another operator runs it is only said that something is there."""
    found = rewrite_program(body.program)
    if not body.may_change:
        places = [*(str(site.encoding) for site in found.sites), *(each.nearest for each in found.refusals)]
        return Outcome(refusals=[body.refusal(place or "a position encoding") for place in places])
    if found.sites:
        body.put_back()
    return found
