"""Products with weights: every lane of every sum ends in its own place."""

import pytest

pytest.importorskip("tvm")

import torch
from tensorir_cases import call, compiled, host, operand

from grape_compile.kernels.tensorir.engine import vector_lanes
from grape_compile.kernels.tensorir.linear import linear, linear_space


@pytest.mark.parametrize(
    ("inner", "outer", "dtype", "tile"),
    [
        (70, 19, torch.float32, None),
        (5, 3, torch.float32, None),
        (64, 16, torch.float16, None),
        (70, 19, torch.float32, (3, 3)),
    ],
)
def test_a_layer_is_its_product(
    inner: int, outer: int, dtype: torch.dtype, tile: tuple[int, int] | None
) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((7, inner), (outer, inner), (outer,)))
    point = None if tile is None else {"lanes": vector_lanes(host()), "rows": tile[0], "columns": tile[1]}
    function = compiled(
        linear(operand(x, {0: "rows"}), operand(weight), operand(bias), host(), point), "linear"
    )
    for rows in (1, 2, 7):
        found = call(function, [x[:rows], weight, bias], torch.full((rows, outer), 7.0, dtype=dtype))
        wide = [each.double() for each in (x[:rows], weight, bias)]
        wanted = torch.nn.functional.linear(*wide)
        # A product passes at most inner / 4 additions in its lane, 6 across lanes and that of the bias; each rounds.
        size = torch.nn.functional.linear(*(each.abs() for each in wide))
        rounding = torch.finfo(torch.float32).eps / 2 * (inner / 4 + 8)
        bound = rounding * size + torch.finfo(dtype).eps / 2 * wanted.abs()
        assert ((found.double() - wanted).abs() <= bound).all()


def test_the_hand_schedule_is_one_of_the_space() -> None:
    space = linear_space(operand(torch.zeros(4, 64)), operand(torch.zeros(16, 64)), None, host())
    assert space.fits(space.hand)
