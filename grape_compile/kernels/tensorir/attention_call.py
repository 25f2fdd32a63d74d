"""One attention of known shapes and biases: what its body in TensorIR is written from."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Literal

from grape_compile.encoding import (
    AlibiSlopes,
    Bias,
    Compose,
    Constant,
    Encoding,
    Euclidean,
    Multiplicative,
    Nope,
    PathBias,
    Slopes,
)
from grape_compile.errors import OperandError
from grape_compile.kernels.tensorir.operands import Operand, Size, Slots, check_floating, check_over
from grape_compile.kernels.tensorir.rotation import supports as supports_rotation


def parts(encoding: Encoding) -> tuple[Encoding, ...]:
    """Return the rotations and biases of an encoding in their order."""
    if isinstance(encoding, Compose):
        return tuple(leaf for part in encoding.parts for leaf in parts(part))
    return () if isinstance(encoding, Nope) else (encoding,)


def supports(encoding: Encoding) -> Literal[True] | str:
    """Biases alone: rotations of queries and keys come before, by functions of their own."""
    for part in parts(encoding):
        if isinstance(part, Multiplicative):
            return "a rotation turns queries and keys before attention sees them"
        if isinstance(part, PathBias) and part.turn is not None:
            turn = supports_rotation(part.turn)
            if turn is not True:
                return turn
    return True


@dataclass(frozen=True)
class Attention:
    """Queries [B, H, T_q, D], keys [B, H_kv, T_k, D], values [B, H_kv, T_k, D_v] and what is added to their logits.

    Query t stands at key number t + T_k - T_q. `mask` broadcasts to [B, H, T_q, T_k]: bool (True: may be seen) or
    numbers to add. `sinks` [1 or B, 1 or H] are logits in the denominators. `slots` are the tensors of the biases,
    shaped as for `grape::attend`. The arguments of the function are the heads, then mask, sinks and slots where there
    are any, in this order, then the output.
    """

    encoding: Encoding
    query: Operand
    key: Operand
    value: Operand
    _: KW_ONLY
    slots: Slots = field(default_factory=dict)
    mask: Operand | None = None
    sinks: Operand | None = None
    is_causal: bool = False
    scale: float | None = None
    window: int | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        refusal = supports(self.encoding)
        if refusal is not True:
            raise OperandError(f"{self.encoding} in TensorIR", refusal, "biases alone")
        for name, operand in (("query", self.query), ("key", self.key), ("value", self.value)):
            check_floating(name, operand)
            sizes = operand.shape[1::2]
            if len(operand.shape) != 4 or not all(isinstance(size, int) for size in sizes):
                raise OperandError(
                    f"{name} of four axes",
                    f"shape {operand.shape}",
                    "[batch, heads, tokens, head_dim], heads and head_dim known",
                )
        batch, _, keys, width = self.key.shape
        heads = self.heads
        if (
            self.query.shape[0] != batch
            or self.query.shape[3] != width
            or self.value.shape[:3] != self.key.shape[:3]
            or heads % self.kv_heads
        ):
            raise OperandError(
                "attention",
                f"query {self.query.shape}, key {self.key.shape}, value {self.value.shape}",
                "query [B, H, T_q, D], key [B, H_kv, T_k, D], value [B, H_kv, T_k, D_v], H a multiple of H_kv",
            )
        logits = (batch, heads, self.query.shape[2], keys)
        if self.mask is not None:
            check_over("mask", self.mask, logits)
        if self.sinks is not None:
            check_over("sinks", self.sinks, logits[:2])
        for bias in self.additive:
            self._check_bias(bias, logits)
        for path in self.paths:
            self._check_path(path, logits)

    @property
    def heads(self) -> int:
        size = self.query.shape[1]
        assert isinstance(size, int), "checked"
        return size

    @property
    def kv_heads(self) -> int:
        size = self.key.shape[1]
        assert isinstance(size, int), "checked"
        return size

    @property
    def width(self) -> int:
        """Coordinates of queries and keys."""
        size = self.key.shape[3]
        assert isinstance(size, int), "checked"
        return size

    @property
    def value_width(self) -> int:
        size = self.value.shape[3]
        assert isinstance(size, int), "checked"
        return size

    @property
    def output(self) -> Operand:
        return Operand((*self.query.shape[:3], self.value_width), self.query.dtype)

    @property
    def factor(self) -> float:
        return 1.0 / math.sqrt(self.width) if self.scale is None else self.scale

    @cached_property
    def additive(self) -> tuple[Bias, ...]:
        return tuple(part for part in parts(self.encoding) if isinstance(part, Bias))

    @cached_property
    def paths(self) -> tuple[PathBias, ...]:
        return tuple(part for part in parts(self.encoding) if isinstance(part, PathBias))

    @property
    def arguments(self) -> tuple[tuple[str, Operand], ...]:
        """Names and operands of the function, in order, without the output."""
        heads = [("query", self.query), ("key", self.key), ("value", self.value)]
        more = [(name, each) for name, each in (("mask", self.mask), ("sinks", self.sinks)) if each]
        return (*heads, *more, *((slot, self.slots[slot]) for slot in self.encoding.slots))

    def axes(self, bias: Bias) -> int:
        """Number of position axes of the clock of a bias; their axis comes first where there are several."""
        if not isinstance(bias.distance, Euclidean) or not bias.clock.slots:
            return 1
        shape = self.slots[bias.clock.slots[0]].shape
        size = shape[0] if len(shape) >= 3 else 1
        assert isinstance(size, int), "the number of axes is part of the encoding"
        return size

    def has_axes(self, bias: Bias) -> bool:
        """Whether the first axis of the clock numbers position axes."""
        return (
            isinstance(bias.distance, Euclidean)
            and bool(bias.clock.slots)
            and len(self.slots[bias.clock.slots[0]].shape) >= 3
        )

    def _check_bias(self, bias: Bias, logits: tuple[Size, ...]) -> None:
        batch, heads, queries, keys = logits
        self._check_slopes(bias.slopes, logits)
        for slot in bias.clock.slots:
            shape = self._slot(slot).shape
            own = shape[1:] if self.has_axes(bias) else shape
            over = (batch, keys) if len(own) < 3 else (batch, heads, keys)
            check_over(slot, Operand(own), over)
        if bias.gate is not None:
            for name, length in ((bias.gate.query, queries), (bias.gate.key, keys)):
                if name is not None:
                    check_over(name, self._slot(name), (batch, heads, length))

    def _check_path(self, path: PathBias, logits: tuple[Size, ...]) -> None:
        batch, heads, queries, keys = logits
        if not (self.is_causal or self.mask is not None or queries == 1):
            raise OperandError(
                f"{path} between all queries and keys",
                "neither is_causal nor a mask",
                "is_causal=True: a path leads from a query to the keys before it",
            )
        self._check_slopes(path.slopes, logits)
        for slot, length in ((path.query, queries), (path.key, keys)):
            shape = self._slot(slot).shape
            if len(shape) < 2 or shape[-2:] != (length, path.dim):
                raise OperandError(f"{slot} of {path}", f"shape {shape}", f"last axes {(length, path.dim)}")
            check_over(slot, Operand(shape), (batch, heads, length, path.dim))

    def _check_slopes(self, slopes: Slopes, logits: tuple[Size, ...]) -> None:
        for slot in slopes.slots:
            check_over(slot, self._slot(slot), logits[:2])
        if isinstance(slopes, AlibiSlopes | Constant) and len(slopes.values()) != self.heads:
            raise OperandError(
                f"the slopes {slopes}", f"{self.heads} query heads", "one slope for each query head"
            )

    def _slot(self, name: str) -> Operand:
        if name not in self.slots:
            raise OperandError(
                f"the tensors of {self.encoding}", f"none named {name}", ", ".join(self.encoding.slots)
            )
        return self.slots[name]
