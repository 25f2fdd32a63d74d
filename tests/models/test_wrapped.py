"""Models that something was wrapped around or put into: parameters from outside, LoRA, hooks, data parallelism."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import BY_NAME, Architecture, output_of
from attention_layers import RotaryAttention, example, sharpen
from measuring import GrapeCalls, forward_backward
from rotation_spellings import plain
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

from grape_compile import grape_compile, inspect, report, rewrite

ROWS = [BY_NAME[name] for name in ("llama", "bloom")]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def assert_like(
    plain_model: nn.Module,
    compiled: nn.Module,
    calls: GrapeCalls,
    row: Architecture,
    record: nn.Module | None = None,
) -> None:
    """Output and gradients of the plain model, every site run as an operator of ours."""
    wanted, gradients = forward_backward(plain_model, row.inputs(), 0)
    calls.reset()
    found, ours = forward_backward(compiled, row.inputs(), 0)
    assert (calls.rotated, calls.attended) == (row.rotations, row.biases), str(report(record or compiled))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert len(ours) == len(gradients) > 0
    for mine, theirs in zip(ours.values(), gradients.values(), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
    assert len(report(record or compiled).sites) == row.sites
    assert report(record or compiled).refusals == ()


@rows
def test_parameters_given_from_outside(row: Architecture) -> None:
    """`torch.func.functional_call`: through a compiled model, inside of one, and exported."""
    model, inputs = row.build(), row.inputs()
    given = {name: 1.1 * parameter.detach() for name, parameter in model.named_parameters()}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = row.build()

        def forward(self, parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
            options = {"input_ids": ids, "use_cache": False}
            return output_of(torch.func.functional_call(self.model, parameters, (), options))

    with torch.no_grad():
        wanted = output_of(torch.func.functional_call(model, given, (), inputs))
        compiled, inside = (
            grape_compile(row.build(), backend="eager"),
            grape_compile(Called(), backend="eager"),
        )
        program, found = rewrite(torch.export.export(Called(), (given, inputs["input_ids"])))
        outputs = [
            output_of(torch.func.functional_call(compiled, given, (), inputs)),
            inside(given, inputs["input_ids"]),
            program.module()(given, inputs["input_ids"]),
        ]
    for each in (report(compiled), report(inside), found):
        assert len(each.sites) == row.sites, str(each)
    for output in outputs:
        assert (output - wanted).norm() <= 1e-5 * wanted.norm()


def test_many_models_at_once() -> None:
    """An ensemble: `vmap` over the parameters of a rewritten program."""
    layer, x = sharpen(RotaryAttention(plain)), example()
    program, _ = rewrite(torch.export.export(layer, (example(),)))
    stacked = {
        name: torch.stack([each.detach(), -1.1 * each.detach()]) for name, each in layer.named_parameters()
    }

    def run(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda parameters: torch.func.functional_call(model, parameters, (x,))

    found = torch.vmap(run(program.module()))(stacked)
    torch.testing.assert_close(found, torch.vmap(run(layer))(stacked), rtol=1e-4, atol=1e-5)


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer.get_submodule("query"))


def orthogonal(layer: nn.Module) -> None:
    parametrizations.orthogonal(layer.get_submodule("key"))


class LowRank(nn.Module):
    """A linear layer with a low-rank update beside it: LoRA (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return out


def low_rank(layer: nn.Module) -> None:
    torch.manual_seed(0)
    for name in ("query", "value"):
        setattr(layer, name, LowRank(layer.get_submodule(name)))  # type: ignore[arg-type]  # linear layers


def tied(layer: nn.Module) -> None:
    layer.key.weight = layer.query.weight  # type: ignore[union-attr]


def hooked(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    layer.register_forward_hook(lambda *args: args[2] + 1)
    layer.get_submodule("query").register_forward_hook(lambda *args: 2 * args[2])
    layer.get_submodule("value").register_full_backward_hook(lambda *_: None)


CHANGES = (weight_norm, orthogonal, low_rank, tied, hooked)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_layer(change: Callable[[nn.Module], None]) -> None:
    layer = sharpen(RotaryAttention(plain))
    change(layer)
    compiled = grape_compile(copy.deepcopy(layer), backend="eager")
    outputs = []
    for model in (layer, compiled):
        output = model(example())
        torch.autograd.backward(output, torch.linspace(-1, 1, output.numel()).view_as(output))
        outputs.append([output, *(each.grad for each in model.parameters() if each.requires_grad)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert len(report(compiled).sites) == len(inspect(layer, (example(),)).sites) == 2


def test_a_parametrization_put_on_afterwards() -> None:
    layer = grape_compile(sharpen(RotaryAttention(plain)), backend="eager")
    before = layer(example())

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer.get_submodule("out"), "weight", Doubled())
    torch.testing.assert_close(layer(example()), 2 * before, rtol=1e-4, atol=1e-5)


@rows
def test_lora_by_peft(row: Architecture) -> None:
    peft: Any = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"] if row.name == "llama" else ["query_key_value"]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
        models.append(peft.get_peft_model(row.build(), config).eval())
    calls = GrapeCalls()
    grape_compile(models[1], backend=calls)
    assert_like(models[0], models[1], calls, row)
    names = {name for name, _ in models[1].named_modules()}
    assert {site.module for site in report(models[1]).sites} <= names


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one process, without a network."""
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    store = distributed.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@rows
@pytest.mark.parametrize("inside", [True, False], ids=["compiled inside", "compiled outside"])
@pytest.mark.usefixtures("one_process")
def test_data_parallel(row: Architecture, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets so small that torch cuts the graph between the tables and the layers that use them."""
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    calls, pieces = GrapeCalls(), []

    def backend(module: Any, examples: Any) -> Any:
        pieces.append(module)
        return calls(module, examples)

    model = row.build()
    if inside:
        grape_compile(model, backend=backend)
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.06)
    if not inside:
        grape_compile(parallel, backend=backend)
    wrapped = DistributedDataParallel(row.build())
    assert_like(wrapped, parallel, calls, row, model if inside else parallel)
    assert len(pieces) > 2
