"""A rotation writes over what a projection left, and only where nothing sees the difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("triton")

from kernel_cases import DEVICE, kernels_first

from grape_compile import grape_compile
from grape_compile.operators.sample import tensor

HEADS, SIZE, BATCH, TOKENS = 2, 16, 2, 5

#: From hidden states to heads [B, H, T, D], and what else the layer adds to its scores.
Project = Callable[["Layer", Tensor], tuple[Tensor, Tensor]]
ZERO = torch.zeros((), device=DEVICE)


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, -1, HEADS, SIZE).transpose(1, 2)


def plain(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return heads(layer.query(hidden)), ZERO


def scaled(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return heads(layer.query(hidden) * 0.5), ZERO


def read_before(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    query = layer.query(hidden)
    return heads(query), query.sum()


def read_later(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    layer.late = layer.query(hidden)
    return heads(layer.late), ZERO


def a_view_read_later(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    query = layer.query(hidden)
    layer.late = query[:, 1:].flatten(1)
    return heads(query), ZERO


def an_input(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return heads(hidden), ZERO


def repeated(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Both heads are one place in memory."""
    return layer.query(hidden)[..., :SIZE].view(BATCH, 1, -1, SIZE).expand(-1, HEADS, -1, -1), ZERO


def written_to(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return heads(layer.query(hidden).tanh_()), ZERO


def scaled_in_place(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Arithmetic in place is a value of its own by then."""
    return heads(layer.query(hidden).mul_(2.0)), ZERO


def one_for_both(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    layer.both = layer.query(hidden)
    return heads(layer.both), ZERO


class Layer(nn.Module):
    """Queries and keys that turn; only what becomes of the queries differs."""

    def __init__(self, project: Project) -> None:
        super().__init__()
        self.project = project
        self.query, self.key = nn.Linear(32, HEADS * SIZE), nn.Linear(32, HEADS * SIZE)
        self.inv_freq = nn.Buffer(100.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2)))

    def forward(self, hidden: Tensor) -> Tensor:
        self.late, self.both = ZERO, ZERO
        wide = torch.cat((torch.arange(hidden.shape[1], device=DEVICE)[:, None] * self.inv_freq,) * 2, -1)
        query, extra = self.project(self, hidden)
        late = self.late
        key = heads(self.key(hidden) if self.both is ZERO else self.both)
        turned = []
        for x in (query, key):
            half = torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), -1)
            turned.append(x * wide.cos() + half * wide.sin())
        query, key = turned
        scores: Tensor = query @ key.transpose(-1, -2) + extra + late.sum()
        return scores


class Watching:
    """Runs the graph and tells which tensors are written over: q is number 0, k number 1."""

    def __init__(self) -> None:
        self.calls: list[list[bool]] = []

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if node.target is torch.ops.grape.rotate.default:
                self.calls.append([False] * len(node.args[0]))
            elif node.target is torch.ops.grape.rotate_into.default:
                self.calls.append([one is two for one, two in zip(node.args[0], node.args[3], strict=True)])
        return module.forward


def run(layer: nn.Module, backend: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the layer makes of its input, and the input then: as it is, and twice compiled."""
    layer.to(DEVICE)
    results = []
    for number in range(3):
        hidden = tensor(BATCH, TOKENS, 32, dtype=torch.float32).to(DEVICE)
        with kernels_first():
            if number == 1:
                grape_compile(layer, backend=backend, fullgraph=True, **options)
            results.append([layer(hidden), hidden])
    return results[0] * 2, results[1] + results[2]


CASES: dict[Project, list[list[bool]]] = {
    plain: [[True, True]],
    scaled: [[True, True]],
    read_before: [[True, True]],
    read_later: [[False, True]],
    a_view_read_later: [[False, True]],
    an_input: [[False, True]],
    repeated: [[False, True]],
    written_to: [[False, True]],
    scaled_in_place: [[True, True]],
    one_for_both: [[False]],
}


@pytest.mark.parametrize("project", CASES, ids=lambda project: project.__name__)
def test_what_dies_is_written_over(project: Project) -> None:
    watching = Watching()
    with torch.no_grad():
        wanted, found = run(Layer(project), watching)
    assert watching.calls == CASES[project]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_may_be_differentiated_stays() -> None:
    watching = Watching()
    wanted, found = run(Layer(plain), watching)
    assert watching.calls == [[False, False]]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_part_with_gradients_inside_stays() -> None:
    def with_gradients(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            extra = layer.query(hidden).sum()
        return heads(layer.query(hidden)), extra

    watching = Watching()
    with torch.no_grad():
        wanted, found = run(Layer(with_gradients), watching)
    assert watching.calls == [[False, False]]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_a_kernel_nothing_changes() -> None:
    if DEVICE != "cpu":
        pytest.skip("there is a kernel")
    watching = Watching()
    with torch.no_grad():
        grape_compile(Layer(plain), backend=watching)(tensor(BATCH, TOKENS, 32, dtype=torch.float32))
    assert watching.calls == [[False, False]]


def test_queries_beside_a_cache_stay_where_they_are() -> None:
    """The rotation that writes keys into their cache leaves the queries where they stood."""

    class Decoding(Layer):
        def __init__(self, project: Project) -> None:
            super().__init__(project)
            self.cache = nn.Buffer(torch.zeros(BATCH, HEADS, 8, SIZE), persistent=False)

        def forward(self, hidden: Tensor) -> Tensor:
            wide = torch.cat((torch.arange(TOKENS, device=DEVICE)[:, None] * self.inv_freq,) * 2, -1)
            turned = []
            for x in (heads(self.query(hidden)), heads(self.key(hidden))):
                half = torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), -1)
                turned.append(x * wide.cos() + half * wide.sin())
            self.cache.index_copy_(2, torch.arange(TOKENS, device=DEVICE), turned[1])
            scores: Tensor = turned[0] @ self.cache.transpose(-1, -2)
            return scores

    watching = Watching()
    with torch.no_grad():
        wanted, found = run(Decoding(plain), watching)
    assert watching.calls == [[True, False]]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=["static", "dynamic"])
def test_a_compiler_gives_the_same(options: dict[str, Any]) -> None:
    """Functionalised, and back."""
    with torch.no_grad():
        wanted, found = run(Layer(plain), "aot_eager", **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
