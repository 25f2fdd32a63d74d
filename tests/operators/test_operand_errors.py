"""Operands that do not fit: OperandError, which says what was asked, found, and what would work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grape_compile.encoding import (
    Axes,
    Bias,
    Compose,
    DynamicNtk,
    Euclidean,
    Geometric,
    Half,
    Learned,
    Positions,
    Rotation,
    Scaled,
    Steps,
    alibi,
    fox,
    gated_alibi,
    grape_ap,
    nope,
    rope,
)
from grape_compile.errors import EncodingError, OperandError
from grape_compile.operators import attend, providers, rotate

HEADS = torch.zeros(2, 4, 9, 8)
COMPLEX = HEADS.to(torch.complex64)
TIMED = Rotation(Half(8), Learned("theta"), Positions("n"))
SLOPED = Bias(Learned("slopes"), Positions("n"))
N = torch.arange(9)
EDGES: dict[str, Any] = {"path_query": HEADS, "path_key": HEADS}


def turn(tensor: Tensor, encoding: Any = None, **slots: Tensor) -> Any:
    return rotate([tensor], rope(8) if encoding is None else encoding, slots)


def see(
    query: Tensor = HEADS, key: Tensor = HEADS, value: Tensor = HEADS, encoding: Any = None, **options: Any
) -> Tensor:
    beside = {"mask", "sinks", "segments"}
    tensors = [name for name, value in options.items() if isinstance(value, Tensor) and name not in beside]
    slots = {name: options.pop(name) for name in tensors}
    options.setdefault("is_causal", True)
    return attend(query, key, value, alibi(4) if encoding is None else encoding, slots, **options)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "integer": (lambda: turn(HEADS.long()), "torch.int64"),
    "complex": (lambda: turn(COMPLEX), "torch.complex64"),
    "float8": (lambda: turn(HEADS.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "head_dim": (lambda: turn(HEADS[..., :6]), "(2, 4, 9, 6)"),
    "odd_head": (lambda: turn(HEADS[..., :7]), "(2, 4, 9, 7)"),
    "number": (lambda: turn(torch.zeros(())), "shape ()"),
    "no_sequence": (lambda: turn(torch.zeros(8)), "(8,)"),
    "missing_slot": (lambda: turn(HEADS, TIMED, n=N), "no tensor named theta"),
    "theta_shape": (lambda: turn(HEADS, TIMED, theta=torch.ones(3), n=N), "(3,)"),
    "theta_dtype": (lambda: turn(HEADS, TIMED, theta=torch.ones(4, dtype=torch.cfloat), n=N), "complex64"),
    "positions_shape": (lambda: turn(HEADS, TIMED, theta=torch.ones(4), n=torch.arange(8)), "(8,)"),
    "positions_bool": (lambda: turn(HEADS, TIMED, theta=torch.ones(4), n=N > 1), "torch.bool"),
    "positions_larger": (
        lambda: turn(HEADS, TIMED, theta=torch.ones(4), n=torch.ones(3, 2, 4, 9)),
        "(3, 2, 4, 9)",
    ),
    "axes": (
        lambda: turn(
            HEADS,
            Rotation(Axes(Half(8), (0, 1, 0, 1)), Learned("theta"), Positions("n")),
            theta=torch.ones(4),
            n=N,
        ),
        "(9,)",
    ),
    "basis": (
        lambda: turn(
            HEADS, Rotation(Half(8), Learned("t"), Steps(), basis="E"), t=torch.ones(4), E=torch.ones(8, 1)
        ),
        "(8, 1)",
    ),
    "bias_to_rotate": (lambda: turn(HEADS, alibi(4)), "bias(alibi_slopes(4), steps)"),
    "other_device": (lambda: turn(HEADS, TIMED, theta=torch.ones(4, device="meta"), n=N), "meta"),
    "query_integer": (lambda: see(HEADS.long(), HEADS.long(), HEADS.long()), "torch.int64"),
    "query_complex": (lambda: see(COMPLEX, COMPLEX, COMPLEX), "torch.complex64"),
    "three_axes": (lambda: see(HEADS[0]), "(4, 9, 8)"),
    "mixed": (lambda: see(HEADS.double()), "torch.float64"),
    "head_sizes": (lambda: see(HEADS[..., :4]), "(2, 4, 9, 4)"),
    "key_count": (lambda: see(value=HEADS[:, :, :3]), "(2, 4, 3, 8)"),
    "groups": (lambda: see(key=HEADS[:, :3], value=HEADS[:, :3]), "(2, 3, 9, 8)"),
    "slope_count": (lambda: see(encoding=alibi(8)), "4 query heads"),
    "slopes_shape": (lambda: see(encoding=SLOPED, slopes=torch.ones(3), n=N), "(3,)"),
    "slopes_integer": (lambda: see(encoding=SLOPED, slopes=torch.ones(4).long(), n=N), "torch.int64"),
    "clock_shape": (lambda: see(encoding=SLOPED, slopes=torch.ones(4), n=N[:5]), "(5,)"),
    "clock_of_queries": (
        lambda: see(
            key=HEADS[:, :, :5], value=HEADS[:, :, :5], encoding=SLOPED, slopes=torch.ones(4), n=N[:5]
        ),
        "9 queries over 5 keys",
    ),
    "mask_shape": (lambda: see(mask=torch.zeros(9, 8)), "(9, 8)"),
    "mask_integer": (lambda: see(mask=torch.zeros(9, 9).long()), "torch.int64"),
    "mask_larger": (lambda: see(mask=torch.zeros(1, 2, 4, 9, 9)), "(1, 2, 4, 9, 9)"),
    "window": (lambda: see(window=0), "window = 0"),
    "cap": (lambda: see(cap=0.0), "cap = 0.0"),
    "sinks_shape": (lambda: see(sinks=torch.zeros(3)), "(3,)"),
    "sinks_integer": (lambda: see(sinks=N[:4]), "torch.int64"),
    "segments_shape": (lambda: see(segments=N[:5]), "(5,)"),
    "segments_real": (lambda: see(segments=N.float()), "torch.float32"),
    "segments_of_queries": (
        lambda: see(key=HEADS[:, :, :5], value=HEADS[:, :, :5], segments=N[:5]),
        "9 queries over 5 keys",
    ),
    "path_not_causal": (lambda: see(encoding=grape_ap(4), is_causal=False, **EDGES), "is_causal=False"),
    "path_shape": (
        lambda: see(encoding=grape_ap(4), path_query=HEADS, path_key=HEADS[:, :, :5]),
        "(2, 4, 5, 8)",
    ),
    "path_dim": (lambda: see(encoding=grape_ap(4, 4), **EDGES), "(2, 4, 9, 8)"),
    "path_missing": (lambda: see(encoding=grape_ap(4), path_query=HEADS), "no tensor named path_key"),
    "path_of_queries": (
        lambda: see(key=HEADS[:, :, :5], value=HEADS[:, :, :5], encoding=grape_ap(4), **EDGES),
        "9 queries over 5 keys",
    ),
    "gate_shape": (lambda: see(encoding=gated_alibi(4, key=None), gate_query=N[:5]), "(5,)"),
    "gate_integer": (lambda: see(encoding=gated_alibi(4, key=None), gate_query=N), "torch.int64"),
    "gate_missing": (lambda: see(encoding=gated_alibi(4), gate_query=N.float()), "no tensor named gate_key"),
    "forget_shape": (lambda: see(encoding=fox(), log_forget=torch.ones(2, 3, 9)), "(2, 3, 9)"),
    "forget_of_other_length": (lambda: see(encoding=fox(), log_forget=torch.ones(1)), "(1,)"),
    "rotation_of_more_queries": (
        lambda: see(key=HEADS[:, :, :5], value=HEADS[:, :, :5], encoding=Compose((rope(8), nope()))),
        "9 queries over 5 keys",
    ),
    "op_slots": (lambda: torch.ops.grape.rotate([HEADS], [N], str(TIMED)), "1 tensors"),
    "op_integer": (
        lambda: torch.ops.grape.attend(HEADS.long(), HEADS.long(), HEADS.long(), [], str(alibi(4))),
        "torch.int64",
    ),
    "op_rotation": (lambda: torch.ops.grape.attend(HEADS, HEADS, HEADS, [], str(rope(4))), "(2, 4, 9, 8)"),
    "op_bias": (lambda: torch.ops.grape.rotate([HEADS], [], str(alibi(4))), "bias("),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands(case: str) -> None:
    call, found = WRONG[case]
    with pytest.raises(OperandError) as caught:
        call()
    assert found in caught.value.found
    assert caught.value.asked
    assert caught.value.works


def test_euclidean_of_many_axes_takes_their_positions() -> None:
    """The leading axis counts coordinates, whatever their number."""
    encoding = Bias(Learned("slopes"), Positions("n"), distance=Euclidean())
    assert see(encoding=encoding, slopes=torch.ones(4), n=torch.zeros(5, 1, 9)).shape == HEADS.shape


def test_no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = providers.Provider("elsewhere", "nowhere", 1, ("cuda",))
    monkeypatch.setattr(providers, "PROVIDERS", (elsewhere,))
    with pytest.raises(OperandError, match="elsewhere: runs on cuda"):
        see()


def test_a_refused_call_goes_to_the_next_provider() -> None:
    """The fused kernel has no gradient of a mask, the plain one has."""
    mask = torch.zeros(9, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(see(HEADS + 1, mask=mask).sum(), mask)
    assert gradient.shape == mask.shape


def test_a_rotation_by_length_wants_its_length() -> None:
    dynamic = Rotation(Half(8), Scaled(DynamicNtk(2.0, 4), Geometric(1e4)), Steps())
    with pytest.raises(EncodingError, match=r"at\(length\)"):
        turn(HEADS, dynamic)
    heads = torch.randn(2, 9, 8)
    assert not torch.equal(turn(heads, dynamic.at(9))[0], turn(heads, dynamic.at(4))[0])
    assert torch.equal(turn(heads, dynamic.at(4))[0], turn(heads, rope(8))[0])
