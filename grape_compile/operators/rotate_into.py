"""`grape::rotate_into`: rotation into memory that is there, the tensors themselves or a place in a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grape_compile.encoding import Multiplicative
from grape_compile.errors import OperandError
from grape_compile.operators.operands import slot_list
from grape_compile.operators.providers import choose_turn
from grape_compile.operators.rotation import turn_call

SCHEMA = "(Tensor[] tensors, Tensor[] slots, str encoding, Tensor(a!)[] outputs) -> ()"


def rotate_into(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    encoding: Multiplicative,
    slots: Mapping[str, Tensor] | None = None,
) -> None:
    """Write every tensor turned by `encoding` into one of `outputs`, as `rotate` would return it.

    An output may be its own tensor, or a place in a cache: a key is turned on its way there and read no second time.
    Nothing is differentiated. Raises OperandError for outputs of another shape, or tensors that require a gradient.
    """
    given = list(tensors)
    _check(given, list(outputs))
    torch.ops.grape.rotate_into(given, slot_list(encoding, slots or {}), str(encoding), list(outputs))


def _body(
    tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str, outputs: Sequence[Tensor]
) -> None:
    call = turn_call(tensors, slots, encoding)
    if tensors:
        choose_turn(call, outputs).turn_kernel().forward(call, outputs)


def _check(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    found, wanted = ([(tuple(each.shape), each.dtype) for each in group] for group in (outputs, tensors))
    if found != wanted:
        raise OperandError(
            "to rotate into memory", f"outputs {found}", f"outputs {wanted}, one for each tensor"
        )
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, *outputs)):
        raise OperandError(
            "to rotate into memory", "a tensor that requires a gradient", "rotate, or torch.no_grad()"
        )


_operator = torch.library.custom_op("grape::rotate_into", _body, mutates_args=("outputs",), schema=SCHEMA)
_operator.register_fake(lambda tensors, slots, encoding, outputs: None)
