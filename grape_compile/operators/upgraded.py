"""`grape::upgraded`: what an upgraded layer carries into whatever graph is made of it.

The result is the hidden states, marked with the encoding that the layer's positions are to have. What is made of it
turns `turned` tensors and attends `attended` times by the encoding the layer's code was written with; a pass gives
these places `encoding` and its slots, and takes the mark out. Slots are those of `rotate` and `attend`, but for gates
the directions [H, D] that queries and keys are multiplied by, and `phases` [B, T] in place of the rates of a rotation
by an `Accumulated` clock; a spectrum for each head is [H_kv, 1, planes]. `frequencies` are those the code turns by.
`grows`: keys come from a cache and end with the new ones; `unbiased`: what the code adds to its logits are
masks, no positions. The mark is never computed: run, it raises UpgradeError, for the layer's own code has the old
encoding.

Where keys come from a cache of fixed size, `tokens`, a whole number, is how many of them there are, the new ones among
them, if what is added asks where among the keys a query stands.

A gate of keys that turn before a cache keeps them is `grape::awaited`, [B, H, T] of the new tokens: it is kept before
the layer has its keys, and the pass puts the gate in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.encoding import Bias, Encoding, PathBias
from grape_compile.errors import UpgradeError

SCHEMA = (
    "(Tensor hidden, Tensor[] slots, str[] names, str encoding, str module, float[] frequencies, int turned, "
    "int attended, bool grows, bool unbiased) -> Tensor"
)


#: The slot of how many tokens a cache of fixed size has, with those of the call.
TOKENS: Final = "tokens"

AWAITED = "(Tensor hidden, Tensor direction) -> Tensor"


def asks_for_places(part: Encoding) -> bool:
    """Whether more of a bias than a number for each row depends on where among the keys its query stands."""
    return isinstance(part, PathBias) or (
        isinstance(part, Bias) and part.gate is not None and part.gate.key is not None
    )


@contextmanager
def looked_at() -> Iterator[None]:
    """Let marked layers run as they were written: a run that is watched, its results thrown away."""
    token = _looked_at.set(True)
    try:
        yield
    finally:
        _looked_at.reset(token)


_looked_at: ContextVar[bool] = ContextVar("looked_at", default=False)


def _unfinished(
    hidden: Tensor,
    slots: Sequence[Tensor],
    names: Sequence[str],
    encoding: str,
    module: str,
    frequencies: Sequence[float],
    turned: int,
    attended: int,
    grows: bool,
    unbiased: bool,
) -> Tensor:
    if _looked_at.get():
        return hidden.clone()
    raise UpgradeError(
        f"run {module or 'a layer'} with {encoding}",
        "the model's own code, which computes the encoding it was written with",
        "grape_compile(model), torch.compile(model, backend='grape'), or rewrite(program) of an exported program",
    )


def _unknown(hidden: Tensor, direction: Tensor) -> Tensor:
    if _looked_at.get():
        return _gate_like(hidden, direction).zero_()
    raise UpgradeError(
        "read a gate of keys",
        "the model's own code, which computes the encoding it was written with",
        "grape_compile(model), torch.compile(model, backend='grape'), or rewrite(program) of an exported program",
    )


def _gate_like(hidden: Tensor, direction: Tensor) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((hidden.shape[0], direction.shape[0], hidden.shape[1]), dtype=dtype)


def _like_hidden(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    none = None, None, None, None, None, None, None, None
    return gradient, [None] * ctx.slots, *none  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.slots = len(inputs[1])


_operator = torch.library.custom_op("grape::upgraded", _unfinished, mutates_args=(), schema=SCHEMA)
_operator.register_fake(_like_hidden)
_operator.register_autograd(_backward, setup_context=_setup_context)
_awaited = torch.library.custom_op("grape::awaited", _unknown, mutates_args=(), schema=AWAITED)
_awaited.register_fake(_gate_like)
_awaited.register_autograd(lambda ctx, gradient: (None, None))
