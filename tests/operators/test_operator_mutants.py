"""Functions with one thing wrong must break a law: the laws have teeth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from operator_laws import ATTEND_LAWS, OPTION_LAWS, PATH_LAWS, Attend, Rotate, Slots
from rotation_laws import ROTATE_LAWS
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Constant,
    Gate,
    Learned,
    Nope,
    Pairs,
    PathBias,
    Positions,
    Rotation,
    Slopes,
    Steps,
    Table,
    Tables,
    Uniform,
)
from grape_compile.operators import reference_attend, reference_rotate
from grape_compile.operators.reference import reference_logits, weighted
from grape_compile.operators.samples import BIASES, PATHS, ROTATIONS, Sample

Tensors = Sequence[Tensor]


def wrong_sign(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    return reference_rotate(tensors, replace(encoding, orientation=-encoding.orientation), slots)


def swapped_halves(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    out = Pairs(tuple((second, first) for first, second in encoding.output.pairs()), encoding.head_dim)
    return reference_rotate(tensors, replace(encoding, out=out), slots)


def off_by_one(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    if isinstance(encoding.clock, Tables):
        slots = {**slots, **{name: slots[name].roll(1, -2) for name in encoding.clock.slots}}
    elif isinstance(encoding.clock, Steps):
        encoding = replace(encoding, clock=Positions("later"))
        slots = {**slots, "later": torch.arange(tensors[0].shape[-2]) + 1}
    else:
        name = encoding.clock.slot
        slots = {**slots, name: slots[name] + 1}
    return reference_rotate(tensors, encoding, slots)


def missing_scale(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    return reference_rotate(tensors, replace(encoding, scale=1.0), slots)


def zeros(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    return tuple(tensor * 0 for tensor in reference_rotate(tensors, encoding, slots))


def nothing(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def scaled_everywhere(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    return tuple(1.001 * tensor for tensor in reference_rotate(tensors, encoding, slots))


def wrong_frequency(tensors: Tensors, encoding: Any, slots: Slots) -> tuple[Tensor, ...]:
    if encoding.spectrum is None:
        return reference_rotate(tensors, encoding, {name: slot.abs() for name, slot in slots.items()})
    names = encoding.spectrum.slots
    theta = slots[names[0]] if names else torch.tensor(encoding.spectrum.frequencies(encoding.planes.count))
    turned = replace(encoding, spectrum=Table("other"))
    return reference_rotate(tensors, turned, {**slots, "other": theta.double().roll(1, -1)})


ROTATE_MUTANTS = [
    wrong_sign,
    swapped_halves,
    off_by_one,
    missing_scale,
    zeros,
    nothing,
    scaled_everywhere,
    wrong_frequency,
]


def broken(laws: Iterable[Callable[[Any, Sample], None]], function: Any, sample: Sample) -> list[str]:
    """Names of the laws that a function breaks on a sample."""
    failed: list[str] = []
    for law in laws:
        try:
            law(function, sample)
        except AssertionError:
            failed.append(str(law.__name__))
    return failed


@pytest.mark.parametrize("mutant", ROTATE_MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("sample", ROTATIONS, ids=lambda sample: sample.name)
def test_rotation_mutant_breaks_a_law(sample: Sample, mutant: Rotate) -> None:
    assert isinstance(sample.encoding, Rotation)
    if mutant is missing_scale and sample.encoding.scale == 1.0:
        pytest.skip("nothing is missing")
    assert broken(ROTATE_LAWS, mutant, sample)


def test_the_reference_breaks_none() -> None:
    for sample in ROTATIONS:
        assert not broken(ROTATE_LAWS, reference_rotate, sample)
    for sample in BIASES:
        assert not broken(ATTEND_LAWS, reference_attend, sample)


def _slopes_changed(factor: float) -> Callable[..., Tensor]:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
    ) -> Tensor:
        if isinstance(encoding.slopes, Learned | Table):
            name = encoding.slopes.slot
            return reference_attend(
                query, key, value, encoding, {**slots, name: slots[name] * factor}, **options
            )
        changed: Slopes = (
            Uniform(factor * encoding.slopes.slope)
            if isinstance(encoding.slopes, Uniform)
            else Constant(tuple(factor * slope for slope in encoding.slopes.values()))
        )
        return reference_attend(query, key, value, replace(encoding, slopes=changed), slots, **options)

    return attend


wrong_slope, wrong_direction = _slopes_changed(0.5), _slopes_changed(-1.0)


def unmasked_future(*operands: Any, is_causal: bool = False, **options: Any) -> Tensor:
    return reference_attend(*operands, **options)


def hides_itself(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoding: Any,
    slots: Slots,
    *,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """The causal mask is off by one."""
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
        key.shape[2] - query.shape[2] - is_causal
    )
    mask = seen if is_causal else None
    return reference_attend(query, key, value, encoding, slots, mask=mask, **options)


def missing_attention_scale(*operands: Any, scale: float | None = None, **options: Any) -> Tensor:
    return reference_attend(*operands, scale=1.0, **options)


def attends_nowhere(*operands: Any, **options: Any) -> Tensor:
    return reference_attend(*operands, **options) * 0


def upper_left(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoding: Any,
    slots: Slots,
    *,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """The causal mask starts at the first key instead of ending at the last."""
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril() if is_causal else None
    return reference_attend(query, key, value, encoding, slots, mask=mask, **options)


@pytest.mark.parametrize(
    "mutant",
    [unmasked_future, hides_itself, missing_attention_scale, attends_nowhere, upper_left],
    ids=lambda m: m.__name__,
)
@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
def test_attention_mutant_breaks_a_law(sample: Sample, mutant: Attend) -> None:
    assert broken(ATTEND_LAWS, mutant, sample)


@pytest.mark.parametrize("mutant", [wrong_slope, wrong_direction], ids=["wrong_slope", "wrong_direction"])
@pytest.mark.parametrize(
    "sample",
    [sample for sample in BIASES if isinstance(sample.encoding, Bias)],
    ids=lambda sample: sample.name,
)
def test_slope_mutant_breaks_the_lift(sample: Sample, mutant: Attend) -> None:
    assert "attends_like_the_lift" in broken(ATTEND_LAWS, mutant, sample)


def other_sum(
    query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
) -> Tensor:
    """Inclusive where it is exclusive."""
    clock = replace(encoding.clock, inclusive=not encoding.clock.inclusive)
    return reference_attend(query, key, value, replace(encoding, clock=clock), slots, **options)


def gate_of_the_other_side(
    query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
) -> Tensor:
    """The number of the key where the query's is due, and the other way round."""
    swapped = replace(encoding, gate=Gate(encoding.gate.key, encoding.gate.query))
    return reference_attend(query, key, value, swapped, slots, **options)


