"""What every trainable encoding is: the structure, and the module that fills its slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grape_compile.encoding import Compose, Encoding
from grape_compile.errors import OperandError

Slots = dict[str, Tensor]


class TrainableEncoding(nn.Module, ABC):
    """An `encoding` and the parameters that its slots are made of.

    Called with the hidden states [B, T, C] of an attention layer (and with its queries [B, H, T, D] and keys
    [B, H_kv, T, D] where `reads_heads`), it gives the tensors for `rotate`, `attend` or `StreamingCache` under the
    names of `encoding.slots`; positions are left to the caller.
    """

    encoding: Encoding
    #: Whether the slots depend on the hidden states.
    reads_hidden: bool = False
    #: Whether the slots depend on queries and keys.
    reads_heads: bool = False

    @abstractmethod
    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        """Return the tensor of each slot, in float32 at least."""

    def carried(self, hidden: Tensor) -> Slots:
        """Return the same for a layer whose queries and keys are not at hand: of gates the directions [heads, D]."""
        return self(hidden)  # type: ignore[no-any-return] # what `forward` returns

    def extra_repr(self) -> str:
        return str(self.encoding)


class Fixed(TrainableEncoding):
    """An encoding without parameters, beside those that train; the slots it has are left to the caller.

    >>> from grape_compile.encoding import alibi
    >>> Fixed(alibi(8))(torch.zeros(1, 4, 16))
    {}
    """

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        return {}


class Sum(TrainableEncoding):
    """Several encodings of one layer at once (GRAPE App. E), each under its own name: rotations turn, biases add up.

    Raises OperandError where two of them would fill one slot.
    """

    def __init__(self, parts: Mapping[str, TrainableEncoding]) -> None:
        super().__init__()
        owners: dict[str, str] = {}
        for name, part in parts.items():
            self.add_module(name, part)
            for slot in part.encoding.slots:
                if owners.setdefault(slot, name) != name:
                    raise OperandError(
                        f"the encodings {' and '.join(parts)} of one layer",
                        f"{owners[slot]} and {name} both fill {slot!r}",
                        "encodings of different kinds",
                    )
        self.encoding = Compose(tuple(part.encoding for part in parts.values())).canonical()
        self.reads_hidden = any(part.reads_hidden for part in parts.values())
        self.reads_heads = any(part.reads_heads for part in parts.values())

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        slots: Slots = {}
        for part in self.children():
            slots |= part(hidden, query, key)
        return slots

    def carried(self, hidden: Tensor) -> Slots:
        slots: Slots = {}
        for part in self.children():
            assert isinstance(part, TrainableEncoding)
            slots |= part.carried(hidden)
        return slots


class WideBuffers(nn.Module):
    """A module whose own buffers stay in float32 at least when a model is cast to fewer bits.

    The frequencies of a rotation are such numbers: eight bits of them would turn a key at position 1000 by whole
    radians too much.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch writes no types there
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() and torch.finfo(buffer.dtype).bits < 32:
                setattr(self, name, before[name].to(buffer.device))
        return self


class Projection(nn.Linear):
    """W x + b with the bias added in float32 (float64 for float64), also under autocast: what is summed over tokens.

    Computed in the dtype of the weights, whatever x has.
    """

    def forward(self, input: Tensor) -> Tensor:
        product = wide(F.linear(input.to(self.weight.dtype), self.weight))
        return product + self.bias.to(product.dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
