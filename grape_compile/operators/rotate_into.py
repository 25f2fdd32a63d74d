"""`grape::rotate_into`: rotation into memory that is there, the tensors themselves or a place in a cache."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Multiplicative
from grape_compile.errors import OperandError
from grape_compile.operators.normed import normed_call
from grape_compile.operators.operands import slot_list
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.rotation import turn_call
from grape_compile.operators.traced import decompose_when_compiled

#: `weights` of an RMSNorm beside the rotation, none for none, and where it stands, as in `grape::rotate_normed`.
SCHEMA = (
    "(Tensor[] tensors, Tensor[] slots, str encoding, Tensor(a!)[] outputs, Tensor?[] places, "
    "Tensor[] weights, str norm, float epsilon, float offset) -> ()"
)


def rotate_into(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    encoding: Multiplicative,
    slots: Mapping[str, Tensor] | None = None,
    *,
    places: Sequence[Tensor | None] = (),
) -> None:
    """Write every tensor turned by `encoding` into one of `outputs`, as `rotate` would return it.

    An output may be its own tensor, or a place in a cache: a key is turned on its way there and read no second time.
    `places` gives for an output [..., C, D] the rows [T], int64, that the tokens of its tensor [..., T, D] go to; they
    are read on the device. A negative one counts from the end, and what lies outside is the caller's error.
    Nothing is differentiated. Raises OperandError for outputs of another shape, or tensors that require a gradient.
    """
    given = list(tensors)
    _check(given, list(outputs), list(places))
    torch.ops.grape.rotate_into(
        given, slot_list(encoding, slots or {}), str(encoding), list(outputs), list(places), [], "", 0.0, 0.0
    )


def _body(
    tensors: Sequence[Tensor],
    slots: Sequence[Tensor],
    encoding: str,
    outputs: Sequence[Tensor],
    places: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: str,
    epsilon: float,
    offset: float,
) -> None:
    if not tensors:
        return
    normed = normed_call(tensors, weights, slots, encoding, norm, epsilon, offset) if weights else None
    call = replace(normed or turn_call(tensors, slots, encoding), places=tuple(places))
    choose_turn(call, outputs).turn_kernel().forward(call, outputs)


def _is_in_place(
    tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str, outputs: Sequence[Tensor], *rest: Any
) -> bool:
    """Whether every tensor is its own output: the compiler, which sees the launch, then writes there without a copy."""
    return all(starmap(operator.is_, zip(tensors, outputs, strict=True)))


def _check(tensors: Sequence[Tensor], outputs: Sequence[Tensor], places: Sequence[Tensor | None]) -> None:
    found, wanted = ([(tuple(each.shape), each.dtype) for each in group] for group in (outputs, tensors))
    for at, place in enumerate(places if len(places) == len(found) == len(wanted) else ()):
        if place is not None and tuple(place.shape) == wanted[at][0][-2:-1] and len(found[at][0]) > 1:
            # Any number of rows, in which those of the tokens are named.
            wanted[at] = (*wanted[at][0][:-2], found[at][0][-2], wanted[at][0][-1]), wanted[at][1]
    if places and (len(places) != len(tensors) or any(_is_no_place(place) for place in places)):
        raise OperandError(
            "rows to rotate into",
            f"places {[place if place is None else (tuple(place.shape), place.dtype) for place in places]}",
            "None, or an int64 tensor of one row for each token, for each tensor",
        )
    if found != wanted:
        raise OperandError(
            "to rotate into memory", f"outputs {found}", f"outputs {wanted}, one for each tensor"
        )
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, *outputs)):
        raise OperandError(
            "to rotate into memory", "a tensor that requires a gradient", "rotate, or torch.no_grad()"
        )


def _is_no_place(place: Tensor | None) -> bool:
    return place is not None and (place.dim() != 1 or place.dtype != torch.int64)


_operator = torch.library.custom_op("grape::rotate_into", _body, mutates_args=("outputs",), schema=SCHEMA)
_operator.register_fake(lambda *operands: None)
decompose_when_compiled(_operator, _body, _is_in_place)