def without_gate(
    query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
) -> Tensor:
    return reference_attend(query, key, value, replace(encoding, gate=None), slots, **options)


@pytest.mark.parametrize(
    ("mutant", "kind"),
    [(other_sum, "clock"), (gate_of_the_other_side, "gate"), (without_gate, "gate")],
    ids=["other_sum", "gate_of_the_other_side", "without_gate"],
)
@pytest.mark.parametrize("sample", BIASES, ids=lambda sample: sample.name)
def test_kin_mutant_breaks_the_lift(sample: Sample, mutant: Attend, kind: str) -> None:
    bias = sample.encoding
    if not isinstance(bias, Bias):
        return
    if (kind == "clock" and isinstance(bias.clock, Accumulated) and bias.gate is None) or (
        kind == "gate" and bias.gate is not None
    ):
        # For one slope and one rate of all tokens the two sums give the same differences; these have many.
        assert "attends_like_the_lift" in broken(ATTEND_LAWS, mutant, sample)


def _with_edges(change: Callable[[PathBias, Slots], tuple[PathBias, Slots]]) -> Attend:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
    ) -> Tensor:
        changed, filled = change(encoding, slots)
        return reference_attend(query, key, value, changed, filled, **options)

    return attend


#: Wrong in one thing: the next edge, the sides exchanged, another size, no turn or another normalisation.
PATH_MUTANTS: dict[str, Attend] = {
    "next_edge": _with_edges(lambda bias, slots: (bias, {**slots, bias.key: slots[bias.key].roll(1, -2)})),
    "sides": _with_edges(lambda bias, slots: (replace(bias, query=bias.key, key=bias.query), slots)),
    "size": _with_edges(lambda bias, slots: (bias, {**slots, bias.query: 2 * slots[bias.query]})),
    "negative": _with_edges(lambda bias, slots: (bias, {**slots, bias.key: -slots[bias.key]})),
    "no_turn": _with_edges(lambda bias, slots: (replace(bias, turn=None), slots)),
    "normalised": _with_edges(
        lambda bias, slots: (replace(bias, normalised="both" if bias.normalised == "none" else "none"), slots)
    ),
}


