"""Case `attention`: one layer with each bias, forward and backward, beside FlexAttention and torch's own attention.

Causal queries without a bias through `scaled_dot_product_attention` are the floor; with the bias as a dense matrix they
are what a model without a kernel pays, in time and in memory.
"""

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

from benchmarks.gpu_timing import Timed, timed
from grape_compile.encoding import Encoding, alibi, fox, gated_alibi, grape_ap, nope
from grape_compile.operators import attend, reference_attend

Way = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS, WHOLE, BARE = "ours", "ours, every tile", "ours, no bias"
FLEX, DENSE, FLOOR = "flex_attention", "sdpa, dense bias", "sdpa, no bias"

#: Ours with a bias over ours without one, FlexAttention's time over ours: what is promised from 4096 tokens on.
PROMISED_COST: Final = 1.10
PROMISED_OVER_FLEX: Final = 1.3
PROMISED_FROM: Final = 4096
#: A dense bias of more tokens does not fit beside its gradients.
LONGEST_DENSE: Final = 8192
#: GRAPE-AP over ours without a bias, walked whole and with walks that end, and the dense way over GRAPE-AP.
PROMISED_PATH: Final = 1.6
PROMISED_OVER_DENSE: Final = 10.0
#: The dense way holds several matrices of float32 for a path.
LONGEST_DENSE_PATH: Final = 4096
#: Errors are taken where all logits fit in float64.
LONGEST_EXACT: Final = 2048
#: From here on tiles that do not count pay for the bias: below the floor.
PRUNED_FROM: Final = 16384


@dataclass(frozen=True)
class Row:
    """One layer of bfloat16 heads, [batch, heads, tokens, head_dim] over memory [batch, tokens, heads, head_dim]."""

    bias: str
    tokens: int
    head_dim: int
    batch: int = 1
    heads: int = 32
    key_heads: int = 8

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.bias} {self.batch} x {self.tokens} x {self.head_dim}"

    @property
    def encoding(self) -> Encoding:
        """The encoding of the row's bias."""
        kinds = {
            "none": nope(),
            "alibi": alibi(self.heads),
            "fox": fox(),
            "gated": gated_alibi(self.heads),
            "path": grape_ap(self.heads),
        }
        return kinds[self.bias]

    def small(self) -> Row:
        """Return a layer of the same kind that takes no time."""
        return replace(self, tokens=min(self.tokens, 64), heads=4, key_heads=2)


