"""Trainable encodings: they start as the fixed ones, keep the laws whatever they learn, and fit every place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grape_compile.encoding import (
    AlibiSlopes,
    Encoding,
    Half,
    Learned,
    Rotation,
    Steps,
    Tables,
    alibi,
    axial_rope,
    fox,
    nope,
    rope,
)
from grape_compile.errors import OperandError
from grape_compile.nn import (
    ContextualRates,
    Fixed,
    ForgetGate,
    GatedSlopes,
    LearnedRotation,
    LearnedSlopes,
    LearnedSpectrum,
    MixedRotation,
    OrthogonalBasis,
    PathEdges,
    SlopeFactors,
    Sum,
    TrainableEncoding,
    trainable,
)
from grape_compile.operators import attend, reference_attend, rotate

BATCH, HEADS, LENGTH, SIZE, HIDDEN = 2, 4, 9, 8, 16
SLOPES = AlibiSlopes(HEADS).values()
ROPE = rope(SIZE)

#: Each with the fixed encoding it is at the start, or None where it is none.
MADE: dict[str, tuple[Callable[[], TrainableEncoding], Encoding | None]] = {
    "spectrum": (lambda: LearnedRotation(ROPE), ROPE),
    "spectrum_per_head": (lambda: LearnedRotation(ROPE, heads=HEADS), ROPE),
    "cayley": (lambda: LearnedRotation(ROPE, basis="cayley"), ROPE),
    "householder": (lambda: LearnedRotation(ROPE, heads=HEADS, basis="householder"), ROPE),
    "orthogonal": (lambda: LearnedRotation(ROPE, basis="orthogonal"), ROPE),
    "context": (lambda: LearnedRotation(ROPE, context=HIDDEN), ROPE),
    "mixed": (lambda: MixedRotation(ROPE, 4), ROPE),
    "mixed_in_a_basis": (lambda: MixedRotation(ROPE, 4, basis="cayley"), ROPE),
    "mixed_whole": (lambda: MixedRotation(rope(SIZE, interleaved=True), SIZE), rope(SIZE, interleaved=True)),
    "slopes": (lambda: LearnedSlopes(HEADS), alibi(HEADS)),
    "gates": (lambda: GatedSlopes(HEADS, SIZE), None),
    "gates_from_alibi": (lambda: GatedSlopes(HEADS, SIZE, unit=False), alibi(HEADS)),
    "query_gate": (lambda: GatedSlopes(HEADS, SIZE, key=False, unit=False), alibi(HEADS)),
    "key_gate": (lambda: GatedSlopes(HEADS, SIZE, query=False, unit=False), alibi(HEADS)),
    "gates_both_ways": (lambda: GatedSlopes(HEADS, SIZE, unit=False, symmetric=True), alibi(HEADS)),
    "forget": (lambda: ForgetGate(HIDDEN, HEADS), None),
    "forget_both_ways": (lambda: ForgetGate(HIDDEN, HEADS, SLOPES, symmetric=True), alibi(HEADS)),
    "forget_from_alibi": (lambda: ForgetGate(HIDDEN, HEADS, SLOPES), alibi(HEADS)),
    "path": (lambda: PathEdges(HIDDEN, HEADS), None),
    "path_with_slopes": (lambda: PathEdges(HIDDEN, HEADS, normalised="both", factor=1e-7), nope()),
    "sum": (lambda: Sum({"turn": LearnedRotation(ROPE), "path": PathEdges(HIDDEN, HEADS)}), None),
}
made = pytest.mark.parametrize("name", MADE)


class Layer(nn.Module):
    def __init__(self, encoding: TrainableEncoding) -> None:
        super().__init__()
        self.grape = encoding

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        slots = self.grape(hidden, query, key)
        return attend(query, key, value, self.grape.encoding, slots, is_causal=True)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((BATCH, LENGTH, HIDDEN), *((BATCH, HEADS, LENGTH, SIZE),) * 3)
    return [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]


def build(name: str) -> TrainableEncoding:
    torch.manual_seed(0)
    return MADE[name][0]()


def moved(encoding: TrainableEncoding, by: float = 0.3) -> TrainableEncoding:
    """The encoding with other parameters: what training may have made of it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return encoding


@made
def test_starts_as_the_fixed_encoding(name: str) -> None:
    """Slopes, phases and angles are off by a few roundings, in logits of a few units; weights are at most one.

    A path starts with slopes times 1e-7, and its edges are at most a few units.
    """
    fixed = MADE[name][1]
    hidden, query, key, value = operands()
    out = Layer(build(name))(hidden, query, key, value)
    if fixed is None:
        assert out.isfinite().all()
        return
    expected = attend(query, key, value, fixed, is_causal=True)
    assert float((out - expected).detach().abs().max()) < (5e-6 if name.startswith("path") else 1e-6)


