"""A key that is turned and copied into a cache is turned into the cache, and only where that is the same."""

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

HEADS, SIZE, CAPACITY, BATCH, TOKENS = 2, 16, 12, 2, 3

#: A way to put turned keys [B, H, T, D] into a cache [B, H, C, D], and return what is read of it.
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def index_copy(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    return cache.index_copy_(2, at, key)


def index_put(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = key
    return cache


def a_slice(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    cache[:, :, 4 : 4 + TOKENS] = key
    return cache


def read_again(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    return cache.index_copy_(2, at, key) + key.sum()


def along_heads(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    cache.transpose(1, 2)[:, :TOKENS].index_copy_(2, at[:HEADS] - 4, key.transpose(1, 2))
    return cache


def accumulated(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    return cache.index_add_(2, at, key)


def narrower(cache: Tensor, key: Tensor, at: Tensor) -> Tensor:
    narrow = cache.half()
    narrow[:, :, 4 : 4 + TOKENS] = key
    return narrow.float()


class Layer(nn.Module):
    def __init__(self, write: Write, *, query_first: bool = False) -> None:
        super().__init__()
        self.write, self.query_first = write, query_first
        self.query, self.key = nn.Linear(32, HEADS * SIZE), nn.Linear(32, HEADS * SIZE)
        self.inv_freq = nn.Buffer(100.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2)))

    def forward(self, hidden: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        wide = torch.cat((at[:, None] * self.inv_freq,) * 2, -1)
        turned = []
        for project in (self.query, self.key):
            x = project(hidden).view(BATCH, TOKENS, HEADS, SIZE).transpose(1, 2)
            half = torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), -1)
            turned.append(x * wide.cos() + half * wide.sin())
        query, key = turned
        early = query.sum() if self.query_first else torch.zeros((), device=query.device)
        keys = self.write(cache, key, at)
        scores: Tensor = query @ keys.transpose(-1, -2) + early
        return scores


class Counting:
    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if "grape" in str(node.target):
                # What is only turned where it stands is not written into a cache.
                outputs = node.args[3] if "into" in str(node.target) else ()
                own = all(each in node.args[0] or "empty_like" in str(each.target) for each in outputs)
                self.names.append("grape.rotate.default" if own else str(node.target))
        self.names += [str(each.target) for each in module.graph.nodes if "index_copy_" in str(each.target)]
        return module.forward


def run(layer: nn.Module, backend: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the layer returns and leaves in its cache, as it is and compiled."""
    hidden = tensor(BATCH, TOKENS, 32, dtype=torch.float32).to(DEVICE)
    at = torch.tensor([4, 5, 6], device=DEVICE)
    results = []
    with kernels_first():
        for number in range(2):
            cache = tensor(BATCH, HEADS, CAPACITY, SIZE, seed=3, dtype=torch.float32).to(DEVICE)
            if number == 1:
                grape_compile(layer, backend=backend, fullgraph=True)
            results.append([layer(hidden, cache, at), cache])
    return results[0], results[1]


@pytest.mark.parametrize("write", [index_copy, index_put, a_slice], ids=lambda write: write.__name__)
def test_keys_are_turned_into_their_cache(write: Write) -> None:
    counting = Counting()
    with torch.no_grad():
        wanted, found = run(Layer(write).to(DEVICE), counting)
    assert counting.names == ["grape.rotate_into.default"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


STAYS = {
    "a result that is read again": Layer(read_again),
    "rows along another axis": Layer(along_heads),
    "a sum": Layer(accumulated),
    "another dtype": Layer(narrower),
    "queries wanted before": Layer(index_copy, query_first=True),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_the_same_stays(name: str) -> None:
    counting = Counting()
    with torch.no_grad():
        wanted, found = run(STAYS[name].to(DEVICE), counting)
    assert "grape.rotate.default" in counting.names
    assert "grape.rotate_into.default" not in counting.names
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_may_be_differentiated_stays() -> None:
    counting = Counting()
    wanted, found = run(Layer(index_copy).to(DEVICE), counting)
    assert counting.names[:1] == ["grape.rotate.default"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_compiler_keeps_the_write() -> None:
    """Functionalised and back: the cache that was given holds the keys."""
    with torch.no_grad():
        wanted, found = run(Layer(index_copy).to(DEVICE), "aot_eager")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
