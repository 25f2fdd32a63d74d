"""Known values: the public names, texts, canonical forms, ALiBi's slopes and the planes that models use."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

import grape_compile.encoding as algebra
from grape_compile.encoding import (
    Absolute,
    Accumulated,
    AlibiSlopes,
    Axes,
    Bias,
    ByParts,
    Compose,
    Constant,
    DynamicNtk,
    Encoding,
    Euclidean,
    Gate,
    Geometric,
    Half,
    Identity,
    Interleaved,
    Learned,
    Linear,
    Longrope,
    NegativeExp,
    NonCommuting,
    Nope,
    Pairs,
    Partial,
    PathBias,
    PerPlane,
    Planes,
    Positions,
    Proportional,
    Rank2,
    Rotation,
    Scaled,
    Signed,
    Steps,
    Table,
    Tables,
    Tiled,
    Uniform,
    Yarn,
    alibi,
    axial_rope,
    fox,
    gated_alibi,
    grape_ap,
    grape_m,
    mrope,
    nope,
    parse,
    planes_of,
    rope,
)

NAMES = """
    Absolute Accumulated AlibiSlopes Axes Bias ByParts Clock Compose Constant Distance DynamicNtk Encoding
    Euclidean Gate Geometric Half Identity Interleaved Learned Linear Link Llama3 LogSigmoid Longrope
    Multiplicative NegativeExp NonCommuting Nope Ntk Pairs Partial PathBias PerPlane Planes Positions
    Proportional Rank2 Rotation Rule Scaled Signed Slopes Spectrum Steps Table Tables Term Tiled Uniform
    Yarn alibi axial_rope describe_frequencies describe_slopes fox gated_alibi grape_ap grape_m
    longrope_norm_factor mrope nope parse planes_of rope yarn_norm_factor
