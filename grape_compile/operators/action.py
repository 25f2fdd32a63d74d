"""What `grape::rotate` asks of a kind of encoding: how it acts on a tensor, and the gradients of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import Clock, Multiplicative
from grape_compile.operators.operands import compute_dtype, slot_list

Slots = Mapping[str, Tensor]


class Action(ABC):
    """How one encoding acts. Every function is plain torch, so that it can be traced, mapped and differentiated.

    A new kind of encoding is a subclass in a file of its own and a line in `actions.ACTIONS`.
    """

    encoding: Multiplicative

    @property
    @abstractmethod
    def clock(self) -> Clock:
        """Its clock."""

    @property
    def axis_count(self) -> int:
        """Number of position axes; more than one lead the shape of the clock's slot."""
        return 1

    @abstractmethod
    def check(self, slots: Slots, tensor: Tensor) -> None:
        """Raise OperandError for slots that do not fit a tensor; the functions below take them as they are."""

    @abstractmethod
    def prepare(self, slots: Slots, tensor: Tensor) -> Any:
        """Return what acts on `tensor`: the same for all that agree in compute dtype, device and steps."""

    @abstractmethod
    def act(self, prepared: Any, slots: Slots, tensor: Tensor) -> Tensor:
        """Return G x, computed in the compute dtype and rounded once, to the dtype of the tensor."""

    def pull_back(self, slots: Slots, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return G^T g for every cotangent; where G is orthogonal that is its inverse."""
        back = self.encoding.inverse()
        return list(torch.ops.grape.rotate(list(cotangents), slot_list(back, slots), str(back)))

    def slots_gradient(self, slots: Slots, tensor: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the floating slots that come through one tensor, in the dtype of each slot."""

        def acted(filled: Slots, wide: Tensor) -> Tensor:
            return self.act(self.prepare(filled, wide), filled, wide)

        names = [name for name, slot in slots.items() if slot.is_floating_point()]
        return pulled(acted, names, slots, tensor, cotangent)


def pulled(
    acted: Callable[[Slots, Tensor], Tensor],
    names: Sequence[str],
    slots: Slots,
    tensor: Tensor,
    cotangent: Tensor,
) -> dict[str, Tensor]:
    """Return the gradients of the slots of these names through a function of all slots and the wide tensor."""
    dtype = compute_dtype(tensor)
    wide = tensor.to(dtype)

    def of_named(chosen: dict[str, Tensor]) -> Tensor:
        return acted({**slots, **chosen}, wide)

    with torch.autocast(tensor.device.type, enabled=False):
        pull = torch.func.vjp(of_named, {name: slots[name] for name in names})[1]
        gradients: dict[str, Tensor] = pull(cotangent.to(dtype))[0]
    return gradients
