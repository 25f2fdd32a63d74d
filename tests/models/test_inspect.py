"""`inspect` finds every site of the promised architectures, names it rightly and changes nothing."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, WITHOUT, Architecture
from attention_layers import example, sharpen
from rotation_spellings import HALF_SPELLINGS
from torch import Tensor, nn

from grape_compile import inspect
from grape_compile.encoding import Bias, Rotation, parse
from grape_compile.errors import CaptureError
from grape_compile.reporting import Report


def inspected(row: Architecture) -> Report:
    report: Report = inspect(row.build(), (), row.inputs())
    return report


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_every_site_is_found_and_the_model_is_left_alone(row: Architecture) -> None:
    model = row.build()
    before = Fingerprint(model)
    report = inspect(model, (), row.inputs())
    kinds = Counter(site.kind for site in report.sites)
    assert (kinds["rotation"], kinds["bias"]) == (row.rotations, row.biases), str(report)
    assert report.refusals == () or row in WITHOUT, str(report)
    before.assert_still(model)


class Fingerprint:
    """What must not change in a model: its tensors and their values, its modules, their attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = self.tensors_of(model)
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.modules = self.modules_of(model)

    @staticmethod
    def tensors_of(model: nn.Module) -> dict[str, Tensor]:
        return dict(model.named_parameters()) | dict(model.named_buffers())

    @staticmethod
    def modules_of(model: nn.Module) -> list[tuple[str, type[nn.Module], bool, set[str]]]:
        return [(name, type(each), each.training, set(vars(each))) for name, each in model.named_modules()]

    def assert_still(self, model: nn.Module) -> None:
        now = self.tensors_of(model)
        assert now.keys() == self.tensors.keys()
        for name, tensor in now.items():
            assert tensor is self.tensors[name]
            assert torch.equal(tensor, self.values[name])
        assert self.modules_of(model) == self.modules


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


@pytest.mark.parametrize("row", [BY_NAME["llama"], BY_NAME["bloom"]], ids=lambda row: row.name)
def test_a_padding_mask_changes_no_count(row: Architecture) -> None:
    inputs = row.inputs(batch=2)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    report = inspect(row.build(), (), inputs | {"attention_mask": mask})
    assert len(report.sites) == row.sites, str(report)


class ChoosesByValue(nn.Module):
    """Turns by frequencies chosen by the longest position: neither door of torch takes it in one graph."""

    steps_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = HALF_SPELLINGS[0].make()
        self.register_buffer("steps_seen", torch.zeros(()))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        self.steps_seen.copy_(positions.max() + 1)
        scale = 2.0 if int(positions.max()) > 1000 else 1.0
        for expert in positions.unique().tolist()[:2]:
            x = x + scale * expert
        out: Tensor = self.inner(x)
        return out


def test_what_no_door_of_torch_takes_is_watched_while_it_runs() -> None:
    model = ChoosesByValue()
    sharpen(model)
    before = Fingerprint(model)
    x = example()
    report = inspect(model, (x,), {"positions": torch.arange(x.shape[1])})
    assert [site.module for site in report.sites] == ["inner", "inner"], str(report)
    assert all(re.search(r"attention_layers\.py:\d+$", site.source) for site in report.sites), str(report)
    assert {site.evidence for site in report.sites} == {"proved"}
    before.assert_still(model)


def test_a_model_that_does_not_run_is_told() -> None:
    with pytest.raises(CaptureError, match="arguments the model's forward accepts"):
        inspect(ChoosesByValue(), (example(),))