"""

TEXTS = {
    "rotation(half(64), geometric(10000.0), steps)": rope(64),
    "rotation(interleaved(64), geometric(500000.0), steps)": rope(64, 500000, interleaved=True),
    "rotation(partial(half(32), 0, 64), geometric(10000.0), steps)": rope(64, rotary_dim=32),
    'rotation(partial(half(32), 0, 64), table("inv_freq"), positions("positions"), orientation=-1, '
    'out=partial(interleaved(32), 32, 64), basis="basis", scale=1.25)': Rotation(
        Partial(Half(32), 0, 64),
        Table("inv_freq"),
        Positions("positions"),
        orientation=-1,
        out=Partial(Interleaved(32), 32, 64),
        basis="basis",
        scale=1.25,
    ),
    "rotation(half(4), none, tables)": Rotation(Half(4), None, Tables()),
    'rotation(half(4), none, tables(sin="s"))': Rotation(Half(4), None, Tables(sin="s")),
    'rotation(axes(half(4), (0, 1)), learned("theta"), accumulated("phase", false))': Rotation(
        Axes(Half(4), (0, 1)), Learned("theta"), Accumulated("phase", False)
    ),
    "rotation(pairs(((0, 3),), 4), "
    "scaled(yarn(4.0, 8192, truncate=false), geometric(10000.0)), steps)": Rotation(
        Pairs(((0, 3),), 4), Scaled(Yarn(4, 8192, truncate=False), Geometric(10000)), Steps()
    ),
    "rotation(half(4), scaled(longrope((1.0, 1.25), (1.5, 7.0), 4096), geometric(10000.0)), steps, scale=1.25)": (
        Rotation(Half(4), Scaled(Longrope((1, 1.25), (1.5, 7), 4096), Geometric(10000)), Steps(), scale=1.25)
    ),
    'rotation(half(4), scaled(dynamic_ntk(2.0, 2048), geometric(10000.0)), positions("n"))': Rotation(
        Half(4), Scaled(DynamicNtk(2, 2048), Geometric(10000)), Positions("n")
    ),
    "rotation(half(4), scaled(linear(8.0), scaled(proportional(1), geometric(1000000.0))), steps)": Rotation(
        Half(4), Scaled(Linear(8), Scaled(Proportional(1), Geometric(1e6))), Steps()
    ),
    "rotation(half(4), scaled(by_parts(4.0, 0.0, 1.0), scaled(per_plane((1.0, 2.0)), geometric(10000.0))), steps)": (
        Rotation(Half(4), Scaled(ByParts(4, 0, 1), Scaled(PerPlane((1, 2)), Geometric(10000))), Steps())
    ),
    "bias(alibi_slopes(8), steps)": alibi(8),
    'bias(constant((-0.5,)), positions("n"), distance=euclidean)': Bias(
        Constant((-0.5,)), Positions("n"), distance=Euclidean()
    ),
    "compose((rotation(half(4), geometric(10000.0), steps), "
    "bias(alibi_slopes(2), steps, distance=absolute)))": Compose(
        (rope(4), Bias(AlibiSlopes(2), Steps(), distance=Absolute()))
    ),
    "nope": nope(),
    "rank2(64, geometric(1.0), steps)": Rank2(64, Geometric(1), Steps()),
    'rank2(3, learned("w"), accumulated("phase", false), orientation=-1, a="u", b="v")': Rank2(
        3, Learned("w"), Accumulated("phase", False), -1, "u", "v"
    ),
    "non_commuting(64, steps)": NonCommuting(64, Steps()),
    'non_commuting(7, positions("n"), generator="layers.0.skew")': NonCommuting(
        7, Positions("n"), generator="layers.0.skew"
    ),
    'rotation(axes(interleaved(12), (0, 0, 1, 1, 2, 2)), tiled(geometric(100.0), 3), positions("rc"))': axial_rope(
        12, 3, 100.0, interleaved=True, positions="rc"
    ),
    'rotation(axes(half(8), (0, 0, 1, 2)), geometric(1000000.0), positions("positions"))': mrope(
        8, (2, 1, 1), 1e6
    ),
    'rotation(interleaved(4), learned("theta"), accumulated("rates", false), basis="basis")': grape_m(
        4, basis="basis", rates="rates"
    ),
    'bias(uniform(-1.0), accumulated("log_forget", true))': fox(),
    'bias(alibi_slopes(2), steps, gate=gate(query="gate_query", key="gate_key"))': gated_alibi(2),
    'bias(learned("w"), steps, gate=gate(key="u"))': Bias(Learned("w"), Steps(), Gate(key="u")),
    'path_bias(log_sigmoid, alibi_slopes(2), 4, normalised="keys", '
    "turn=rotation(interleaved(4), geometric(1.0), steps))": grape_ap(2, 4),
    'path_bias(negative_exp, learned("w"), 3, query="p", key="r")': PathBias(
        NegativeExp(), Learned("w"), 3, query="p", key="r"
    ),
    'compose((bias(uniform(-1.0), accumulated("log_forget", true)), '
    "path_bias(identity, uniform(0.5), 2)))": Compose((fox(), PathBias(Identity(), Uniform(0.5), 2))),
}


def test_public_names_are_frozen() -> None:
    assert sorted(algebra.__all__) == NAMES.split()
    assert all(hasattr(algebra, name) for name in algebra.__all__)


@pytest.mark.parametrize(("text", "encoding"), TEXTS.items())
def test_text(text: str, encoding: Encoding) -> None:
    assert str(encoding) == text
    assert parse(text) == encoding


def test_parse_takes_keywords_spaces_and_empty_calls() -> None:
    assert parse(" rotation(planes=half(size=4), spectrum=geometric(1e4),\n clock=steps()) ") == rope(4)


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        rope(64).scale = 2.0  # type: ignore[misc]  # the assignment is what is tested


def test_numbers_are_settled_to_their_type() -> None:
    assert str(Geometric(10000)) == "geometric(10000.0)"
    assert str(Constant((1, -0.0))) == "constant((1.0, 0.0))"


@pytest.mark.parametrize(
    ("pairs", "size", "planes"),
    [
        ([(0, 2), (1, 3)], 4, Half(4)),
        ([(0, 1), (2, 3)], 4, Interleaved(4)),
        ([(0, 1)], 2, Half(2)),
        ([(2, 4), (3, 5)], 6, Partial(Half(4), 2, 6)),
        ([(1, 2), (3, 4)], 5, Partial(Interleaved(4), 1, 5)),
        ([(0, 2)], 4, Pairs(((0, 2),), 4)),
        ([(2, 0), (3, 1)], 4, Pairs(((2, 0), (3, 1)), 4)),
        ([(1, 3), (0, 2)], 4, Pairs(((1, 3), (0, 2)), 4)),
    ],
)
def test_planes_of(pairs: list[tuple[int, int]], size: int, planes: Planes) -> None:
    assert planes_of(pairs, size) == planes
    assert planes.pairs() == tuple(pairs)


@pytest.mark.parametrize(
    ("planes", "canonical"),
    [
        (Interleaved(2), Half(2)),
        (Partial(Interleaved(8), 0, 8), Interleaved(8)),
        (Partial(Partial(Half(4), 1, 6), 2, 9), Partial(Half(4), 3, 9)),
        (Axes(Half(4), (0, 0)), Half(4)),
        (Partial(Axes(Half(4), (0, 1)), 0, 4), Axes(Half(4), (0, 1))),
        (Partial(Axes(Half(4), (0, 1)), 0, 8), Axes(Partial(Half(4), 0, 8), (0, 1))),
        (Pairs(((0, 2), (1, 3)), 4), Half(4)),
    ],
)
def test_canonical_planes(planes: Planes, canonical: Planes) -> None:
    assert planes.canonical() == canonical
    assert (planes.pairs(), planes.axes()) == (canonical.pairs(), canonical.axes())


STEPS = (Geometric(10000.0), Steps())


@pytest.mark.parametrize(
    ("encoding", "canonical"),
    [
        (Rotation(Half(4), *STEPS, out=Pairs(((0, 2), (1, 3)), 4)), rope(4)),
        (Rotation(Pairs(((2, 0), (3, 1)), 4), *STEPS), Rotation(Half(4), *STEPS, orientation=-1)),
        (Rotation(Axes(Half(4), (0, 1)), None, Tables()), Rotation(Half(4), None, Tables())),
        (Bias(Constant((0.0625, 0.00390625)), Steps()), alibi(2)),
        (
            Bias(AlibiSlopes(2), Steps(), distance=Euclidean()),
            Bias(AlibiSlopes(2), Steps(), distance=Absolute()),
        ),
        (Compose((Nope(), Compose((Nope(),)))), Nope()),
        (Compose((alibi(2), Compose((rope(4), Nope())))), Compose((rope(4), alibi(2)))),
        (Compose((Nope(), alibi(3))), alibi(3)),
        (Rank2(4, Tiled(Geometric(9.0), 1), Steps()), Rank2(4, Geometric(9.0), Steps())),
        (
            Compose((alibi(2), Rank2(4, Geometric(9.0), Steps()), rope(4))),
            Compose((Rank2(4, Geometric(9.0), Steps()), rope(4), alibi(2))),
        ),
        (
            Rotation(Half(8), Tiled(Tiled(Geometric(9.0), 2), 2), Steps()),
            Rotation(Half(8), Tiled(Geometric(9.0), 4), Steps()),
        ),
        (
            Rotation(Half(8), Tiled(Scaled(Linear(1.0), Geometric(9.0)), 2), Steps()),
            Rotation(Half(8), Tiled(Geometric(9.0), 2), Steps()),
        ),
    ],
)
def test_canonical_encodings(encoding: Encoding, canonical: Encoding) -> None:
    assert encoding.canonical() == canonical


def test_planes_that_change_places_are_kept() -> None:
    exchanged = Rotation(Interleaved(4), *STEPS, out=Pairs(((2, 3), (0, 1)), 4))
    assert exchanged.canonical() == exchanged


def test_the_order_of_rotations_is_meaning() -> None:
    first, second = rope(4), rope(4, interleaved=True)
    assert Compose((first, second)).canonical() != Compose((second, first)).canonical()


def test_the_inverse_carries_axes_to_the_new_input() -> None:
    rotation = Rotation(Axes(Interleaved(4), (0, 1)), Table("t"), Positions("n"), out=Half(4), scale=4.0)
    assert rotation.inverse() == Rotation(
        Axes(Half(4), (0, 1)), Table("t"), Positions("n"), orientation=-1, out=Interleaved(4), scale=0.25
    )


def test_slots_are_shared_by_name() -> None:
    rotation = Rotation(Half(4), Table("inv_freq"), Positions("n"), basis="basis")
    assert rotation.slots == ("inv_freq", "n", "basis")
    assert Compose((rotation, Bias(Learned("beta"), Positions("n")))).slots == (
        "inv_freq",
        "n",
        "basis",
        "beta",
    )
    assert rope(64).slots == nope().slots == ()
    assert Rank2(4, Learned("w"), Positions("n")).slots == ("w", "n", "a", "b")
    assert NonCommuting(4, Positions("n")).slots == ("n", "basis", "generator")


def test_output_is_planes_unless_out_says_otherwise() -> None:
    assert rope(4).output == Half(4)
    assert Rotation(Half(4), *STEPS, out=Interleaved(4)).output == Interleaved(4)


def test_axes_share_the_planes() -> None:
    """Row and column have the same frequencies; M-RoPE divides one spectrum."""
    axial, divided = axial_rope(16), mrope(16, (2, 3, 3))
    assert axial.spectrum is not None
    assert axial.spectrum.frequencies(8) == Geometric(10000.0).frequencies(4) * 2
    assert axial.planes.axes() == (0, 0, 0, 0, 1, 1, 1, 1)
    assert divided.spectrum == rope(16).spectrum
    assert divided.planes.axes() == (0, 0, 1, 1, 1, 2, 2, 2)
    assert axial_rope(16, axes=1).canonical() == replace(rope(16), clock=Positions("positions"))


@pytest.mark.parametrize(
    ("heads", "powers"),
    [(1, [8]), (2, [4, 8]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [4, 8, 2]), (6, [2, 4, 6, 8, 1, 3])],
)
def test_alibi_slopes(heads: int, powers: list[int]) -> None:
    # Press et al. 2022: the sequence for the lower power of two, then the odd ones for twice as many heads.
    assert AlibiSlopes(heads).values() == tuple(2.0**-power for power in powers)
    assert alibi(heads).distance == Signed()


@pytest.mark.parametrize("heads", [12, 16, 20, 71, 112])
def test_alibi_slopes_of_bloom(heads: int) -> None:
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    ramp = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
    assert AlibiSlopes(heads).values() == pytest.approx(ramp.tolist(), rel=1e-6)