ROWS: Final = tuple(
    Row(bias, tokens, head_dim, max(1, 16384 // tokens))
    for head_dim in (64, 128)
    for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    for bias in ("none", "alibi", "fox", "gated", "path")
)


def measured(row: Row) -> Iterator[dict[str, Any]]:
    """One result per direction: microseconds, TFLOP/s, peak memory, errors against float64."""
    layer = Layer(row, "cuda")
    errors = layer.errors() if row.tokens <= LONGEST_EXACT else {}
    with torch.no_grad():
        forward = {name: timed(partial(way, *layer.heads)) for name, way in layer.ways().items()}
    yield _result(row, "forward", forward, errors)
    both = {name: timed(partial(layer.step, way)) for name, way in layer.ways().items()}
    yield _result(row, "forward and backward", both, {})


class Layer:
    """Operands of one row, and every way to attend."""

    def __init__(self, row: Row, device: str) -> None:
        self.row = row
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        def heads(count: int) -> Tensor:
            made = normal(row.batch, row.tokens, count, row.head_dim)
            return made.to(torch.bfloat16).transpose(1, 2).requires_grad_()

        self.heads = heads(row.heads), heads(row.key_heads), heads(row.key_heads)
        self.cotangent = self.heads[0].detach().clone()
        shape = (row.batch, row.heads, row.tokens)
        made = {
            "log_forget": lambda: logsigmoid(normal(*shape) + 4.0),
            "gate_query": lambda: softplus(normal(*shape)),
            "gate_key": lambda: softplus(normal(*shape)),
            "path_query": lambda: normal(*shape, 8).to(torch.bfloat16),
            "path_key": lambda: normal(*shape, 8).to(torch.bfloat16),
        }
        self.slots = {name: made[name]().requires_grad_() for name in row.encoding.slots}
        self.slopes = torch.tensor(
            [2.0 ** (-8 * (at + 1) / row.heads) for at in range(row.heads)], device=device
        )

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [*self.heads, *self.slots.values()]

    def ways(self) -> Mapping[str, Way]:
        """Return the ways that can run this row."""
        found: dict[str, Way] = {OURS: self.ours}
        if self.row.bias != "none":
            found |= {WHOLE: self.whole, BARE: self.bare}
        found[FLOOR] = self.floor
        if self.row.bias != "path":
            # Its modification of a score sees one key, not those between it and the query.
            found[FLEX] = _flex(self)
        longest = LONGEST_DENSE_PATH if self.row.bias == "path" else LONGEST_DENSE
        if self.row.bias != "none" and self.row.tokens <= longest:
            found[DENSE] = self.dense
        return found

    def ours(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend by our operator."""
        return attend(query, key, value, self.row.encoding, self.slots, is_causal=True)

    def whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend without leaving out a tile."""
        room = "path" if self.row.bias == "path" else "attention_reach"
        with mock.patch(f"grape_compile.kernels.{room}.SHORTEST", math.inf):
            return self.ours(query, key, value)

    def bare(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend by our operator without the bias."""
        return attend(query, key, value, nope(), is_causal=True)

    def floor(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend without the bias by torch."""
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with the bias as a matrix, as models do."""
        matrix = self.matrix().to(query.dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=matrix, enable_gqa=True)

    def matrix(self) -> Tensor:
        """Return the bias under the causal mask, [1 or B, H, T, T]."""
        count = torch.arange(self.row.tokens, device=self.slopes.device)
        apart = (count - count[:, None]).float()
        if self.row.bias == "path":
            bias = self._along()
        elif self.row.bias == "fox":
            sums = self.slots["log_forget"].cumsum(-1)
            bias = sums[..., :, None] - sums[..., None, :]
        else:
            bias = self.slopes[:, None, None] * apart
            if self.row.bias == "gated":
                bias = bias * (self.slots["gate_query"][..., None] + self.slots["gate_key"][..., None, :])
        return bias.masked_fill(apart > 0, -math.inf).reshape(-1, *bias.shape[-3:])

    def _along(self) -> Tensor:
        """Return the sums of edges as the authors' code writes them, [B, H, T, T]."""
        query, key = self.slots["path_query"], self.slots["path_key"]
        key = key.float() * (key.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        angle = torch.arange(self.row.tokens, device=key.device, dtype=torch.float32)[:, None, None]
        # Every plane of neighbours by one radian a token.
        pairs = torch.view_as_complex(key.unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones_like(angle[..., 0]), angle[..., 0]
        )
        key = torch.view_as_real(pairs).flatten(-2).to(query.dtype)
        edges = logsigmoid((query @ key.mT).float() / query.shape[-1]).tril()
        sums = edges.flip(-1).cumsum(-1).flip(-1) - edges
        return self.slopes[:, None, None] * sums

    def step(self, way: Way) -> tuple[Tensor | None, ...]:
        """Attend and go back, also through the bias where the way has one."""
        output = way(*self.heads)
        leaves = self.leaves if way not in (self.bare, self.floor) else list(self.heads)
        return torch.autograd.grad(output, leaves, self.cotangent)

    def errors(self, ways: Mapping[str, Way] | None = None) -> dict[str, float]:
        """Return the root mean square error of each way with the bias against float64, relative to the output."""
        query, key, value = (each.detach().double() for each in self.heads)
        slots = {name: slot.detach().double() for name, slot in self.slots.items()}
        found = {}
        with torch.no_grad():
            for name, way in (self.ways() if ways is None else ways).items():
                if name in (BARE, FLOOR) and self.row.bias != "none":
                    continue
                output = way(*self.heads)
                worst = []
                for at in range(self.row.batch):
                    one = slice(at, at + 1)
                    wanted = reference_attend(
                        query[one],
                        key[one],
                        value[one],
                        self.row.encoding,
                        {each: slot[one] for each, slot in slots.items()},
                        is_causal=True,
                    )
                    worst.append(float((output[one].double() - wanted).norm() / wanted.norm()))
                found[name] = max(worst)
        return found


def _flex(layer: Layer) -> Way:
    """Return FlexAttention with the bias of a layer as its score modification."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    row, slopes, slots = layer.row, layer.slopes, layer.slots

    def behind(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return t >= j

    mask = create_block_mask(behind, None, None, row.tokens, row.tokens, device=str(slopes.device))

    compiled = torch.compile(flex_attention)

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Not in the compiled function: torch 2.11 finds no way back through sums that are made there.
        sums = slots["log_forget"].cumsum(-1) if row.bias == "fox" else slopes

        def biased(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
            if row.bias == "alibi":
                return score + slopes[h] * (j - t)
            if row.bias == "fox":
                return score + (sums[b, h, t] - sums[b, h, j])
            gate = slots["gate_query"][b, h, t] + slots["gate_key"][b, h, j]
            return score + slopes[h] * gate * (j - t)

        modification = None if row.bias == "none" else biased
        output = compiled(query, key, value, score_mod=modification, block_mask=mask, enable_gqa=True)
        assert isinstance(output, Tensor), "no logsumexp was asked for"
        return output

    return attended


def _result(
    row: Row, direction: str, found: Mapping[str, Timed], errors: Mapping[str, float]
) -> dict[str, Any]:
    times = {name: timing.microseconds for name, timing in found.items()}
    # Two products of T (T + 1) / 2 logits forward, five more backward.
    products = 2 if direction == "forward" else 7
    flops = products * row.batch * row.heads * row.tokens**2 * row.head_dim
    kept = FLEX not in times or times[FLEX] >= PROMISED_OVER_FLEX * times[OURS]
    if row.bias == "path":
        kept &= times[WHOLE] <= PROMISED_PATH * times[BARE]
        kept &= DENSE not in times or times[DENSE] >= PROMISED_OVER_DENSE * times[OURS]
        kept &= row.tokens < PRUNED_FROM or times[OURS] < times[BARE]
    elif row.bias != "none":
        kept &= times[WHOLE] <= PROMISED_COST * times[BARE]
    if row.bias == "alibi" and row.tokens >= PRUNED_FROM:
        kept &= times[OURS] < times[FLOOR]
    if errors:
        kept &= errors[OURS] <= errors[DENSE if row.bias == "path" else FLEX]
    ratios = ", ".join(f"{time / times[OURS]:.2f} x {name}" for name, time in times.items() if name != OURS)
    return {
        "name": f"{row.name}, {direction}",
        "told": f"{times[OURS]:.0f} us, {flops / times[OURS] / 1e6:.0f} TFLOP/s; {ratios}",
        "holds": kept if row.bias != "none" and row.tokens >= PROMISED_FROM else None,
        "shape": [row.batch, row.heads, row.key_heads, row.tokens, row.head_dim],
        "encoding": str(row.encoding),
        "flops": flops,
        "ways": {
            name: timing.row() | ({"error": errors[name]} if name in errors else {})
            for name, timing in found.items()
        },
    }
