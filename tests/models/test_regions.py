"""Sites inside of autocast, checkpoints, conditions, loops and vmap: found and rewritten there, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_layers import HIDDEN, RotaryAttention, example, sharpen
from bias_spellings import BIAS_SPELLINGS
from rotation_spellings import plain
from torch import Tensor, fx, nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_over
from torch.utils.checkpoint import checkpoint

from grape_compile import grape_compile, inspect, report, rewrite

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rotation": lambda: RotaryAttention(plain),
    "bias": BIAS_SPELLINGS[0].make,
}
SITES = {"rotation": 2, "bias": 1}
layers = pytest.mark.parametrize("kind", LAYERS)


class Around(nn.Module):
    """One layer or two with something around them."""

    def __init__(self, kind: str, run: Callable[[list[nn.Module], Tensor], Tensor], count: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind]() for _ in range(count))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(list(self.layers), x)


def in_bfloat16(inner: list[nn.Module], x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = inner[0](x)
    return y.float() + x


def without_autocast(inner: list[nn.Module], x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(x, torch.eye(HIDDEN))
        with torch.autocast("cpu", enabled=False):
            z: Tensor = inner[0](y.float())
    return z


def without_gradients(inner: list[nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = inner[0](x)
    return y * x


def checkpointed(inner: list[nn.Module], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(inner[0], x, use_reentrant=False)
    return y + x


def checkpointed_in_autocast(inner: list[nn.Module], x: Tensor) -> Tensor:
    return checkpointed(inner, in_bfloat16(inner, x))


def reentrant(inner: list[nn.Module], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(inner[0], x, use_reentrant=True)
    return y + x


REGIONS: dict[str, Callable[[list[nn.Module], Tensor], Tensor]] = {
    "autocast": in_bfloat16,
    "autocast switched off inside": without_autocast,
    "no gradients": without_gradients,
    "checkpoint": checkpointed,
    "checkpoint, reentrant": reentrant,
}


def run_and_pull(model: nn.Module, parameters: Sequence[nn.Parameter], x: Tensor) -> list[Tensor]:
    """The output, and gradients of the input and the parameters for a random cotangent."""
    leaves = [x.clone().requires_grad_(), *parameters]
    for leaf in leaves:
        leaf.grad = None
    output: Tensor = model(leaves[0])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward(output, cotangent.to(output.dtype))
    return [output.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros(()) for leaf in leaves)]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], error: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= error * theirs.norm()


@layers
@pytest.mark.parametrize("name", REGIONS)
def test_a_region_is_read_and_stays_a_region(name: str, kind: str) -> None:
    """Outputs and gradients are the original's: to rounding, and under autocast to a rounding of bfloat16 a step."""
    model = sharpen(Around(kind, REGIONS[name]))
    parameters = list(model.parameters())
    wanted = run_and_pull(model, parameters, example())
    error = 2**-6 if name == "autocast" else 1e-5
    compiled = grape_compile(copy.deepcopy(model), backend="eager")
    found = run_and_pull(compiled, list(compiled.parameters()), example())
    assert len(report(compiled).sites) == SITES[kind], str(report(compiled))
    assert report(compiled).refusals == ()
    assert_same(found, wanted, error)
    assert len(inspect(model, (example(),)).sites) == SITES[kind]
    program, rep = rewrite(torch.export.export(model, (example(),)))
    assert len(rep.sites) == SITES[kind], str(rep)
    if name == "checkpoint, reentrant":  # which torch exports without its gradients
        assert_same([program.module()(example())], wanted[:1], error)
    else:
        assert_same(run_and_pull(program.module(), parameters, example()), wanted, error)


@layers
def test_autocast_within_the_error_contract(kind: str) -> None:
    """Over three seeds, not further from float64 than the original under autocast."""
    errors = [0.0, 0.0]
    for seed in range(3):
        model = sharpen(Around(kind, in_bfloat16), seed)
        compiled = grape_compile(copy.deepcopy(model), backend="eager")
        exact = copy.deepcopy(model).double()
        x = example(seed=seed)
        wanted = exact.get_submodule("layers.0")(x.double()) + x
        for place, each in enumerate((model, compiled)):
            errors[place] += ((each(x) - wanted).norm() / wanted.norm()).square().item()
    assert errors[1] ** 0.5 <= 1.25 * errors[0] ** 0.5 + 1e-7


