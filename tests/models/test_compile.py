"""A compiled model computes what the model computes, to the error contract, through our operators."""

import copy
import re
from typing import Any

import pytest
import torch
from architectures import BY_NAME, ENCODED, WITHOUT, Architecture, output_of
from measuring import GrapeCalls, bound, errors_of
from torch import Tensor, nn

from grape_compile import grape_compile, report

rows = pytest.mark.parametrize("row", ENCODED, ids=lambda row: row.name)


def compiled_eagerly(row: Architecture, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = grape_compile(row.build(dtype=dtype), backend="eager")
    return model


def assert_all_sites_run(
    model: nn.Module, calls: GrapeCalls, inputs: dict[str, Any], row: Architecture
) -> None:
    """Counted as operators that run in a forward pass, and in the report."""
    found = report(model)
    assert len(found.sites) == row.sites, str(found)
    assert found.refusals == () or row in WITHOUT, str(found)
    assert all(site.lowering != "none" for site in found.sites)
    calls.reset()
    with torch.no_grad():
        model(**inputs)
    assert (calls.rotated, calls.attended) == (row.rotations, row.biases), str(found)


@pytest.mark.parametrize("row", WITHOUT, ids=lambda row: row.name)
def test_where_there_is_nothing_nothing_changes(row: Architecture) -> None:
    calls = GrapeCalls()
    model, plain = grape_compile(row.build(), backend=calls), row.build()
    with torch.no_grad():
        found, wanted = output_of(model(**row.inputs())), output_of(plain(**row.inputs()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert_all_sites_run(model, calls, row.inputs(), row)


@rows
def test_in_float32(row: Architecture) -> None:
    """Logits and gradients keep the contract, and every site runs as an operator of ours."""
    calls = GrapeCalls()
    model = grape_compile(row.build(), backend=calls)
    errors = errors_of(row, {"plain": row.build(), "ours": model})
    assert errors["ours"].logits.relative <= bound([errors["plain"].logits.relative])
    assert errors["ours"].gradients.relative <= bound([errors["plain"].gradients.relative])
    assert_all_sites_run(model, calls, row.inputs(), row)


@rows
def test_in_bfloat16(row: Architecture) -> None:
    calls = GrapeCalls()
    model = grape_compile(row.build(dtype=torch.bfloat16), backend=calls)
    ways = {"plain": row.build(dtype=torch.bfloat16), "ours": model}
    errors = errors_of(row, ways, dtype=torch.bfloat16, gradients=False)
    assert errors["ours"].logits.relative <= bound([errors["plain"].logits.relative])
    assert_all_sites_run(model, calls, row.inputs(dtype=torch.bfloat16), row)


INDUCTOR = [
    pytest.param(row, marks=[] if row.name in ("llama", "bloom") else pytest.mark.slow, id=row.name)
    for row in ENCODED
]


@pytest.mark.parametrize("row", INDUCTOR)
@pytest.mark.timeout(900)
def test_through_inductor(row: Architecture) -> None:
    plain, ours = row.build(), grape_compile(row.build())
    ways: dict[str, nn.Module] = {"plain": plain, "ours": ours}
    ways["torch.compile"] = copy.deepcopy(plain)
    ways["torch.compile"].compile()
    errors = errors_of(row, ways)
    others = [errors["plain"], errors["torch.compile"]]
    assert errors["ours"].logits.relative <= bound(each.logits.relative for each in others)
    assert errors["ours"].gradients.relative <= bound(each.gradients.relative for each in others)
    assert len(report(ours).sites) == row.sites, str(report(ours))


@pytest.mark.slow
@rows
@pytest.mark.timeout(900)
def test_bfloat16_through_inductor(row: Architecture) -> None:
    plain = row.build(dtype=torch.bfloat16)
    ways: dict[str, nn.Module] = {"plain": plain, "ours": grape_compile(copy.deepcopy(plain))}
    ways["torch.compile"] = copy.deepcopy(plain)
    ways["torch.compile"].compile()
    errors = errors_of(row, ways, dtype=torch.bfloat16, gradients=False)
    others = (errors["plain"], errors["torch.compile"])
    assert errors["ours"].logits.relative <= bound(each.logits.relative for each in others)


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom", "roformer"])
def test_a_model_cast_as_a_whole(name: str) -> None:
    """`model.to(torch.bfloat16)` rounds the tables too: rewritten or refused, the contract holds."""
    row = BY_NAME[name]
    ways = {"plain": row.build().to(torch.bfloat16)}
    ways["ours"] = grape_compile(copy.deepcopy(ways["plain"]), backend="eager")
    errors = errors_of(row, ways, dtype=torch.bfloat16, gradients=False, oracle=ways["plain"])
    assert errors["ours"].logits.relative <= bound([errors["plain"].logits.relative])


def frequencies_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors positions are turned by: inverse frequencies, or tables of cosines and sines."""
    tensors = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}
    pattern = re.compile(r"(?<!original_)(inv_freq|embed_positions|embed_positions\.weight)$")
    return {name: tensor for name, tensor in tensors.items() if pattern.search(name)}


def disturbed(name: str, tensor: Tensor) -> Tensor:
    """Other frequencies; for a table another position in each row. Rotations stay rotations."""
    return tensor * 0.5 if name.endswith("inv_freq") else tensor.roll(1, dims=0)


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in frequencies_of(model).items():
            tensor.copy_(disturbed(name, tensor))


def replace(model: nn.Module) -> None:
    for name, tensor in frequencies_of(model).items():
        owner, _, leaf = name.rpartition(".")
        fresh = disturbed(name, tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(fresh, requires_grad=False) if is_parameter else fresh)


WITH_TABLES = [row for row in ENCODED if row.biases == 0]


@pytest.mark.parametrize("row", WITH_TABLES, ids=lambda row: row.name)
def test_frequencies_changed_after_compilation(row: Architecture) -> None:
    """In place, then by other tensors: what runs reads the model's own, whatever they hold by then."""
    inputs = row.inputs()
    model, plain = compiled_eagerly(row), row.build()
    with torch.no_grad():
        before = output_of(model(**inputs))
        for change in (change_in_place, replace):
            change(model)
            change(plain)
            wanted, found = output_of(plain(**inputs)), output_of(model(**inputs))
            assert (wanted - before).norm() > 1e-3 * wanted.norm(), "the change is not seen in the output"
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
            before = wanted


@pytest.mark.parametrize("name", ["llama", "bloom", "mpt"])
def test_a_left_padded_batch(name: str) -> None:
    """Rows of padding keep no live key: what the model makes of them stays finite and is not compared."""
    row = BY_NAME[name]
    inputs = row.inputs(batch=3)
    mask = torch.ones_like(inputs["input_ids"])
    for sample, padding in enumerate((0, 3, 7)):
        mask[sample, :padding] = 0
    model, plain = compiled_eagerly(row), row.build()
    with torch.no_grad():
        found = output_of(model(**inputs, attention_mask=mask))
        wanted = output_of(plain(**inputs, attention_mask=mask))
    live = mask.bool()
    torch.testing.assert_close(found[live], wanted[live], rtol=1e-4, atol=1e-5)
    assert report(model).refusals == ()


@pytest.mark.parametrize("name", ["llama", "bloom", "mpt"])
@pytest.mark.parametrize("dynamic", [True, False, None])
def test_sequence_lengths_after_one_another(name: str, dynamic: bool | None) -> None:
    row = BY_NAME[name]
    calls = GrapeCalls()
    model, plain = grape_compile(row.build(), backend=calls, dynamic=dynamic), row.build()
    for length in (16, 9, 33, 1, 16):
        inputs = row.inputs(seq=length)
        with torch.no_grad():
            found, wanted = output_of(model(**inputs)), output_of(plain(**inputs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        if length > 1:  # a single key has a weight of one, whatever its bias
            assert_all_sites_run(model, calls, inputs, row)
        if length > 1:  # a single key has a weight of one, whatever its bias
            assert_all_sites_run(model, calls, inputs, row)
