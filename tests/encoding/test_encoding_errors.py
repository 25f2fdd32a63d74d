"""What the constructors and the parser refuse, and that each message says what would work."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial as call
from typing import Any

import pytest

from grape_compile.encoding import (
    Accumulated,
    AlibiSlopes,
    Axes,
    Bias,
    ByParts,
    Compose,
    Constant,
    DynamicNtk,
    Gate,
    Geometric,
    Half,
    Interleaved,
    Learned,
    Linear,
    Llama3,
    LogSigmoid,
    Longrope,
    NonCommuting,
    Ntk,
    Pairs,
    Partial,
    PathBias,
    PerPlane,
    Positions,
    Proportional,
    Rank2,
    Rotation,
    Scaled,
    Steps,
    Table,
    Tables,
    Tiled,
    Uniform,
    Yarn,
    alibi,
    axial_rope,
    describe_frequencies,
    describe_slopes,
    mrope,
    parse,
    rope,
)
from grape_compile.errors import EncodingError

NAN, INF = float("nan"), float("inf")
turning = call(Rotation, Half(4), Geometric(1e4), Steps())
# The wrong types below are what is tested; `Any` lets them through.
anything: Any = call

REFUSED: list[tuple[Callable[[], object], str]] = [
    (call(Half, 7), "an even size"),
    (call(Interleaved, 0), "2 or more"),
    (anything(Half, 4.0), "a whole number"),
    (anything(Half, True), "a whole number"),
    (call(rope, 63), "an even size"),
    (call(rope, 64, rotary_dim=96), "at most 64"),
    (call(Partial, Half(4), 6, 8), "between 0 and 4"),
    (call(Partial, Half(4), -1, 8), "0 or more"),
    (call(Pairs, ((0, 1), (1, 2)), 4), "do not overlap"),
    (call(Pairs, ((0, 0),), 4), "do not overlap"),
    (call(Pairs, ((0, 4),), 4), "below the size of the head, 4"),
    (call(Pairs, (), 4), "one or more pairs"),
    (anything(Pairs, ((0, 1, 2),), 4), "one or more pairs"),
    (call(Pairs, ((-1, 1),), 4), "one or more pairs"),
    (call(Axes, Half(4), (0,)), "each of the 2 planes"),
    (call(Axes, Half(4), (0, -1)), "0 or more"),
    (call(Axes, Axes(Half(4), (0, 1)), (0, 1)), "no axes yet"),
    (call(Geometric, 0.0), "above 0"),
    (call(Geometric, NAN), "above 0"),
    (anything(Geometric, "10000"), "above 0"),
    (call(Geometric, 10**400), "above 0"),
    (call(Linear, 0.0), "above 0"),
    (call(Yarn, 4.0, 4096, 1.0, 32.0), "more turns than beta_slow"),
    (call(Llama3, 8.0, 4.0, 1.0, 8192), "fewer turns than high"),
    (call(Scaled, Linear(2.0), Table("inv_freq")), "in closed form"),
    (anything(Scaled, 2.0, Geometric(1e4)), "linear, llama3, longrope, ntk, per_plane, proportional, yarn"),
    (call(DynamicNtk, 0.0, 4096), "above 0"),
    (call(DynamicNtk, 2.0, 0), "1 or more"),
    (call(Scaled(DynamicNtk(2.0, 64), Geometric(1e4)).frequencies, 4), "at(length)"),
    (call(ByParts, 4.0, 3.0, 3.0), "an index below high"),
    (call(PerPlane, (1.0, 0.0)), "above 0"),
    (call(PerPlane, ()), "one or more"),
    (call(Scaled(PerPlane((1.0, 2.0)), Geometric(1e4)).frequencies, 4), "as many factors as planes"),
    (call(Longrope, (1.0, 1.0), (4.0,), 64), "2 factors, as many as short has"),
    (call(Longrope, (1.0, -1.0), (4.0, 4.0), 64), "above 0"),
    (call(Scaled(Longrope((1.0,), (4.0,), 64), Geometric(1e4)).frequencies, 1), "at(length)"),
    (call(Proportional, -1), "0 or more"),
    (call(Scaled, Ntk(2.0), Tiled(Geometric(1e4), 2)), "tiled goes around scaled"),
    (call(Tiled, Table("inv_freq"), 2), "all the frequencies"),
    (call(Tiled, Geometric(1e4), 0), "1 or more"),
    (call(Tiled(Geometric(1e4), 3).frequencies, 4), "as many planes for each axis"),
    (call(axial_rope, 8, 3), "as many planes for each axis"),
    (call(axial_rope, 8, 0), "1 or more"),
    (call(mrope, 8, (2, 1)), "each of the 4 planes"),
    (call(Rank2, 1, Geometric(1.0), Steps()), "2 or more"),
    (call(Rank2, 4, Scaled(Yarn(4.0, 64), Geometric(1e4)), Steps()), "two or more frequencies"),
    (call(Rank2, 4, Tiled(Geometric(1.0), 2), Steps()), "as many planes for each axis"),
    (call(Rank2, 4, Geometric(1.0), Tables()), "steps, positions or accumulated"),
    (anything(Rank2, 4, 1.0, Steps()), "geometric, learned, scaled, table, tiled"),
    (call(Rank2, 4, Learned("a"), Steps()), "a name of its own"),
    (call(Rank2, 4, Geometric(1.0), Steps(), a="x", b="x"), "a name of its own"),
    (call(Rank2, 4, Geometric(1.0), Steps(), 0), "1 or -1"),
    (call(NonCommuting, 0, Steps()), "1 or more"),
    (call(NonCommuting, 4, Tables()), "steps, positions or accumulated"),
    (call(NonCommuting, 4, Steps(), 3), "1 or -1"),
    (call(NonCommuting, 4, Steps(), basis="generator"), "a name of its own"),
    (call(NonCommuting, 4, Steps(), generator="a b"), "letters"),
    (call(Compose, (rope(4), NonCommuting(6, Steps()))), "rotations of one head size"),
    (call(Table, ""), "letters"),
    (call(Learned, "a b"), "letters"),
    (call(Positions, 'n"'), "letters"),
    (anything(Accumulated, "phase", 1), "true or false"),
    (call(Tables, "cos", "cos"), "a name of its own"),
    (call(turning, scale=0.0), "above 0"),
    (call(turning, scale=NAN), "above 0"),
    (call(turning, scale=INF), "above 0"),
    (call(turning, orientation=0), "1 or -1"),
    (call(turning, orientation=2), "1 or -1"),
    (anything(turning, orientation=1.0), "1 or -1"),
    (call(turning, out=Half(6)), "2 planes in a head of 4"),
    (call(turning, out=Partial(Half(2), 0, 4)), "2 planes in a head of 4"),
    (call(turning, basis="not a name"), "letters"),
    (call(Rotation, Half(4), None, Steps()), "or tables as the clock"),
    (call(Rotation, Half(4), Geometric(1e4), Tables()), "none as the spectrum"),
    (call(Rotation, Axes(Half(4), (0, 1)), Geometric(1e4), Steps()), "positions for planes of several axes"),
    (call(Rotation, Half(4), Table("x"), Positions("x")), "a name of its own"),
    (call(Rotation, Half(4), Table("x"), Positions("n"), out=Axes(Half(4), (0, 1))), "belong to the input"),
    (anything(Rotation, "half(4)", Geometric(1e4), Steps()), "axes, half, interleaved, pairs, partial"),
    (turning(basis="e").inverse, "the transposed basis"),
    (call(AlibiSlopes, 0), "1 or more"),
    (call(Constant, ()), "one or more finite numbers"),
    (call(Constant, (1.0, INF)), "one or more finite numbers"),
    (call(Bias, AlibiSlopes(2), Tables()), "steps, positions or accumulated"),
    (anything(Bias, AlibiSlopes(2), Steps(), gate="q"), "gate, or none"),
    (anything(Gate), "a tensor for the query, the key or both"),
    (anything(Gate, query="2 b"), "a name of ASCII letters"),
    (anything(Uniform, math.inf), "a finite number"),
    (anything(PathBias, AlibiSlopes(2), LogSigmoid(), 4), "one of identity, log_sigmoid, negative_exp"),
    (anything(PathBias, LogSigmoid(), AlibiSlopes(2), 0), "a whole number, 1 or more"),
    (anything(PathBias, LogSigmoid(), AlibiSlopes(2), 4, "queries"), "one of none, keys, both"),
    (anything(PathBias, LogSigmoid(), AlibiSlopes(2), 4, turn=rope(6)), "a rotation of 4 coordinates"),
    (anything(PathBias, LogSigmoid(), AlibiSlopes(2), 4, query="p", key="p"), "a name of its own"),
    (anything(Bias, Geometric(1e4), Steps()), "alibi_slopes, constant, learned, table"),
    (Bias(Learned("beta"), Steps()).inverse, "reading them from the tensor"),
    (call(Table("inv_freq").frequencies, 4), "reading them from the tensor"),
    (call(Compose, ()), "one or more values of encoding"),
    (call(Compose, (rope(4), rope(8))), "rotations of one head size"),
    (anything(Compose, (rope(4), Half(4))), "one or more values of encoding"),
    (call(describe_frequencies, [], 4, 1e-6), "1 to count values"),
    (call(describe_frequencies, [1.0, 0.1], 1, 1e-6), "1 to count values"),
    (call(describe_frequencies, [1.0], 1, NAN), "positive relative tolerance"),
    (call(describe_slopes, [NAN], 1e-6), "one or more finite numbers"),
]


@pytest.mark.parametrize(("build", "works"), REFUSED)
def test_refused(build: Callable[[], object], works: str) -> None:
    with pytest.raises(EncodingError) as caught:
        build()
    assert works in caught.value.works
    assert all(str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "found", "works"),
    [
        ("", "no expression", "call syntax"),
        ("rotation(", "no expression", "call syntax"),
        ("nope\0", "no expression", "call syntax"),
        ("(" * 500 + ")" * 500, "no expression", "call syntax"),
        ("rotatoin(half(4), geometric(1e4), steps)", "does not have", "rotation"),
        ("rope", "does not have", "nope"),
        (
            "half(4)",
            "a part of an encoding",
            "bias, compose, non_commuting, nope, path_bias, rank2, rotation",
        ),
        ("none", "a part of an encoding", "rotation"),
        ("rotation(half(4))", "(half(4))", "rotation(planes, spectrum, clock, orientation=..."),
        ("rotation(half(4), geometric(1e4), steps, turn=1)", "turn=1", "orientation=..."),
        ("rotation(half(4), geometric(1e4), steps, clock=steps)", "clock=steps", "clock"),
        ("nope(1)", "(1)", "nope without arguments"),
        ("bias(*alibi_slopes(2), steps)", "Starred", "calls of known names"),
        ("bias(**x)", "(**x)", "slopes"),
        ("bias(alibi_slopes(1 + 1), steps)", "BinOp", "calls of known names"),
        ("bias(alibi_slopes(-true), steps)", "UnaryOp", "calls of known names"),
        ("bias(alibi_slopes(2), steps).inverse()", "Call", "calls of known names"),
        ("bias(alibi_slopes(2j), steps)", "Constant", "calls of known names"),
        ("bias(alibi_slopes(b'2'), steps)", "Constant", "calls of known names"),
        ("bias([x for x in y], steps)", "ListComp", "calls of known names"),
        ("rotation(half(7), geometric(1e4), steps)", "size = 7", "an even size"),
    ],
)
def test_refused_texts(text: str, found: str, works: str) -> None:
    with pytest.raises(EncodingError) as caught:
        parse(text)
    assert found in caught.value.found
    assert works in caught.value.works


def test_the_message_shows_all_three_parts() -> None:
    with pytest.raises(EncodingError) as caught:
        Half(7)
    assert str(caught.value) == (
        "asked: half with size\nfound: size = 7\nwould work: an even size: a plane takes two coordinates"
    )


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(EncodingError) as caught:
        Pairs(tuple((j, j) for j in range(100)), 200)
    assert len(caught.value.found) < 120


def test_one_name_may_serve_one_purpose_in_several_parts() -> None:
    assert Compose(
        (Rotation(Half(4), Geometric(1e4), Positions("n")), Bias(AlibiSlopes(2), Positions("n")))
    ).slots == ("n",)
    with pytest.raises(EncodingError, match=r"positions\.slot and as accumulated\.slot"):
        Compose(
            (Rotation(Half(4), Geometric(1e4), Positions("n")), Bias(AlibiSlopes(2), Accumulated("n", True)))
        )
    assert alibi(2).slots == ()
