"""What cannot work is said in three parts; what can only be left alone runs as it did before."""

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import BY_NAME, output_of
from attention_layers import HIDDEN, RotaryAttention, example, inverse_frequencies, sharpen
from bias_spellings import BIAS_SPELLINGS
from rotation_spellings import plain, rotate_half
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report, restore, rewrite
from grape_compile.errors import CaptureError, GrapeError


def assert_tells(error: GrapeError) -> None:
    assert all((error.asked, error.found, error.works)), str(error)


def assert_runs_as_before(layer: nn.Module, *inputs: Tensor, dynamic: bool | None = None) -> None:
    """The same result from the compiled layer, or an error of ours that says what would work."""
    wanted = copy.deepcopy(layer)(*inputs)
    compiled = grape_compile(copy.deepcopy(layer), backend="eager", dynamic=dynamic)
    try:
        found = compiled(*inputs)
    except GrapeError as error:
        assert_tells(error)
        return
    assert found.dtype == wanted.dtype
    assert found.device == wanted.device
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


NO_MODELS = {
    "text": "llama",
    "class": nn.Linear,
    "function": torch.relu,
    "none": None,
    "tensor": torch.ones(2),
}


@pytest.mark.parametrize("thing", NO_MODELS.values(), ids=NO_MODELS)
@pytest.mark.parametrize("door", [grape_compile, inspect, rewrite, report, restore])
def test_not_a_model(door: Callable[..., object], thing: object) -> None:
    with pytest.raises(GrapeError) as caught:
        door(thing)
    assert isinstance(caught.value, TypeError)
    assert_tells(caught.value)


@pytest.mark.parametrize(("backend", "on_refusal"), [("inducktor", "keep"), ("eager", "shrug")])
def test_an_option_nobody_knows(backend: str, on_refusal: str) -> None:
    with pytest.raises(GrapeError) as caught:
        grape_compile(nn.Linear(2, 2), backend=backend, on_refusal=on_refusal)
    assert_tells(caught.value)


def test_inspected_with_arguments_the_model_does_not_take() -> None:
    with pytest.raises(CaptureError) as caught:
        inspect(sharpen(RotaryAttention(plain)), (example(), example()))
    assert_tells(caught.value)


def test_an_error_of_the_model_stays_its_own() -> None:
    compiled = grape_compile(sharpen(RotaryAttention(plain)), backend="eager")
    with pytest.raises(RuntimeError) as caught:
        compiled(torch.randn(2, 12, HIDDEN + 1))
    assert not isinstance(caught.value, GrapeError)


class Interrupted(nn.Module):
    """Two layers with something between them that no graph can hold."""

    def __init__(self, interruption: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.first, self.second = RotaryAttention(plain), RotaryAttention(plain)
        self.interruption = interruption

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.first(x))
        self.interruption(x)
        return torch.add(x, self.second(x))


def reads_a_value(x: Tensor) -> None:
    if x.sum().item() > 1e9:
        raise ValueError("not finite enough")


def writes_a_file(x: Tensor) -> None:
    with open("/dev/null", "w", encoding="utf-8") as file:
        file.write(str(x.shape))


@pytest.mark.parametrize("interruption", [reads_a_value, writes_a_file])
def test_a_model_that_breaks_the_graph(interruption: Callable[[Tensor], None]) -> None:
    layer = sharpen(Interrupted(interruption))
    assert_runs_as_before(layer, example())
    compiled = grape_compile(layer, backend="eager")
    compiled(example())
    assert len(report(compiled).sites) == 4, str(report(compiled))


def test_inspect_looks_through_a_broken_graph() -> None:
    layer = sharpen(Interrupted(reads_a_value))
    before = {name: set(vars(module)) for name, module in layer.named_modules()}
    assert len(inspect(layer, (example(),)).sites) == 4
    assert {name: set(vars(module)) for name, module in layer.named_modules()} == before