@pytest.mark.parametrize("mutant", PATH_MUTANTS)
@pytest.mark.parametrize("sample", PATHS, ids=lambda sample: sample.name)
def test_path_mutant_breaks_a_law(sample: Sample, mutant: str) -> None:
    bias = sample.encoding
    if not isinstance(bias, PathBias) or (mutant == "no_turn" and bias.turn is None):
        return
    if mutant == "size" and bias.normalised == "both":
        return
    assert "walks_its_paths" in broken(PATH_LAWS, PATH_MUTANTS[mutant], sample)


def cap_over_the_bias(
    query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
) -> Tensor:
    """The cap bends the bias as well."""
    cap = options.pop("cap", None)
    if cap is None:
        return reference_attend(query, key, value, encoding, slots, **options)
    logits = reference_logits(query, key, encoding, slots, **options)
    return weighted(torch.where(logits.isneginf(), logits, cap * (logits / cap).tanh()), value)


def cap_of_plain_products(*operands: Any, cap: float | None = None, **options: Any) -> Tensor:
    """The cap is counted in products that are not scaled."""
    return reference_attend(*operands, cap=None if cap is None else cap * 2, **options)


def sink_with_a_value(
    query: Tensor, key: Tensor, value: Tensor, encoding: Any, slots: Slots, **options: Any
) -> Tensor:
    """The weight of the sink goes to the mean of the values."""
    found = reference_attend(query, key, value, encoding, slots, **options)
    if "sinks" not in options:
        return found
    ones = reference_attend(query, key, torch.ones_like(value), encoding, slots, **options)
    return found + (1 - ones) * value.mean(2, keepdim=True)


def scaled_sink(*operands: Any, sinks: Tensor | None = None, **options: Any) -> Tensor:
    """The sink is scaled as if it were a product."""
    return reference_attend(*operands, sinks=None if sinks is None else sinks * 0.5, **options)


def sink_of_the_next_head(*operands: Any, sinks: Tensor | None = None, **options: Any) -> Tensor:
    return reference_attend(*operands, sinks=None if sinks is None else sinks.roll(1, -1), **options)


def segment_of_the_next_key(*operands: Any, segments: Tensor | None = None, **options: Any) -> Tensor:
    moved = None if segments is None else segments.roll(1, -1)
    return reference_attend(*operands, segments=moved, **options)


OPTION_MUTANTS = [
    cap_over_the_bias,
    cap_of_plain_products,
    sink_with_a_value,
    scaled_sink,
    sink_of_the_next_head,
    segment_of_the_next_key,
]


@pytest.mark.parametrize("mutant", OPTION_MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("sample", [*BIASES, *PATHS], ids=lambda sample: sample.name)
def test_option_mutant_breaks_a_law(sample: Sample, mutant: Attend) -> None:
    if mutant is cap_over_the_bias and isinstance(sample.encoding, Nope):
        return
    assert broken(OPTION_LAWS, mutant, sample)
