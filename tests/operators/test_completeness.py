"""Every encoding has all it needs: a sample, a definition, gradients, something that runs it on a CPU, a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from operator_laws import operands
from torch import Tensor

from grape_compile.encoding import Encoding
from grape_compile.encoding.text import VOCABULARY
from grape_compile.nn import StreamingCache
from grape_compile.operators import attend, providers, reference_attend
from grape_compile.operators.samples import BIASES, COMPOSITIONS, GENERATORS, LENGTH, PATHS, ROTATIONS, Sample

SAMPLES = (*ROTATIONS, *GENERATORS, *BIASES, *PATHS, *COMPOSITIONS)
#: What runs a sample of each encoding first; a new provider or encoding changes a line here.
EXPECTED = """
    bias           reference autograd cache   chunked flash_cpu
    compose        reference autograd cache   chunked flash_cpu scanned
    non_commuting  reference autograd cache   flash_cpu
    nope           reference autograd cache   flash_cpu
    path_bias      reference autograd cache   scanned
    rank2          reference autograd cache   flash_cpu
    rotation       reference autograd cache   flash_cpu
"""


@dataclass(frozen=True)
class Row:
    """What a sample was seen to have."""

    parts: tuple[str, ...]
    runs_on: tuple[str, ...]


def kinds() -> list[str]:
    return sorted(name for name, kind in VOCABULARY.items() if issubclass(kind, Encoding))


def samples_of(name: str) -> Iterator[Sample]:
    return (sample for sample in SAMPLES if type(sample.encoding) is VOCABULARY[name])


def seen(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> Row:
    """Run a sample in every way."""
    used: list[str] = []
    choose = providers.choose

    def noted(*arguments: object) -> providers.Provider:
        found = choose(*arguments)  # type: ignore[arg-type] # passed on
        used.append(found.name)
        return found

    monkeypatch.setattr("grape_compile.operators.attention.choose", noted)
    tensors = [part.requires_grad_() for part in operands()]
    slots = {
        name: slot.requires_grad_() if slot.is_floating_point() else slot
        for name, slot in sample.slots().items()
    }
    outputs: dict[str, Tensor] = {
        "reference": reference_attend(
            tensors[0], tensors[1], tensors[2], sample.encoding, slots, is_causal=True
        ),
        "autograd": attend(tensors[0], tensors[1], tensors[2], sample.encoding, slots, is_causal=True),
        "cache": StreamingCache(sample.encoding).attend(tensors[0], tensors[1], tensors[2], slots),
    }
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["reference"], rtol=1e-10, atol=1e-10)
    learnable = [*tensors, *(slot for slot in slots.values() if slot.is_floating_point())]
    gradients = torch.autograd.grad(outputs["autograd"].square().sum(), learnable)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    return Row(tuple(outputs), tuple(used))


def table(monkeypatch: pytest.MonkeyPatch) -> str:
    lines = []
    for name in kinds():
        rows = [seen(sample, monkeypatch) for sample in samples_of(name)]
        assert rows, f"no sample of {name}"
        parts = " ".join(rows[0].parts)
        lines.append(
            f"    {name:14} {parts:25} {' '.join(sorted({each for row in rows for each in row.runs_on}))}"
        )
    return "\n".join(lines)


def test_every_encoding_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    found = table(monkeypatch)
    print(f"\n{found}")
    assert found.split() == EXPECTED.split()


def test_samples_have_one_length() -> None:
    assert all(sample.slots().keys() == set(sample.encoding.slots) for sample in SAMPLES)
    assert LENGTH > 1