def turned_as(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A rotation whose input went through another type."""

    def turn(x: Tensor, angle: Tensor) -> Tensor:
        return plain(x.to(dtype).to(x.dtype), angle)

    return turn


def integers(x: Tensor, angle: Tensor) -> Tensor:
    return plain(x.round().to(torch.int64), angle)


def complex_numbers(x: Tensor, angle: Tensor) -> Tensor:
    return torch.view_as_real(plain(torch.complex(x, 0.5 * x), angle))[..., 0]


STRANGE_TYPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fp8": turned_as(torch.float8_e4m3fn),
    "fp8 e5m2": turned_as(torch.float8_e5m2),
    "integer": integers,
    "complex": complex_numbers,
}


@pytest.mark.parametrize("turn", STRANGE_TYPES.values(), ids=STRANGE_TYPES)
def test_queries_of_a_type_no_operator_takes(turn: Callable[[Tensor, Tensor], Tensor]) -> None:
    layer = sharpen(RotaryAttention(turn))
    assert_runs_as_before(layer, example())
    inspect(layer, (example(),))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rotation": lambda: RotaryAttention(plain),
    "bias": BIAS_SPELLINGS[0].make,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_other_floating_types(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    layer = sharpen(make()).to(dtype)
    x = example().to(dtype)
    wanted, found = layer(x), grape_compile(copy.deepcopy(layer), backend="eager")(x)
    assert found.dtype == dtype
    coarse = 64 * torch.finfo(dtype).eps
    assert (found.double() - wanted.double()).norm() <= coarse * wanted.double().norm()


class OddHead(nn.Module):
    """A head of fifteen coordinates of which the first fourteen turn."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(7))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(query.shape[-2]).to(query.dtype), self.get_buffer("inv_freq"))
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        turned = []
        for x in (query, key):
            moving, kept = x[..., :14], x[..., 14:]
            turned.append(torch.cat((moving * cos + rotate_half(moving) * sin, kept), dim=-1))
        return turned[0] @ turned[1].mT


def test_an_odd_head_size() -> None:
    query, key = torch.randn(2, 2, 3, 12, 15)
    assert_runs_as_before(OddHead(), query, key)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("batch", "length"), [(0, 12), (2, 1), (1, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_empty_and_single(
    make: Callable[[], nn.Module], batch: int, length: int, dynamic: bool | None
) -> None:
    x = example(length, batch)
    assert_runs_as_before(sharpen(make()), x, dynamic=dynamic)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("batch", "length"), [(0, 12), (2, 1), (2, 0)])
def test_inspected_empty_and_single(make: Callable[[], nn.Module], batch: int, length: int) -> None:
    """One position tells no rotation from the identity: whatever is found, nothing breaks."""
    found = inspect(sharpen(make()), (example(length, batch),))
    assert len(found.sites) <= 2


def bloom_logits() -> nn.Module:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = BY_NAME["bloom"].build()

        def forward(self, x: Tensor) -> Tensor:
            return output_of(self.model(inputs_embeds=torch.cat((x, x), dim=-1), use_cache=False))

    return Logits()


@pytest.mark.parametrize("make", [LAYERS["rotation"], bloom_logits], ids=["rotation", "bias"])
def test_a_device_without_kernels(make: Callable[[], nn.Module]) -> None:
    """On the meta device nothing is computed, but shapes and types come out as the plain model's do."""
    layer, x = make().to("meta"), example().to("meta")
    wanted = layer(x)
    try:
        found = grape_compile(layer, backend="eager")(x)
    except GrapeError as error:
        assert_tells(error)
        return
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)


def test_inference_mode() -> None:
    layer = sharpen(RotaryAttention(plain))
    with torch.inference_mode():
        assert_runs_as_before(layer, example())


def test_a_model_compiled_by_torch_before() -> None:
    layer = torch.compile(sharpen(RotaryAttention(plain)), backend="eager")
    assert isinstance(layer, nn.Module)
    wanted = layer(example())
    torch.testing.assert_close(grape_compile(layer, backend="eager")(example()), wanted)


def test_a_model_without_parameters_or_inputs() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.arange(3.0).cos()

    assert_runs_as_before(Constant())
    assert inspect(Constant()).sites == ()


def test_inputs_that_do_not_lie_densely() -> None:
    layer = sharpen(RotaryAttention(plain))
    strided = torch.randn(2, HIDDEN, 12).transpose(1, 2)
    assert not strided.is_contiguous()
    assert_runs_as_before(layer, strided)


def test_far_positions() -> None:
    layer = sharpen(RotaryAttention(plain)).double()
    x = example(1500, batch=1).double()
    wanted, found = layer(x), grape_compile(copy.deepcopy(layer), backend="eager")(x)
    assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