@made
def test_is_what_the_reference_makes_of_its_slots(name: str) -> None:
    encoding = moved(build(name)).double()
    hidden, query, key, value = operands(torch.float64)
    slots = encoding(hidden, query, key)
    assert set(slots) == set(encoding.encoding.slots)
    expected = reference_attend(query, key, value, encoding.encoding, slots, is_causal=True)
    torch.testing.assert_close(Layer(encoding)(hidden, query, key, value), expected, rtol=0, atol=1e-12)


@made
def test_every_parameter_has_a_gradient(name: str) -> None:
    layer = Layer(build(name))
    out = layer(*operands())
    out.backward(torch.randn_like(out))
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


@made
def test_is_saved_copied_and_pickled(name: str) -> None:
    encoding = moved(build(name))
    hidden, query, key, _ = operands()
    expected = encoding(hidden, query, key)
    fresh = MADE[name][0]()
    fresh.load_state_dict(encoding.state_dict())
    for other in (fresh, copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        for slot, tensor in other(hidden, query, key).items():
            torch.testing.assert_close(tensor, expected[slot], rtol=0, atol=0)


@made
def test_slots_stay_wide(name: str) -> None:
    """A model cast to sixteen bits keeps its start: frequencies and slopes are those of before."""
    encoding = build(name)
    hidden, query, key, value = operands()
    before = encoding(hidden, query, key)
    layer = Layer(encoding).to(torch.bfloat16)
    narrow = [each.bfloat16() for each in (hidden, query, key, value)]
    after = encoding(*narrow[:3])
    assert all(slot.dtype == torch.float32 for slot in after.values())
    assert all(
        torch.equal(after[slot], before[slot]) for slot in {"theta", "generator", "frame"} & set(after)
    )
    assert layer(*narrow).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", [name for name, (_, fixed) in MADE.items() if fixed == ROPE and name != "context"]
)
def test_learned_rotations_keep_the_laws(name: str) -> None:
    """Lengths stay, and one query over one key, at every place, depends on the offset alone."""
    encoding = moved(build(name), 1.0).double()
    hidden, query, key, _ = operands(torch.float64)
    query, key = (each[:, :, :1].expand_as(each) for each in (query, key))
    turned = rotate([query, key], encoding.encoding, encoding(hidden, query, key))
    for before, after in zip((query, key), turned, strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-12, atol=0)
    logits = turned[0] @ turned[1].mT
    torch.testing.assert_close(logits[..., 1:, 1:], logits[..., :-1, :-1], rtol=0, atol=1e-11)


def test_a_phase_is_what_its_tokens_count() -> None:
    """The exclusive sum of the rates takes the place of the position."""
    encoding = moved(build("context")).double()
    hidden, query, *_ = operands(torch.float64)
    slots = encoding(hidden)
    assert slots["rates"].shape == (BATCH, 1, LENGTH)
    phases = slots["rates"].cumsum(-1) - slots["rates"]
    assert isinstance(encoding.encoding, Rotation)
    angles = phases[..., None] * slots["theta"]
    first, second = query.chunk(2, dim=-1)
    expected = torch.cat(
        (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()), -1
    )
    (turned,) = rotate([query], encoding.encoding, slots)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_a_constant_rate_counts_steps() -> None:
    rates = ContextualRates(HIDDEN)
    torch.testing.assert_close(
        rates(torch.randn(1, 3, HIDDEN)), torch.full((1, 1, 3), rates.start), rtol=0, atol=0
    )


@pytest.mark.parametrize("method", ["cayley", "householder", "orthogonal"])
def test_a_basis_stays_orthogonal(method: str) -> None:
    """In float32, after steps that are too long: the rounding of a product of rows of length one."""
    torch.manual_seed(0)
    basis = OrthogonalBasis(SIZE, method, heads=2)
    assert float((basis() - torch.eye(SIZE)).detach().abs().max()) < 1e-6
    optimiser = torch.optim.Adam(basis.parameters(), lr=0.1)
    target = torch.randn(2, SIZE, SIZE)
    losses = []
    for _ in range(30):
        loss = (basis() * target).sum()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned = basis().detach().double()
    assert losses[-1] < losses[0] - 1
    assert float((learned.mT @ learned - torch.eye(SIZE)).abs().max()) < 1e-6
    assert float(torch.linalg.det(learned).min()) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cayley", "householder", "orthogonal"])
