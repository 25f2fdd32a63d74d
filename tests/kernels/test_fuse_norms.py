"""RMSNorm of queries and keys joins their rotation where a kernel takes both, and only where it is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("triton")

from architectures import BY_NAME, output_of
from kernel_cases import DEVICE, kernels_first, worst

from grape_compile import grape_compile
from grape_compile.operators.sample import tensor
from grape_compile.passes import fuse_norms, norms

HEADS, SIZE = 2, 16


class Counting:
    """A backend that counts the operators of ours in its graphs and runs them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.normed = False

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if str(node.target).startswith("grape.rotate"):
                self.names.append(str(node.target))
                self.normed |= len(node.args) > 5 and bool(node.args[5])
        return module.forward


def rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(
        x
    )


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def centred(x: Tensor, weight: Tensor) -> Tensor:
    """LayerNorm is RMSNorm of what is left without the mean."""
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def of_another(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6) * weight


def by_content(x: Tensor, weight: Tensor) -> Tensor:
    return rms(x, weight) * x.sigmoid()


class Layer(nn.Module):
    """Queries and keys normalised and turned; `whole`: all heads of a token together, before they are apart.

    `after`: each head when it has turned.
    """

    def __init__(
        self,
        norm: Callable[[Tensor, Tensor], Tensor],
        *,
        whole: bool = False,
        read_twice: bool = False,
        after: bool = False,
    ) -> None:
        super().__init__()
        self.norm, self.whole, self.read_twice, self.after = norm, whole, read_twice, after
        width = HEADS * SIZE
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        size = width if whole else SIZE
        self.weights = nn.ParameterList(torch.linspace(0.5, 1.5, size).roll(shift) for shift in (0, 3))
        self.inv_freq = nn.Buffer(100.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2)))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        angle = torch.arange(length, device=hidden.device)[:, None] * self.inv_freq
        wide = torch.cat((angle, angle), -1)
        turned, extra = [], torch.zeros((), device=hidden.device)
        for project, weight in zip((self.query, self.key), self.weights, strict=True):
            x = project(hidden)
            x = self.norm(x, weight) if self.whole else x
            x = x.view(batch, length, HEADS, SIZE)
            x = (x if self.whole or self.after else self.norm(x, weight)).transpose(1, 2)
            extra = extra + x.sum() if self.read_twice and not self.after else extra
            half = torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), -1)
            x = x * wide.cos() + half * wide.sin()
            turned.append(x)
        if self.after:
            extra = extra + (turned[0].sum() + turned[1].sum() if self.read_twice else 0.0)
            turned = [self.norm(x, weight) for x, weight in zip(turned, self.weights, strict=True)]
        return (
            nn.functional.scaled_dot_product_attention(turned[0], turned[1], turned[1], is_causal=True)
            + extra
        )


def compiled(model: nn.Module, *arguments: Any, **named: Any) -> tuple[Any, list[str]]:
    counting = Counting()
    with kernels_first():
        result = grape_compile(model, backend=counting)(*arguments, **named)
    return result, counting.names


PLACES = {"heads": {}, "tokens": {"whole": True}, "turned heads": {"after": True}}


@pytest.mark.parametrize(
    ("norm", "place"),
    [
        pytest.param(norm, place, id=f"{norm.__name__} of {name}")
        for norm in (rms, gemma, fused, centred)
        for name, place in PLACES.items()
        # The mean of what has turned is read beside the norm.
        if norm is not centred or name != "turned heads"
    ],
)
def test_norms_join(norm: Callable[[Tensor, Tensor], Tensor], place: dict[str, bool]) -> None:
    model = Layer(norm, **place).to(DEVICE)
    hidden = tensor(2, 5, HEADS * SIZE, dtype=torch.float32).to(DEVICE)
    wanted = model(hidden)
    gradients = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
    found, names = compiled(model, hidden)
    assert names == ["grape.rotate_normed.default"]
    assert worst([found], [wanted]) < 1e-5
    own = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    for one, two in zip(own, gradients, strict=True):
        assert worst([one], [two]) <= 1e-4 * max(1.0, float(two.abs().max()))


