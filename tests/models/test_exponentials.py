"""Turns by exponentials of matrices: found where one clock is multiplied by one skew matrix, else told in words."""

import copy
from collections.abc import Callable

import pytest
import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, RotaryAttention, assert_trains_alike, example, sharpen
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report
from grape_compile.encoding import NonCommuting

BLOCK = 4


def steps(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-2], device=x.device)


def turned(turn: Tensor, x: Tensor) -> Tensor:
    return (turn @ x.unsqueeze(-1)).squeeze(-1)


class Generated(nn.Module):
    """Turns x [B, H, T, D] by what `turn` makes of (itself, x)."""

    known: Tensor

    def __init__(self, turn: Callable[["Generated", Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.turn = turn
        numbers = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.matrix = nn.Parameter(numbers)
        self.register_buffer("known", numbers - numbers.mT if len(shape) == 3 else numbers, persistent=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.turn(self, x)


def columns(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(steps(x)[:, None, None] * (layer.matrix - layer.matrix.mT))
    return turned(turn, x)


def rows_of_an_upper_triangle(layer: Generated, x: Tensor) -> Tensor:
    upper = layer.matrix.triu(1)
    turn = torch.linalg.matrix_exp(torch.einsum("t,ij->tij", steps(x).to(x.dtype), upper - upper.mT))
    row: Tensor = x.unsqueeze(-2) @ turn
    return row.squeeze(-2)


def of_each_head(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(steps(x)[:, None, None, None] * layer.known[None] / 2)
    return torch.einsum("hlij,bhlj->bhli", turn.transpose(0, 1), x)


def of_blocks(layer: Generated, x: Tensor) -> Tensor:
    generator = layer.matrix - layer.matrix.transpose(-1, -2)
    turn = torch.matrix_exp(steps(x)[None, None, :, None, None, None] * generator[None, :, None])
    return (turn @ x.reshape(*x.shape[:-1], -1, BLOCK, 1)).reshape_as(x)


def of_two_vectors(layer: Generated, x: Tensor) -> Tensor:
    a, b = layer.matrix
    turn = torch.matrix_exp(steps(x)[:, None, None] * (torch.outer(a, b) - torch.outer(b, a)))
    return torch.einsum("bhtd,ted->bhte", x, turn)


WHOLE, VECTORS = (HEAD_DIM, HEAD_DIM), (2, HEAD_DIM)
TURNS: tuple[tuple[Callable[[Generated, Tensor], Tensor], tuple[int, ...], str], ...] = (
    (columns, WHOLE, f"non_commuting({HEAD_DIM}, steps)"),
    (rows_of_an_upper_triangle, WHOLE, f"non_commuting({HEAD_DIM}, steps, orientation=-1)"),
    (of_each_head, (HEADS, *WHOLE), f"non_commuting({HEAD_DIM}, steps)"),
    (of_blocks, (HEADS, HEAD_DIM // BLOCK, BLOCK, BLOCK), f"non_commuting({BLOCK}, steps)"),
    (of_two_vectors, VECTORS, f"non_commuting({HEAD_DIM}, steps)"),
)
turns = pytest.mark.parametrize(("turn", "shape", "text"), TURNS, ids=[row[0].__name__ for row in TURNS])


@turns
def test_it_is_found_and_equals_itself(
    turn: Callable[[Generated, Tensor], Tensor], shape: tuple[int, ...], text: str
) -> None:
    """Outputs and gradients in float64, at a second length too."""
    plain = sharpen(RotaryAttention(Generated(turn, *shape))).double()
    compiled = grape_compile(copy.deepcopy(plain), backend="eager")
    assert_trains_alike(plain, compiled, (12, 19), 1e-8)
    found = report(compiled)
    assert [str(site.encoding) for site in found.sites] == 2 * [text], str(found)
    assert found.refusals == ()
    assert all(isinstance(site.encoding, NonCommuting) and site.evidence == "proved" for site in found.sites)


def of_any_matrix(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(steps(x)[:, None, None] * layer.matrix)
    return turned(turn, x)


def of_a_sum(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(steps(x)[:, None, None] * (layer.matrix + layer.matrix.mT) / 9)
    return turned(turn, x)


def of_squares(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp((steps(x) ** 2)[:, None, None] * (layer.matrix - layer.matrix.mT))
    return turned(turn, x)


def of_two_axes(layer: Generated, x: Tensor) -> Tensor:
    upper = layer.matrix.triu(1)
    places = torch.stack((steps(x) // 4, steps(x) % 4), dim=-1).to(x.dtype)
    turn = torch.matrix_exp((places[..., None, None] * (upper - upper.mT)).sum(-3))
    return turned(turn, x)


def inverted(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(steps(x)[:, None, None] * (layer.matrix - layer.matrix.mT))
    return turned(turn.inverse(), x)


def cayley(layer: Generated, x: Tensor) -> Tensor:
    eye, power = (
        torch.eye(HEAD_DIM, dtype=x.dtype),
        steps(x)[:, None, None] * (layer.matrix - layer.matrix.mT),
    )
    return turned(torch.linalg.solve(eye - power, eye + power), x)


def summed_by_hand(layer: Generated, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(steps(x)[:, None, None] * (layer.matrix - layer.matrix.mT))
    products: Tensor = turn * x.unsqueeze(-2)
    return products.sum(-1)


@pytest.mark.parametrize(
    ("turn", "shape"),
    [
        *((turn, WHOLE) for turn in (of_any_matrix, of_a_sum, of_squares, inverted, cayley, summed_by_hand)),
        (of_two_axes, (2, *WHOLE)),
    ],
)
def test_what_looks_alike_is_told(
    turn: Callable[[Generated, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    found = inspect(sharpen(RotaryAttention(Generated(turn, *shape))), (example(),))
    assert found.sites == (), str(found)
    assert [refusal.rule for refusal in found.refusals] == 2 * ["generator"], str(found)


class OrthogonalWeights(nn.Module):
    """Queries and keys multiplied by an orthogonal matrix that is trained: no position is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(HEAD_DIM, HEAD_DIM))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return x @ torch.matrix_exp(self.matrix - self.matrix.mT)


def test_orthogonal_weights_are_no_position() -> None:
    found = inspect(sharpen(RotaryAttention(OrthogonalWeights())), (example(),))
    assert (found.sites, found.refusals) == ((), ()), str(found)


class Retained(nn.Module):
    """Scores that decay with the distance, and no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        places = torch.arange(x.shape[1])
        decay = (0.9 ** (places[:, None] - places).float()).tril()
        out: Tensor = (query @ key.mT * decay) @ value
        return out


def test_a_decay_of_products_is_told() -> None:
    found = inspect(sharpen(Retained()), (example(),))
    assert found.sites == ()
    assert ["multiplied by numbers that positions choose" in each.reason for each in found.refusals] == [True]
