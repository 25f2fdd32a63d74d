"""Random values of the algebra: small, and covering every class of it."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from grape_compile.encoding import (
    Absolute,
    Accumulated,
    AlibiSlopes,
    Axes,
    Bias,
    ByParts,
    Clock,
    Compose,
    Constant,
    Distance,
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
    Llama3,
    LogSigmoid,
    Longrope,
    NegativeExp,
    NonCommuting,
    Nope,
    Ntk,
    Pairs,
    Partial,
    PathBias,
    PerPlane,
    Planes,
    Positions,
    Proportional,
    Rank2,
    Rotation,
    Rule,
    Scaled,
    Signed,
    Slopes,
    Spectrum,
    Steps,
    Table,
    Tables,
    Tiled,
    Uniform,
    Yarn,
)

# Powers of two have exact inverses; among the others some have not, and 1.0 is the default.
SCALES = (1.0, 0.25, 2.0, 1.25)


def rules() -> SearchStrategy[Rule]:
    factors = st.sampled_from((1.0, 1.5, 4.0, 40.0)) | st.floats(0.5, 64.0)
    original = st.integers(16, 32768)
    return st.one_of(
        st.builds(Linear, factors),
        st.builds(Ntk, factors),
        st.builds(Yarn, factors, original, truncate=st.booleans()),
        st.builds(Llama3, factors, st.just(1.0), st.floats(1.5, 8.0), original),
        st.builds(DynamicNtk, st.sampled_from((1.0, 2.0, 8.0)), original),
        st.builds(ByParts, factors, st.floats(-2.0, 2.0), st.floats(2.5, 8.0)),
    )


def rules_by_plane(count: int) -> SearchStrategy[Rule]:
    """Rules that say which plane they mean; what they leave need not fall, as YaRN's ramp asks."""
    factors = st.lists(st.sampled_from((1.0, 1.25, 7.5)), min_size=count, max_size=count)
    return st.one_of(
        st.builds(PerPlane, factors),
        st.builds(Longrope, factors, factors, st.integers(16, 32768)),
        st.builds(Proportional, st.integers(0, count)),
    )


def spectra(count: int) -> SearchStrategy[Spectrum]:
    geometric = st.builds(Geometric, st.sampled_from((10000.0, 500000.0)) | st.floats(1.5, 1e7))
    scaled = st.recursive(geometric, lambda of: st.builds(Scaled, rules(), of), max_leaves=3)
    scaled = scaled | st.builds(Scaled, rules_by_plane(count), scaled)
    tiled = st.builds(Tiled, scaled, st.just(1))
    return st.one_of(
        scaled, tiled, st.builds(Learned, st.just("theta")), st.builds(Table, st.just("layers.0.inv_freq"))
    )


@st.composite
def pairings(draw: st.DrawFn, size: int, count: int) -> Planes:
    """Planes of exactly this head size and count."""
    inner = draw(st.sampled_from((Half, Interleaved)))(2 * count)
    kind = draw(st.sampled_from(("regular", "partial", "irregular")))
    if kind == "irregular":
        coordinates = draw(st.permutations(range(size)))
        return Pairs(tuple((coordinates[2 * j], coordinates[2 * j + 1]) for j in range(count)), size)
    if kind == "regular" and size == inner.head_dim:
        return inner
    return Partial(inner, draw(st.integers(0, size - inner.head_dim)), size)


@st.composite
def rotations(draw: st.DrawFn, size: int | None = None, basis: bool = True) -> Rotation:
    """Rotations of two or more planes, because YaRN's ramp needs a line of frequencies."""
    head = draw(st.integers(4, 10)) if size is None else size
    count = draw(st.integers(2, head // 2))
    planes = draw(pairings(head, count))
    clock: Clock = draw(st.sampled_from((Steps(), Positions("n"), Accumulated("phase", True), Tables())))
    if not isinstance(clock, Steps) and draw(st.booleans()):
        planes = Axes(planes, tuple(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))))
    return Rotation(
        planes,
        None if isinstance(clock, Tables) else draw(spectra(count)),
        clock,
        orientation=draw(st.sampled_from((1, -1))),
        out=draw(st.none() | pairings(head, count)),
        basis=draw(st.sampled_from((None, "basis"))) if basis else None,
        scale=draw(st.sampled_from(SCALES)),
    )


def generators(size: int | None = None) -> SearchStrategy[Encoding]:
    """Generators by the matrix exponential; one frequency, which YaRN's ramp cannot be placed on."""
    head = st.integers(2, 6) if size is None else st.just(size)
    clocks = st.sampled_from((Steps(), Positions("n"), Accumulated("phase", True)))
    signs = st.sampled_from((1, -1))
    numbers = st.floats(1.5, 1e7)
    factors = st.sampled_from((1.0, 1.5, 40.0))
    spectrum = st.one_of(
        st.builds(Geometric, numbers),
        st.builds(Scaled, st.builds(Linear, factors), st.builds(Geometric, numbers)),
        st.builds(Learned, st.just("w")),
        st.builds(Tiled, st.builds(Geometric, numbers), st.just(1)),
    )
    return st.one_of(
        st.builds(Rank2, head, spectrum, clocks, signs),
        st.builds(NonCommuting, head, clocks, signs, basis=st.just("frame")),
    )


def slopes() -> SearchStrategy[Slopes]:
    number = st.floats(-4.0, 4.0)
    return st.one_of(
        st.builds(AlibiSlopes, st.integers(1, 3)),
        st.builds(Constant, st.lists(number, min_size=1, max_size=3)),
        st.just(Constant((0.0625, 0.00390625))),
        st.builds(Uniform, number),
        st.builds(Learned, st.just("beta")),
        st.builds(Table, st.just("slopes")),
    )


def distances() -> SearchStrategy[Distance]:
    return st.sampled_from((Signed(), Absolute(), Euclidean()))


def gates() -> SearchStrategy[Gate | None]:
    return st.sampled_from((None, Gate("lam_q"), Gate(key="lam_k"), Gate("lam_q", "lam_k")))


def biases() -> SearchStrategy[Bias]:
    clocks = st.sampled_from((Steps(), Positions("n"), Accumulated("phase", False)))
    return st.builds(Bias, slopes(), clocks, gates(), distances())


@st.composite
def paths(draw: st.DrawFn) -> PathBias:
    dim = draw(st.integers(4, 6))
    turn = draw(st.none() | rotations(dim, basis=False))
    link = draw(st.sampled_from((LogSigmoid(), NegativeExp(), Identity())))
    return PathBias(link, draw(slopes()), dim, draw(st.sampled_from(("none", "keys", "both"))), turn)


def closed_biases() -> SearchStrategy[Bias | PathBias]:
    """Biases whose slopes are numbers, so that their inverse exists."""
    return st.one_of(biases(), paths()).filter(lambda bias: not isinstance(bias.slopes, Learned | Table))


def compositions(leaf: SearchStrategy[Encoding]) -> SearchStrategy[Encoding]:
    return st.recursive(
        leaf, lambda part: st.builds(Compose, st.lists(part, min_size=1, max_size=3)), max_leaves=4
    )


def encodings() -> SearchStrategy[Encoding]:
    """Every encoding; rotations in one composition share a head of six coordinates."""
    leaf = st.one_of(st.just(Nope()), rotations(6, basis=False), generators(6), biases())
    return st.one_of(rotations(), generators(), paths(), compositions(leaf))


def invertible() -> SearchStrategy[Encoding]:
    leaf = st.one_of(st.just(Nope()), rotations(6, basis=False), generators(6), closed_biases())
    return st.one_of(rotations(basis=False), generators(), compositions(leaf))