def test_a_basis_stays_orthogonal_for_a_thousand_steps(method: str) -> None:
    basis = OrthogonalBasis(32, method)
    optimiser = torch.optim.Adam(basis.parameters(), lr=0.05)
    for step in range(1000):
        optimiser.zero_grad()
        (basis() * torch.randn(32, 32, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimiser.step()
    learned = basis().detach().double()
    assert float((learned.mT @ learned - torch.eye(32)).abs().max()) < 1e-6


def test_a_spectrum_moves_on_a_logarithmic_scale() -> None:
    """theta = start exp(log_theta / 16); what does not turn never will."""
    spectrum = LearnedSpectrum((1.0, 0.25, 0.0, -0.5), heads=2)
    with torch.no_grad():
        spectrum.log_theta[1] = 16.0
    expected = torch.tensor((1.0, 0.25, 0.0, -0.5))
    torch.testing.assert_close(spectrum()[0, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(spectrum()[1, 0], expected * torch.e, rtol=1e-6, atol=0)


def test_shared_keys_have_gates_of_their_own_heads() -> None:
    encoding = GatedSlopes(HEADS, SIZE)
    hidden, query, key, _ = operands()
    grouped = encoding(hidden, query, key[:, :2])["gate_key"]
    whole = encoding(hidden, query, key[:, :2].repeat_interleave(2, 1))["gate_key"]
    torch.testing.assert_close(grouped, whole)


@pytest.mark.parametrize("name", ["gates_both_ways", "forget_both_ways"])
def test_later_keys_are_as_far_as_earlier_ones(name: str) -> None:
    encoding = moved(build(name)).double()
    hidden, query, key, value = operands(torch.float64)
    slots = encoding(hidden, query, key)
    if name == "gates_both_ways":
        steps, gates = torch.arange(LENGTH), (slots["gate_query"], slots["gate_key"])
        apart = (steps - steps[:, None]).abs() * (gates[0][..., None] + gates[1][..., None, :])
        apart = apart * slots["slopes"][:, None, None]
    else:
        sums = slots["log_forget"].cumsum(-1)
        apart = (sums[..., None, :] - sums[..., None]).abs()
    expected = (query @ key.mT / SIZE**0.5 - apart).softmax(-1) @ value
    found = attend(query, key, value, encoding.encoding, slots)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_names_of_the_field() -> None:
    for name in ("nope", "rope", "alibi", "grape-m", "grape-m-ctx", "grape-a-q", "grape-a-k", "grape-a-qk"):
        assert isinstance(trainable(name, HIDDEN, HEADS, SIZE), TrainableEncoding)
    both = trainable("grape-m+fox", HIDDEN, HEADS, SIZE)
    assert {name.split(".")[0] for name, _ in both.named_parameters()} == {"grape_m", "fox"}
    assert trainable(both, HIDDEN, HEADS, SIZE) is both
    assert trainable(fox(), HIDDEN, HEADS, SIZE).encoding == fox()


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "name": (lambda: trainable("rope2", HIDDEN, HEADS, SIZE), "grape-ap"),
    "method": (lambda: OrthogonalBasis(8, "qr"), "cayley or householder"),
    "odd": (lambda: OrthogonalBasis(7, "householder"), "an even size"),
    "tables": (lambda: LearnedRotation(Rotation(Half(SIZE), None, Tables())), "by positions or steps"),
    "unknown": (lambda: LearnedRotation(Rotation(Half(SIZE), Learned("x"), Steps())), "its 4 `frequencies`"),
    "few": (lambda: LearnedRotation(ROPE, (1.0, 0.1)), "one for each plane"),
    "axes": (lambda: LearnedRotation(axial_rope(SIZE), context=HIDDEN), "one axis"),
    "mixed_odd": (lambda: MixedRotation(ROPE, 5), "an even number from 4 to 8"),
    "mixed_much": (lambda: MixedRotation(ROPE, 10), "an even number from 4 to 8"),
    "mixed_axes": (lambda: MixedRotation(axial_rope(SIZE), 4), "a learned spectrum instead"),
    "slopes": (lambda: SlopeFactors(HEADS, (1.0, 2.0)), "one for each head"),
    "factor": (lambda: SlopeFactors(HEADS, factor=0.0), "a positive one"),
    "no_gate": (lambda: GatedSlopes(HEADS, SIZE, query=False, key=False), "one or both"),
    "no_query": (lambda: GatedSlopes(HEADS, SIZE)(operands()[0]), "[B, heads, T, 8]"),
    "open": (lambda: ForgetGate(HIDDEN, HEADS, (1.0, 1.0, 1.0, 0.0)), "one positive slope"),
    "twice": (lambda: Sum({"a": LearnedSlopes(HEADS), "b": GatedSlopes(HEADS, SIZE)}), "different kinds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    wrong, works = WRONG[name]
    with pytest.raises(OperandError) as caught:
        wrong()
    assert works in caught.value.works


def test_a_fixed_encoding_leaves_its_slots_to_the_caller() -> None:
    fixed = Fixed(fox())
    assert fixed(operands()[0]) == {}
    assert list(fixed.parameters()) == []