def test_regions_inside_of_regions() -> None:
    model = sharpen(Around("rotation", checkpointed_in_autocast))
    parameters = list(model.parameters())
    wanted = run_and_pull(model, parameters, example())
    compiled = grape_compile(copy.deepcopy(model), backend="eager")
    found = run_and_pull(compiled, list(compiled.parameters()), example())
    assert len(report(compiled).sites) == 4, str(report(compiled))
    assert_same(found, wanted, 2**-6)


def test_what_is_checkpointed_is_computed_again() -> None:
    """The backward pass runs the rotation of the forward pass once more, as a checkpoint is meant to."""
    ran = []

    def backend(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        bodies = [each for each in module.modules() if isinstance(each, fx.GraphModule)]
        for body in bodies[1:]:
            rotations = body.graph.find_nodes(op="call_function", target=torch.ops.grape.rotate.default)
            ran.append(len(rotations))
        return module.forward

    model = grape_compile(sharpen(Around("rotation", checkpointed)), backend=backend)
    model(example().requires_grad_())
    assert ran == [1]


def test_a_rewritten_region_is_saved_decomposed_and_exported_again(tmp_path: Any) -> None:
    model = sharpen(Around("rotation", in_bfloat16))
    wanted = model(example())
    program, _ = rewrite(torch.export.export(model, (example(),)))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    again = torch.export.export(program.module(), (example(),))
    for each in (loaded, again, program.run_decompositions()):
        assert_same([each.module()(example())], [wanted], 2**-6)


def test_an_operator_does_not_leave_its_region() -> None:
    """Everything that turns is there before gradients are switched off: what is turned still has none."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            angle = torch.outer(torch.arange(12.0), 10.0 ** -torch.arange(8.0))
            y = x * 2
            with torch.no_grad():
                turned = plain(y, angle)
            return turned + y

    x = torch.randn(2, 2, 12, 16)
    model = grape_compile(Turned(), backend="eager")
    for each in (model, rewrite(torch.export.export(Turned(), (x,)))[0].module()):
        leaf = x.clone().requires_grad_()
        torch.autograd.backward(each(leaf).sum())
        torch.testing.assert_close(leaf.grad, torch.full_like(x, 2.0))
    assert len(report(model).sites) == 1


def on_a_condition(inner: list[nn.Module], x: Tensor) -> Tensor:
    chosen: Tensor = torch.cond(x.sum() > 0, inner[0], inner[1], (x,))
    return chosen


def over_a_batch(inner: list[nn.Module], x: Tensor) -> Tensor:
    mapped: Tensor = map_over(lambda each: inner[0](each[None])[0], x)  # type: ignore[misc, arg-type]  # further operands
    return mapped


def scanned(inner: list[nn.Module], x: Tensor) -> Tensor:
    total: Tensor = scan(lambda carry, each: (carry + 1, inner[0](each[None])[0]), torch.zeros(1), x)[1]
    return total


def repeated(inner: list[nn.Module], x: Tensor) -> Tensor:
    last: Tensor = while_loop(
        lambda step, _: step < 3, lambda step, y: (step + 1, inner[0](y)), (torch.tensor(0), x)
    )[1]
    return last


BODIES = {
    "cond": (on_a_condition, 2),
    "map": (over_a_batch, 1),
    "scan": (scanned, 1),
    "while_loop": (repeated, 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_conditions_and_loops(name: str) -> None:
    run, count = BODIES[name]
    model = sharpen(Around("rotation", run, count))
    with torch.no_grad():
        wanted = [model(sign * example()) for sign in (1, -1)]
        compiled = grape_compile(copy.deepcopy(model), backend="eager")
        found = [compiled(sign * example()) for sign in (1, -1)]
        assert len(report(compiled).sites) == 2 * count, str(report(compiled))
        assert report(compiled).refusals == ()
        assert_same(found, wanted, 1e-5)
        program, rep = rewrite(torch.export.export(model, (example(),)))
        assert len(rep.sites) == 2 * count, str(rep)
        assert_same([program.module()(sign * example()) for sign in (1, -1)], wanted, 1e-5)


class TurnedByHand(torch.autograd.Function):
    """A rotation whose backward pass its author wrote."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angle: Tensor) -> Tensor:
        ctx.save_for_backward(angle)
        return plain(x, angle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return plain(gradient, -ctx.saved_tensors[0]), None


def turned_by_hand(x: Tensor, angle: Tensor) -> Tensor:
    turned: Tensor = TurnedByHand.apply(x, angle)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return turned


def test_a_custom_function_is_left_alone_and_told() -> None:
    model = sharpen(RotaryAttention(turned_by_hand))
    wanted = model(example())
    compiled = grape_compile(model, backend="eager")
    torch.testing.assert_close(compiled(example().requires_grad_()), wanted)
    found = report(compiled)
    assert found.sites == ()
    assert {refusal.rule for refusal in found.refusals} == {"body"}, str(found)


class Clipped(torch.autograd.Function):
    """The identity, with a gradient of bounded size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


def test_what_a_custom_function_gives_is_turned_like_anything_else() -> None:
    """Its operator gives several results, of which the rotation starts at one."""

    def turned(x: Tensor, angle: Tensor) -> Tensor:
        return plain(Clipped.apply(x), angle)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    model = sharpen(RotaryAttention(turned))
    wanted = run_and_pull(model, list(model.parameters()), example())
    compiled = grape_compile(copy.deepcopy(model), backend="eager")
    found = run_and_pull(compiled, list(compiled.parameters()), example())
    assert_same(found, wanted, 1e-5)
    assert (len(report(compiled).sites), report(compiled).refusals) == (2, ()), str(report(compiled))


@layers
def test_vmap_inside_of_a_model(kind: str) -> None:
    batches = torch.stack([example(seed=seed) for seed in range(3)])
    model = sharpen(Around(kind, lambda inner, x: torch.vmap(inner[0])(x)))
    parameters = list(model.parameters())
    wanted = run_and_pull(model, parameters, batches)
    compiled = grape_compile(copy.deepcopy(model), backend="eager")
    found = run_and_pull(compiled, list(compiled.parameters()), batches)
    assert_same(found, wanted, 1e-5)
    program, rep = rewrite(torch.export.export(model, (batches,)))
    assert_same(run_and_pull(program.module(), parameters, batches), wanted, 1e-5)
    for each in (report(compiled), rep):
        assert (len(each.sites), each.refusals) == (2 if kind == "rotation" else 1, ())


def test_vmap_over_heads() -> None:
    """Each head with a slope of its own; torch.export loses values of such a model, which is looked at differently."""

    class Heads(nn.Module):
        slopes: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slopes", 0.5 ** torch.arange(1.0, 5.0))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            steps = torch.arange(q.shape[2])
            bias, dead = (steps - steps[:, None]).float(), steps > steps[:, None]

            def head(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
                scores = q @ k.transpose(-1, -2) / 8**0.5 + slope * bias
                return scores.masked_fill(dead, -torch.inf).softmax(-1) @ v

            return torch.vmap(head, (1, 1, 1, 0), 1)(q, k, v, self.slopes)

    inputs = tuple(
        torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    )
    compiled = grape_compile(Heads(), backend="eager")
    torch.testing.assert_close(compiled(*inputs), Heads()(*inputs))
    for found in (report(compiled), inspect(Heads(), inputs)):
        assert [site.kind for site in found.sites] == ["bias"], str(found)


def test_a_mask_made_under_vmap() -> None:
    """As transformers does for masks that are functions of indices; the attention is not mapped."""

    def masked(inner: list[nn.Module], x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        seen = torch.vmap(torch.vmap(lambda q, k: (k <= q) & (q - k < 5), (None, 0)), (0, None))(steps, steps)
        y: Tensor = inner[0](x)
        return torch.where(seen[:, :1], y, -y)

    model = sharpen(Around("rotation", masked))
    wanted = model(example())
    for dynamic in (None, True):
        compiled = grape_compile(copy.deepcopy(model), backend="eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(example()), wanted)
        assert len(report(compiled).sites) == 2, str(report(compiled))


def test_a_value_the_tracer_loses_stops_the_capture() -> None:
    """A tensor that is neither an input nor computed would be written down as a constant: the original runs."""

    class Differentiated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = RotaryAttention(plain)

        def forward(self, x: Tensor) -> Tensor:
            gradient: Tensor = torch.func.grad(lambda y: self.inner(y).square().sum())(x)
            return gradient

    model = sharpen(Differentiated())
    wanted = [model(example(seed=seed)) for seed in (0, 1)]
    compiled = grape_compile(model, backend="eager")
    for seed in (0, 1):
        torch.testing.assert_close(compiled(example(seed=seed)), wanted[seed])
