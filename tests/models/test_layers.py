"""Layers that repeat are looked at once, and looking once changes nothing."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_layers import HEAD_DIM, HIDDEN, Angles, RotaryAttention, example, sharpen
from bias_spellings import BIAS_SPELLINGS
from rotation_spellings import plain
from torch import Tensor, fx, nn
from torch.nn import functional

from grape_compile.passes import capture, channel_maps, verify_biases
from grape_compile.passes.assignments import FunctionalAssignments
from grape_compile.passes.capture import capture_dynamo
from grape_compile.passes.graph import Program
from grape_compile.passes.lower import ShareAngles
from grape_compile.passes.replay import Replay
from grape_compile.passes.retrace import Retrace
from grape_compile.passes.rewrite_biases import RewriteBiases
from grape_compile.passes.rewrite_rotations import RewriteRotations


class Stack(nn.Module):
    """Residual layers, all alike."""

    def __init__(self, make: Callable[[], nn.Module], layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Everything(nn.Module):
    """Writes, views, random numbers, several outputs, constants, switched gradients."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.attention = RotaryAttention(plain)
        self.register_buffer("table", torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, dim=-1)
        rows = first.transpose(-1, -2).contiguous().float()
        rows.mul_(torch.tensor(0.5)).unsqueeze_(0)
        kept = torch.zeros_like(x)
        kept[..., ::2] = rows.squeeze(0).mT
        kept[..., 1::2] = functional.dropout(second, 0.1, self.training).relu_()
        with torch.no_grad():
            scale = kept.square().mean(-1, keepdim=True).rsqrt()
        mixed: Tensor = self.attention(kept * scale * self.table)
        return mixed + torch.cat((second, second), -1)


class RunsEveryNode(Retrace):
    """Takes no node for the repetition of another."""

    def _key(self, node: fx.Node, operands: Any) -> None:
        return None


def described(program: Program) -> list[tuple[object, ...]]:
    """All that later passes may look at."""
    found: list[tuple[object, ...]] = []
    for node in program.graph.nodes:
        values = [
            (tuple(map(str, (*value.shape, *value.stride()))), value.dtype)
            if isinstance(value, Tensor)
            else str(value)
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        ]
        provenance = [
            str(node.meta.get(name)) for name in ("stack_trace", "nn_module_stack", "original_aten")
        ]
        found.append((node.format_node(), values, provenance, node in program.no_grad))
    return found


@pytest.mark.parametrize(
    ("training", "dynamic", "half"),
    [
        (False, None, False),
        (True, None, False),
        (False, True, False),
        (True, True, False),
        (True, None, True),
    ],
)
def test_a_repeated_layer_is_traced_like_the_first(
    training: bool, dynamic: bool | None, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        repeated = described(capture_dynamo(module, examples))
        with monkeypatch.context() as patch:
            patch.setattr(capture, "Retrace", RunsEveryNode)
            assert repeated == described(capture_dynamo(module, examples))
        compared.append(len(repeated))
        return module.forward

    model = sharpen(Stack(Everything, 3)).train(training)
    compiled = torch.compile(model, backend=compare, dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=half):
        compiled(example())
    assert compared
    assert compared[0] > 100


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the costly steps was taken."""
    taken: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(self: Any, *args: Any) -> Any:
            taken[f"{owner.__name__}.{name}"] += 1
            return original(self, *args)

        monkeypatch.setattr(owner, name, counted)

    count(fx.Interpreter, "call_function")
    count(fx.Interpreter, "call_method")
    count(Replay, "_run")
    count(channel_maps.ChannelMap, "plan")
    count(verify_biases._Check, "error")
    return taken


def rotary(layers: int) -> nn.Module:
    """Layers that share their frequencies."""
    angles = Angles(HEAD_DIM // 2)
    return Stack(lambda: RotaryAttention(plain, angles=angles), layers)


def biased(layers: int) -> nn.Module:
    """Layers that share their slopes."""
    model = Stack(BIAS_SPELLINGS[0].make, layers)
    for layer in model.layers:
        layer.slopes = model.layers[0].slopes
    return model


def look(model: nn.Module, stages: Callable[[fx.GraphModule, Sequence[Any]], object]) -> None:
    """Give the graph of a model to `stages`."""

    def backend(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        stages(module, examples)
        return module.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(sharpen(model), backend=backend)(example())


def all_stages(module: fx.GraphModule, examples: Sequence[Any]) -> int:
    """The number of sites rewritten."""
    program = capture_dynamo(module, examples)
    steps = (FunctionalAssignments(), RewriteRotations(), RewriteBiases(), ShareAngles())
    return sum(len(step(program).sites) for step in steps)


def test_more_layers_are_no_more_work(work: Counter[str]) -> None:
    taken, sites = [], []
    for layers in (2, 6):
        work.clear()
        look(rotary(layers), lambda *graph: sites.append(all_stages(*graph)))
        taken.append(dict(work))
    assert sites == [4, 12]
    assert taken[0] == taken[1]
    assert taken[0]["Replay._run"] > 0


def test_layers_with_one_bias_are_verified_once(work: Counter[str]) -> None:
    sites = []
    look(biased(6), lambda *graph: sites.append(all_stages(*graph)))
    assert sites == [6]
    assert work["_Check.error"] == 1


def test_the_rest_grows_with_the_layers_and_no_faster() -> None:
    """Calls of functions, which no other load on the machine disturbs: as many for each further layer."""
    calls = []

    def count(module: fx.GraphModule, examples: Sequence[Any]) -> None:
        profile = cProfile.Profile()
        profile.runcall(all_stages, module, examples)
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # typeshed leaves it out

    for layers in (3, 3, 6, 12):
        look(rotary(layers), count)
    _, few, some, many = calls
    assert many - some <= 1.15 * 2 * (some - few), calls
