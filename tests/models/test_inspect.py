"""`inspect` finds every site of the promised architectures, names it rightly and changes nothing."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, ENCODED, WITHOUT, Architecture
from attention_layers import example, sharpen
from rotation_spellings import HALF_SPELLINGS
from torch import nn

from grape_compile import inspect
from grape_compile.encoding import Bias, Rotation, parse
from grape_compile.reporting import Report

rows = pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)


def inspected(row: Architecture) -> Report:
    return inspect(row.build(), (), row.inputs())


@pytest.mark.parametrize("row", ENCODED, ids=lambda row: row.name)
def test_every_site_is_found_and_none_refused(row: Architecture) -> None:
    report = inspected(row)
    kinds = Counter(site.kind for site in report.sites)
    assert (kinds["rotation"], kinds["bias"]) == (row.rotations, row.biases), str(report)
    assert report.refusals == (), str(report)


@pytest.mark.parametrize("row", WITHOUT, ids=lambda row: row.name)
def test_where_there_is_nothing_nothing_is_found(row: Architecture) -> None:
    assert inspected(row).sites == ()


@rows
def test_the_model_is_left_as_it_was(row: Architecture) -> None:
    model = row.build()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    inspect(model, (), row.inputs())

    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == tensors.keys()
    assert all(
        after[name] is tensor and torch.equal(tensor, values[name]) for name, tensor in tensors.items()
    )
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom", "deepseek_v3", "dinov3_vit"])
def test_a_site_says_where_it_is_and_what_it_is(name: str) -> None:
    row = BY_NAME[name]
    model = row.build()
    report = inspect(model, (), row.inputs())
    modules = {name for name, _ in model.named_modules()}
    for site in report.sites:
        assert isinstance(site.encoding, Rotation | Bias)
        assert parse(str(site.encoding)) == site.encoding
        assert site.module in modules
        assert re.search(rf"modeling_{row.name.split('-')[0]}\.py:\d+$", site.source), site.source
        assert site.evidence in ("proved", "tables")
        assert site.error is not None
        assert site.error < 1e-9
    assert Report.from_json(report.to_json()) == report
    assert len(json.loads(report.to_json())["sites"]) == row.sites


PLANES = {
    "llama": "half(16)",
    "llama-yarn": "half(16)",
    "gpt_oss": "half(16)",
    "falcon": "half(16)",
    "esm": "half(16)",
    "cohere": "interleaved(16)",
    "llama4_text": "interleaved(16)",
    "roformer": "interleaved(16)",
    "gptj": "partial(interleaved(8), 0, 16)",
    "glm4": "partial(interleaved(8), 0, 16)",
    "phi": "partial(half(8), 0, 16)",
    "gpt_neox": "partial(half(4), 0, 16)",
}


@pytest.mark.parametrize(("name", "planes"), PLANES.items())
def test_planes_and_orientation(name: str, planes: str) -> None:
    for site in inspected(BY_NAME[name]).sites:
        assert isinstance(site.encoding, Rotation)
        assert (str(site.encoding.planes), site.encoding.orientation) == (planes, 1)


YARN_NORM = {"llama": 1.0, "llama-yarn": 0.1 * math.log(4) + 1, "gpt_oss": 0.1 * math.log(32) + 1}


@pytest.mark.parametrize(("name", "norm"), YARN_NORM.items())
def test_norm_factor(name: str, norm: float) -> None:
    """YaRN multiplies cosines and sines by `0.1 ln(factor) + 1` (Peng et al., arXiv 2309.00071, 3.4)."""
    for site in inspected(BY_NAME[name]).sites:
        assert isinstance(site.encoding, Rotation)
        assert site.encoding.scale == pytest.approx(norm, rel=1e-6)


def test_a_layer_is_inspected_with_positional_arguments() -> None:
    layer: nn.Module = sharpen(HALF_SPELLINGS[0].make())
    assert len(inspect(layer, (example(),)).sites) == 2


def test_an_exported_program_is_inspected() -> None:
    row = BY_NAME["llama"]
    program = torch.export.export(row.build(), (), row.inputs())
    assert len(inspect(program).sites) == row.sites


def test_a_dynamic_sequence_has_the_same_sites() -> None:
    row = BY_NAME["llama"]
    length = torch.export.Dim("length", min=4, max=64)
    shapes = {"input_ids": {1: length}, "use_cache": None}
    report = inspect(row.build(), (), row.inputs(), dynamic_shapes=shapes)
    assert len(report.sites) == row.sites
    assert report.refusals == ()


@pytest.mark.parametrize("row", ENCODED, ids=lambda row: row.name)
def test_sites_are_found_in_bfloat16(row: Architecture) -> None:
    report = inspect(row.build(dtype=torch.bfloat16), (), row.inputs(dtype=torch.bfloat16))
    kinds = Counter(site.kind for site in report.sites)
    assert (kinds["rotation"], kinds["bias"]) == (row.rotations, row.biases), str(report)


@pytest.mark.parametrize("row", [BY_NAME["llama"], BY_NAME["bloom"]], ids=lambda row: row.name)
def test_a_padding_mask_changes_no_count(row: Architecture) -> None:
    inputs = row.inputs(batch=2)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    report = inspect(row.build(), (), inputs | {"attention_mask": mask})
    assert len(report.sites) == row.sites, str(report)
