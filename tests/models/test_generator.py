"""The generator of programs itself: its words mean what they say, its edits change nothing, its failures are small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generated import edits, runs, spoils
from generated.attentions import BIASED, PLAIN
from generated.biases import ALIBI, SLOPES, WRONG, BiasWord
from generated.clocks import CLOCKS, PRODUCTS, geometric
from generated.edits import Edit
from generated.judge import Wrong, drawn
from generated.program import Angles, Program, Shape, Side, arguments, conversions, load
from generated.spoils import Spoil
from generated.tally import Tally
from generated.truth import Truth, linearity, of_side
from generated.turns import TURNS, Turn
from torch import Tensor

from grape_compile.passes import rewrite_rotations

turns = pytest.mark.parametrize("turn", TURNS, ids=lambda turn: turn.name)


def program_of(turn: Turn, **changes: Any) -> Program:
    """Queries and keys turned by one word."""
    convert = None if turn.form == "angle" else conversions(turn.form, turn.pairs)[0]
    side = Side(turn, convert)
    angles = Angles(CLOCKS[0], geometric, "buffer", PRODUCTS[0])
    plain = Program(Shape(), PLAIN[0], angles, side, side)
    return dataclasses.replace(plain, **changes)


def output_of(program: Program) -> Tensor:
    """What the program computes in float64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result: Tensor = drawn(load(program).model().eval())(*arguments(program, 2, program.length))
        return result
    finally:
        torch.set_default_dtype(usual)


@turns
def test_a_word_turns_as_it_says(turn: Turn) -> None:
    for shape in (Shape(), Shape(dim=12, width=4, offset=4), Shape(heads_last=turn.anywhere)):
        program = program_of(turn, shape=shape)
        assert of_side(program, load(program), "query") is Truth.TRUE


@turns
def test_a_wrong_word_is_told(turn: Turn) -> None:
    """Some changes of one thing leave a rotation, most do not."""
    assert any(
        truth_of_spoiled(turn, kind, place) is Truth.FALSE for kind in spoils.KINDS for place in range(3)
    )


def truth_of_spoiled(turn: Turn, kind: str, place: int) -> Truth | None:
    """None where the spoilt program does not run."""
    program = program_of(turn, spoil=Spoil("query", kind, place))
    try:
        return of_side(program, load(program), "query")
    except (RuntimeError, TypeError, IndexError, NameError):
        return None


@pytest.mark.parametrize("word", ALIBI, ids=lambda word: word.name)
def test_a_right_bias_is_slope_times_key(word: BiasWord) -> None:
    assert linearity(2, word.function) is Truth.TRUE


@pytest.mark.parametrize("word", WRONG, ids=lambda word: word.name)
def test_a_wrong_bias_is_none(word: BiasWord) -> None:
    if word.function.__code__.co_varnames[: word.function.__code__.co_argcount] == ("slopes", "length"):
        assert linearity(2, word.function) is Truth.FALSE


@pytest.mark.parametrize("kind", edits.KINDS)
def test_an_edit_changes_the_text_and_not_the_meaning(kind: str) -> None:
    changed = 0
    for name in ("of_parts", "every_two", "rolled"):
        turn = next(turn for turn in TURNS if turn.name == name)
        plain = program_of(turn, attention=BIASED[5], bias=ALIBI[0], slopes=SLOPES[0])
        wanted = output_of(plain)
        for place in (0, 5):
            edited = dataclasses.replace(plain, edits=(Edit(kind, place),))
            if edited.source() != plain.source():
                changed += 1
                torch.testing.assert_close(output_of(edited), wanted, rtol=1e-12, atol=1e-12)
    assert changed > 0


# A failure is shrunk and printed as code.


def smallest(failure: pytest.ExceptionInfo[Wrong]) -> str:
    return "\n".join(failure.value.__notes__)


def test_a_failing_program_is_shrunk_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(program: Program) -> Tally:
        if "torch.roll(" in program.source():
            raise Wrong("planted")
        return Tally(programs=1)

    monkeypatch.setattr(runs, "judge", judge)
    with pytest.raises(Wrong, match="planted") as failure:
        runs.run(0, 1000, Tally())
    printed = smallest(failure)
    assert "def by_roll_" in printed
    assert "class Model(nn.Module):" in printed
    assert len([line for line in printed.splitlines() if line.strip()]) <= 80
    assert printed.count("torch.roll(") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_broken_pass_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rotation is rewritten into the opposite one, unverified: a small program shows it."""
    rotations: Callable[..., Any] = getattr(rewrite_rotations, "detect_rotations")  # noqa: B009 - not exported there

    def opposite(*args: Any) -> Any:
        found, misses = rotations(*args)
        turned = [
            dataclasses.replace(
                plan, operator=dataclasses.replace(plan.operator, orientation=-plan.operator.orientation)
            )
            for plan in found
        ]
        return turned, misses

    monkeypatch.setattr(rewrite_rotations, "detect_rotations", opposite)
    monkeypatch.setattr(rewrite_rotations, "verify_rotation", lambda *_: 0.0)
    with pytest.raises(Wrong) as failure:
        runs.run(0, 50, Tally())
    printed = smallest(failure)
    assert "class Model(nn.Module):" in printed
    assert len([line for line in printed.splitlines() if line.strip()]) <= 80