@pytest.mark.parametrize(
    "model",
    [
        Layer(of_another, whole=False),
        Layer(by_content, whole=False),
        Layer(rms, whole=False, read_twice=True),
        Layer(of_another, after=True),
        Layer(by_content, after=True),
        Layer(rms, after=True, read_twice=True),
        Layer(centred, after=True),
    ],
    ids=lambda model: f"{model.norm.__name__}{' read twice' * model.read_twice}{' after' * model.after}",
)
def test_what_is_no_norm_stays(model: Layer) -> None:
    hidden = tensor(2, 5, HEADS * SIZE, dtype=torch.float32).to(DEVICE)
    wanted = model.to(DEVICE)(hidden)
    found, names = compiled(model, hidden)
    assert names == ["grape.rotate.default"]
    assert worst([found], [wanted]) < 1e-5


class Step(nn.Module):
    """A step of decoding: heads are normalised and turned, keys join their cache.

    `spoil` writes into what the norms read: before them, under another name, or between norm and rotation.
    """

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.spoil = spoil
        self.query, self.key = nn.Linear(32, HEADS * SIZE), nn.Linear(32, HEADS * SIZE)
        self.weights = nn.ParameterList(torch.linspace(0.5, 1.5, SIZE).roll(shift) for shift in (0, 3))
        self.inv_freq = nn.Buffer(100.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2)))

    def forward(self, hidden: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        wide = torch.cat((at[:, None] * self.inv_freq,) * 2, -1)
        turned = []
        for project, weight in zip((self.query, self.key), self.weights, strict=True):
            x = (hidden if self.spoil else project(hidden)).unflatten(-1, (HEADS, SIZE))
            if self.spoil == "before":
                hidden.mul_(2.0)
            normed = rms(x, weight).transpose(1, 2)
            if self.spoil == "between":
                hidden.mul_(2.0)
            half = torch.cat((-normed[..., SIZE // 2 :], normed[..., : SIZE // 2]), -1)
            turned.append(normed * wide.cos() + half * wide.sin())
        cache.index_copy_(2, at, turned[1])
        scores: Tensor = turned[0] @ cache.transpose(-1, -2)
        return scores


@pytest.mark.parametrize(("spoil", "normed"), [("", True), ("before", False), ("between", False)])
def test_a_step_that_writes_into_a_cache(spoil: str, normed: bool) -> None:
    """Norm, rotation and cache are one launch, unless something is written to what it would read."""
    counting, results = Counting(), []
    with torch.no_grad(), kernels_first():
        for compiling in (False, True):
            torch.manual_seed(0)
            model = Step(spoil).to(DEVICE)
            hidden = tensor(2, 3, 32, dtype=torch.float32).to(DEVICE)
            cache = tensor(2, HEADS, 8, SIZE, seed=3, dtype=torch.float32).to(DEVICE)
            run = grape_compile(model, backend=counting, fullgraph=True) if compiling else model
            scores = run(hidden, cache, torch.tensor([2, 3, 4], device=DEVICE))
            results.append([scores, cache, hidden])
    assert counting.names == ["grape.rotate_into.default"]
    assert counting.normed is normed
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_norm_that_was_misread_stays(after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are replayed: a reading that is wrong is found, and the graph is as it was."""
    reader = "norm_after" if after else "norm_before"
    read = getattr(norms, reader)

    def misread(node: fx.Node) -> norms.NormRead | None:
        found = read(node)
        return None if found is None else replace(found, epsilon=1e-3)

    monkeypatch.setattr(fuse_norms, reader, misread)
    model = Layer(rms, after=after).to(DEVICE)
    hidden = tensor(2, 5, HEADS * SIZE, dtype=torch.float32).to(DEVICE)
    wanted = model(hidden)
    found, names = compiled(model, hidden)
    assert names == ["grape.rotate.default"]
    assert worst([found], [wanted]) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_models(name: str) -> None:
    row = BY_NAME[name]
    inputs = {
        each: given.to(DEVICE) if isinstance(given, Tensor) else given for each, given in row.inputs().items()
    }
    wanted = output_of(row.build().to(DEVICE)(**inputs))
    result, names = compiled(row.build().to(DEVICE), **inputs)
    assert set(names) == {"grape.rotate_normed.default"}
    assert worst([output_of(result)], [wanted]) < 1e-4


def test_without_a_kernel_nothing_joins() -> None:
    if DEVICE != "cpu":
        pytest.skip("there is a kernel")
    counting = Counting()
    grape_compile(Layer(rms, whole=False), backend=counting)(tensor(2, 5, HEADS * SIZE, dtype=torch.float32))
    assert counting.names == ["grape.rotate.default"]
