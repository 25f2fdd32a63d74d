"""FlexAttention as a provider: which calls it takes and why not others, and what it computes by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_laws import OPTION_LAWS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grape_compile.encoding import (
    Bias,
    Compose,
    Encoding,
    Euclidean,
    Gate,
    Learned,
    Positions,
    Steps,
    Uniform,
    alibi,
    nope,
)
from grape_compile.operators import attend, flex, providers, reference_attend
from grape_compile.operators.attention import attend_call
from grape_compile.operators.providers import Provider, attend_lowering
from grape_compile.operators.samples import (
    BATCH,
    BIASES,
    COMPOSITIONS,
    HEADS,
    LENGTH,
    PATHS,
    Sample,
    attend_tolerance,
    tensor,
)

SAMPLES = [
    each
    for each in (*BIASES, *COMPOSITIONS)
    if each.name in ("gated_both", "euclidean", "dictionary", "contextual_fox")
]
#: More queries than the kernels of decoding take.
MANY = 100
GATED = Bias(Learned("slopes"), Steps(), gate=Gate("gate_query", "gate_key"))
TWO = Compose((GATED, Bias(Uniform(1.0), Positions("r"), distance=Euclidean())))


def lowering(encoding: Encoding, size: int = 16, dtype: torch.dtype = torch.float16, **options: Any) -> str:
    """What the table says of a call on a GPU, by tensors that only stand for those of one."""
    shapes = {"slopes": (2,), "r": (2, 1, MANY)}
    with FakeTensorMode():
        heads = torch.empty(1, 2, MANY, size, device="cuda", dtype=dtype)
        slots = [torch.empty(shapes.get(name, (MANY,)), device="cuda") for name in encoding.slots]
        return attend_lowering(attend_call(heads, heads, heads, slots, str(encoding), **options))


def test_it_takes_what_our_kernels_do_not() -> None:
    pytest.importorskip("triton")
    assert lowering(alibi(2)) == "grape::attend by triton"
    two = "2 biases with gates or distances without a sign, more than one"
    assert lowering(TWO).startswith(f"grape::attend by flex (triton: {two}; triton path: ")
    assert lowering(nope(), scale=-1.0).startswith(
        "grape::attend by flex (triton: a scale of -1.0, not positive; "
    )
    assert lowering(TWO, 8).startswith("grape::attend by chunked (triton: 2 biases")
    assert lowering(TWO, 8).endswith("; flex: heads of fewer than 16 coordinates)")
    assert "flex: float64 has no matrix instruction here" in lowering(alibi(2), dtype=torch.float64)
    (sample,) = (each for each in PATHS if each.name == "grape_ap")
    slots = [sample.slots()[name] for name in sample.encoding.slots]
    heads = tensor(BATCH, HEADS, LENGTH, 16, dtype=torch.float32)
    call = attend_call(heads, heads, heads, slots, str(sample.encoding), is_causal=True)
    assert flex.supports(call) == "a path bias sees the keys between, not one query and one key"


def flexed(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, slots: Any, **options: Any
) -> Tensor:
    operands = [slots[name] for name in encoding.slots]
    return flex.forward(attend_call(query, key, value, operands, str(encoding), **options))[0]


@pytest.mark.parametrize("law", OPTION_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_it_obeys_the_laws(sample: Sample, law: Any) -> None:
    law(flexed, sample)


CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": 4, "scale": -0.3},
    "mask": {"mask": torch.arange(LENGTH) % 3 > 0, "is_causal": True},
    "numbers": {"mask": tensor(1, 4, 1, LENGTH, dtype=torch.float32)},
}


@pytest.mark.parametrize("name", CALLS)
def test_output_and_gradients_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the only provider, grouped heads, fewer queries than keys; the way back is that of plain torch."""
    monkeypatch.setattr(
        providers, "PROVIDERS", (Provider("flex", "grape_compile.operators.flex", priority=15),)
    )
    pytest.importorskip("triton")
    shapes = ((1, 4, 5, 16), (1, 2, LENGTH, 16), (1, 2, LENGTH, 16))
    slots = {
        "slopes": tensor(4, dtype=torch.float32),
        "gate_query": tensor(1, 4, 5, dtype=torch.float32),
        "gate_key": tensor(1, 4, LENGTH, dtype=torch.float32),
        "r": tensor(2, 1, LENGTH, dtype=torch.float32),
    }
    results = []
    for function, dtype in ((attend, torch.float32), (reference_attend, torch.float64)):
        heads = [
            tensor(*shape, seed=seed, dtype=torch.float32).to(dtype) for seed, shape in enumerate(shapes)
        ]
        parts = [part.requires_grad_() for part in heads]
        filled = {each: slot.to(dtype).requires_grad_() for each, slot in slots.items()}
        output = function(parts[0], parts[1], parts[2], TWO, filled, **CALLS[name])
        cotangent = tensor(*output.shape, seed=9).to(dtype)
        results.append([output, *torch.autograd.grad(output, [*parts, *filled.values()], cotangent)])
    query, key, value = (part.detach() for part in results[1][1:4])
    bound = attend_tolerance(torch.float32, query, key, value, largest_bias=30.0)
    for ours, wanted in zip(*results, strict=True):
        largest = float(wanted.detach().abs().max())
        assert float((ours.double() - wanted).detach().abs().max()) <= 100 * bound * (1 + largest)


@pytest.mark.slow
def test_it_is_compiled_like_its_definition() -> None:
    """By torch's compiler for the CPU, which has no way back."""
    query, key, value = (tensor(1, 4, 128, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    slots = [tensor(4), tensor(1, 4, 128), tensor(1, 4, 128), tensor(2, 1, 128)]
    call = attend_call(query, key, value, [slot.float() for slot in slots], str(TWO), is_causal=True, cap=2.0)
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        found = compiled(query, key, value, score_mod=flex.score_of(call), scale=call.scale)
    torch.testing.assert_close(found, flex.forward(call)[0], rtol=1e-4, atol=1e-5)
