"""Case `decoding`: one query over a full cache with each bias, beside the time that reading the cache takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention, softplus

from benchmarks.gpu_timing import Timed, copy_rate, timed
from grape_compile.encoding import AlibiSlopes, Encoding, LogSigmoid, PathBias, alibi, fox, gated_alibi, nope
from grape_compile.operators import attend, providers, reference_attend, reference_bias

Way = Callable[[], Tensor]

OURS, PREFILL, FLOOR, DENSE = "ours", "ours, kernel for many queries", "sdpa, no bias", "sdpa, dense bias"

#: Ours over the time in which the copy rate reads the cache, promised from 32768 keys on.
PROMISED_OVER_FLOOR: Final = 1.15
PROMISED_FROM: Final = 32768
#: Errors are taken where all keys fit in float64 beside themselves.
LONGEST_EXACT: Final = 4096
#: Coordinates of a path.
EDGE: Final = 8


@dataclass(frozen=True)
class Row:
    """One layer of bfloat16 heads: a query in each of `batch` sequences over caches of `keys` keys."""

    bias: str
    batch: int
    keys: int
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.bias} {self.batch} x {self.keys}"

    @property
    def encoding(self) -> Encoding:
        """The encoding of the row's bias."""
        kinds: dict[str, Encoding] = {
            **{"none": nope(), "alibi": alibi(self.heads), "fox": fox(), "gated": gated_alibi(self.heads)},
            # The keys of a path lie in the cache as they are read: of size one, and turned.
            "path": PathBias(LogSigmoid(), AlibiSlopes(self.heads), EDGE),
        }
        return kinds[self.bias]

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values, and of the keys of a path, which have to be read."""
        numbers = 2 * self.key_heads * self.head_dim + (self.heads * EDGE if self.bias == "path" else 0)
        return 2 * self.batch * self.keys * numbers

    def small(self) -> Row:
        """Return a layer of the same kind that takes no time."""
        return replace(self, keys=min(self.keys, 96), heads=4, key_heads=2)


ROWS: Final = tuple(
    Row(bias, batch, keys)
    for batch in (1, 8)
    for keys in (1024, 4096, 16384, 32768, 131072)
    for bias in ("none", "alibi", "fox", "gated", "path")
)


def measured(row: Row) -> Iterator[dict[str, Any]]:
    """The result of a row: microseconds, GB/s, share of the copy rate, errors against float64."""
    layer = Layer(row, "cuda")
    errors = layer.errors() if row.keys <= LONGEST_EXACT else {}
    with torch.no_grad():
        found = {name: timed(partial(way)) for name, way in layer.ways().items()}
    # What is read alone: a copy of so many bytes writes as many, at the same rate.
    yield result(row, found, copy_rate(2 * row.bytes), errors)


class Layer:
    """Operands of one row, and every way to attend."""

    def __init__(self, row: Row, device: str) -> None:
        self.row = row
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        sizes = ((row.heads, 1), (row.key_heads, row.keys), (row.key_heads, row.keys))
        self.query, self.key, self.value = (
            normal(row.batch, heads, tokens, row.head_dim).to(torch.bfloat16) for heads, tokens in sizes
        )
        made = {
            "log_forget": lambda: logsigmoid(normal(row.batch, row.heads, row.keys) + 4.0),
            "gate_query": lambda: softplus(normal(row.batch, row.heads, 1)),
            "gate_key": lambda: softplus(normal(row.batch, row.heads, row.keys)),
            "path_query": lambda: normal(row.batch, row.heads, 1, EDGE).to(torch.bfloat16),
            "path_key": lambda: normal(row.batch, row.heads, row.keys, EDGE).to(torch.bfloat16),
        }
        self.slots = {name: made[name]() for name in row.encoding.slots}
        self.dense = self._dense()

    def _dense(self) -> Tensor:
        """Return the bias as a matrix [1 or B, H, 1, T_k], made before the clock runs."""
        row, device = self.row, self.query.device
        apart = torch.arange(1 - row.keys, 1, device=device)
        slopes = torch.tensor([2.0 ** (-8 * (at + 1) / row.heads) for at in range(row.heads)], device=device)
        if row.bias == "path":
            bias = reference_bias(row.encoding, self.slots, 1, self.key)
        elif row.bias == "fox":
            sums = self.slots["log_forget"].double().cumsum(-1)
            bias = (sums[..., -1:] - sums).float()
        else:
            bias = slopes[:, None] * apart
            if row.bias == "gated":
                bias = bias * (self.slots["gate_query"] + self.slots["gate_key"])
        return bias.reshape(-1, row.heads, 1, row.keys).to(self.query.dtype)

    def ways(self) -> Mapping[str, Way]:
        """Return every way; those with a bias only where there is one."""
        found: dict[str, Way] = {OURS: self.ours, PREFILL: self.prefill, FLOOR: self.floor}
        return found if self.row.bias == "none" else {**found, DENSE: self.with_matrix}

    def ours(self) -> Tensor:
        """Attend by our operator."""
        return attend(self.query, self.key, self.value, self.row.encoding, self.slots, is_causal=True)

    def prefill(self) -> Tensor:
        """Attend by our kernel for many queries."""
        rows = tuple(row for row in providers.PROVIDERS if row.name != "triton decoding")
        with mock.patch.object(providers, "PROVIDERS", rows):
            return self.ours()

    def floor(self) -> Tensor:
        """Attend without the bias by torch."""
        return scaled_dot_product_attention(self.query, self.key, self.value, enable_gqa=True)

    def with_matrix(self) -> Tensor:
        """Attend by torch with the bias as a matrix that is there already."""
        return scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=self.dense, enable_gqa=True
        )

    def errors(self, ways: Mapping[str, Way] | None = None) -> dict[str, float]:
        """Return the root mean square error of each way with the bias against float64, relative to the output."""
        wide = {name: slot.double() for name, slot in self.slots.items()}
        heads = (self.query.double(), self.key.double(), self.value.double())
        with torch.no_grad():
            wanted = reference_attend(*heads, self.row.encoding, wide, is_causal=True)
            return {
                name: float((way().double() - wanted).norm() / wanted.norm())
                for name, way in (self.ways() if ways is None else ways).items()
                if name != FLOOR or self.row.bias == "none"
            }


def result(
    row: Row, found: Mapping[str, Timed], copied: float, errors: Mapping[str, float]
) -> dict[str, Any]:
    """Return what is kept of a row; `copied` is the copy rate in GB/s."""
    ours = found[OURS].microseconds
    over_floor = ours * copied * 1e3 / row.bytes
    if not math.isfinite(over_floor):
        raise ValueError(f"{ours} us and {copied} GB/s make no ratio")
    others = ", ".join(
        f"{each.microseconds / ours:.2f} x {name}" for name, each in found.items() if name != OURS
    )
    rate = row.bytes / ours / 1e3
    return {
        "name": row.name,
        "told": f"{ours:.1f} us, {rate:.0f} GB/s, {over_floor:.2f} x the time of reading the cache; {others}",
        "holds": over_floor <= PROMISED_OVER_FLOOR if row.keys >= PROMISED_FROM else None,
        "shape": [row.batch, row.heads, row.key_heads, row.keys, row.head_dim],
        "encoding": str(row.encoding),
        "bytes": row.bytes,
        "flops": 4 * row.batch * row.heads * row.keys * row.head_dim,
        "copy_gb_s": round(copied, 1),
        "over_floor": round(over_floor, 4),
        "ways": {
            name: each.row() | ({"error": errors[name]} if name in errors else {})
            for name, each in found.items()
        },
    }
