"""`rotate_into` and `rotate_normed` as operators: what torch asks of them, in eager mode and in a graph."""

from __future__ import annotations

import pytest
import torch
from operator_errors import leaves
from torch import Tensor

from grape_compile.encoding import Half, Learned, Positions, Rotation, rope
from grape_compile.errors import OperandError
from grape_compile.operators import rotate, rotate_into
from grape_compile.operators.sample import tensor

ENCODING = Rotation(Half(16), Learned("theta"), Positions("n"))


def operands() -> tuple[list[Tensor], list[Tensor]]:
    """Queries of four heads and keys of two, and the slots."""
    heads = [tensor(2, count, 5, 16, dtype=torch.float32, seed=count) for count in (4, 2)]
    return heads, [tensor(8, dtype=torch.float32, seed=3), torch.arange(5)]


@pytest.mark.parametrize("place", ["before", "after", "across"])
def test_rotate_normed_is_an_operator(place: str) -> None:
    heads, (theta, positions) = operands()
    sizes = [16 * each.shape[1] if place == "across" else 16 for each in heads]
    weights = leaves(*(tensor(size, dtype=torch.float32, seed=5) for size in sizes))
    arguments = (leaves(*heads), weights, [*leaves(theta), positions], str(ENCODING), place, 1e-6, 1.0)
    torch.library.opcheck(torch.ops.grape.rotate_normed.default, arguments)


def test_rotate_into_is_an_operator() -> None:
    heads, slots = operands()
    outputs = [torch.zeros_like(heads[0]), torch.zeros(2, 2, 9, 16)]
    places = [None, torch.tensor([8, 0, 3, -2, 1])]
    weights = [tensor(16, dtype=torch.float32, seed=5)] * 2
    for norm in (([], "", 0.0, 0.0), (weights, "before", 1e-6, 1.0)):
        operands_of = (heads, slots, str(ENCODING), outputs, places, *norm)
        torch.library.opcheck(torch.ops.grape.rotate_into.default, operands_of)


def test_a_graph_writes_into_a_cache_as_eager_code_does() -> None:
    heads, slots = operands()
    text = str(ENCODING)

    def step(query: Tensor, key: Tensor, cache: Tensor) -> Tensor:
        torch.ops.grape.rotate_into(
            [query, key], slots, text, [query, cache[:, :, 3:8]], [], [], "", 0.0, 0.0
        )
        return query.sum() + cache.sum()

    given = [[*(each.clone() for each in heads), torch.zeros(2, 2, 10, 16)] for _ in range(2)]
    results = step(*given[0]), torch.compile(step, backend="aot_eager", fullgraph=True)(*given[1])
    for one, two in zip([*given[0], results[0]], [*given[1], results[1]], strict=True):
        torch.testing.assert_close(one, two)
    wanted = rotate(heads, ENCODING, dict(zip(ENCODING.slots, slots, strict=True)))
    torch.testing.assert_close(given[0][0], wanted[0])
    torch.testing.assert_close(given[0][2][:, :, 3:8], wanted[1])


def test_outputs_that_do_not_fit() -> None:
    (query, key), _ = operands()
    with pytest.raises(OperandError, match="outputs"):
        rotate_into([torch.zeros_like(key)], [query], rope(16))
    with pytest.raises(OperandError, match="gradient"):
        rotate_into([query], leaves(query), rope(16))
