"""Case `rotation`: queries and keys of one layer turned, forward and backward, as a share of the measured copy rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu_timing import Timed, copy_rate, timed
from grape_compile.encoding import Half, Interleaved, Partial, Planes, Positions, Rotation, Table
from grape_compile.operators import reference_rotate, rotate, rotate_normed

#: A way to turn queries and keys.
Way = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

OURS, COMPILED, EAGER, LIGER = "ours", "torch.compile", "eager", "liger"

#: Shares of the copy rate, and of Liger's, that are promised for long sequences.
PROMISED_SHARE: Final = 0.90
PROMISED_OVER_LIGER: Final = 1.1


@dataclass(frozen=True)
class Row:
    """One layer: [batch, heads, tokens, head_dim] of memory [batch, tokens, heads, head_dim]."""

    name: str
    batch: int
    tokens: int
    heads: int
    key_heads: int
    planes: Planes
    normed: bool = False
    learned: bool = False
    promised: bool = False

    def small(self) -> Row:
        """Return a layer of the same kind that is turned in no time, and promises nothing."""
        return replace(self, batch=1, tokens=min(self.tokens, 64), heads=4, key_heads=2, promised=False)

    @property
    def bytes(self) -> int:
        """Bytes that have to be read and written, in 16 bits."""
        return 2 * 2 * self.batch * self.tokens * (self.heads + self.key_heads) * self.planes.head_dim


ROWS: Final = (
    Row("llama 4 x 4096", 4, 4096, 32, 8, Half(128), promised=True),
    Row("llama 16 x 1024", 16, 1024, 32, 8, Half(128), promised=True),
    Row("llama 1 x 65536", 1, 65536, 32, 8, Half(128), promised=True),
    Row("heads of 64", 4, 4096, 32, 32, Half(64), promised=True),
    Row("neighbours", 4, 4096, 32, 8, Interleaved(128)),
    Row("a quarter turned", 4, 4096, 32, 32, Partial(Half(32), 0, 128)),
    Row("learned frequencies", 4, 4096, 32, 8, Half(128), learned=True),
    Row("qwen3: normed before", 4, 4096, 32, 8, Half(128), normed=True),
    Row("decoding 64 x 1", 64, 1, 32, 8, Half(128)),
)


def measured(row: Row) -> Iterator[dict[str, Any]]:
    """One result per direction: microseconds, GB/s, share of the copy rate, errors against float64."""
    layer = Layer(row, "cuda")
    copied = copy_rate(row.bytes)
    errors = layer.errors()
    with torch.no_grad():
        forward = {name: timed(partial(way, *layer.heads)) for name, way in layer.ways().items()}
    yield _result(row, "forward", forward, row.bytes, copied, errors)
    both = {name: timed(partial(layer.step, way)) for name, way in layer.ways().items()}
    # Learned frequencies read queries and keys once more.
    size = 2 * row.bytes + (row.bytes // 2 if row.learned else 0)
    yield _result(row, "forward and backward", both, size, copied, errors)


class Layer:
    """Operands of one row, and every way to turn them."""

    def __init__(self, row: Row, device: str) -> None:
        self.row = row
        random = torch.Generator(device).manual_seed(0)
        size = row.planes.head_dim

        def heads(count: int) -> Tensor:
            made = torch.randn(row.batch, row.tokens, count, size, generator=random, device=device)
            return made.to(torch.bfloat16).transpose(1, 2).requires_grad_()

        self.heads = heads(row.heads), heads(row.key_heads)
        self.cotangents = tuple(each.detach().clone() for each in self.heads)
        self.weights = [
            torch.ones(size, device=device, dtype=torch.bfloat16).requires_grad_(row.normed) for _ in "qk"
        ]
        self.positions = torch.arange(row.tokens, device=device).expand(row.batch, 1, -1)
        count = row.planes.count
        theta = torch.tensor([10000.0 ** (-j / count) for j in range(count)], device=device)
        self.theta = theta.requires_grad_(row.learned)
        self.encoding = Rotation(row.planes, Table("theta"), Positions("positions"))
        # Models make them once for all layers; of learned frequencies they are another thing each time.
        self.kept = None if row.learned else self.tables()

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [each for each in (*self.heads, *self.weights, self.theta) if each.requires_grad]

    def ways(self) -> Mapping[str, Way]:
        """Return the ways that can turn this row."""
        # Norms join rotations in graphs alone, and there their way back is compiled.
        ours = torch.compile(self.ours) if self.row.normed else self.ours
        found: dict[str, Way] = {OURS: ours, COMPILED: torch.compile(self.written), EAGER: self.written}
        liger = (
            _liger() if not (self.row.normed or self.row.learned) and self.row.planes == Half(128) else None
        )
        if liger is not None:
            cos, sin = (table.unsqueeze(0) for table in self.tables())
            # It turns the queries themselves, again and again; that takes the same time.
            found[LIGER] = lambda query, key: liger(query, key, cos, sin)
        return found

    def ours(self, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Turn by our operator."""
        slots = {"theta": self.theta, "positions": self.positions}
        if self.row.normed:
            return rotate_normed([query, key], self.weights, self.encoding, slots, epsilon=1e-6)
        return rotate([query, key], self.encoding, slots)

    def written(self, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Turn as models write it: x * cos + rotate_half(x) * sin."""
        cos, sin = self.kept or self.tables()
        pairs = zip((query, key), self.weights, strict=True)
        return tuple(self._turned(x, cos, sin, weight) for x, weight in pairs)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [tokens, size of the part that turns], in the dtype of the heads."""
        angle = self.positions[0, 0].float()[:, None] * self.theta
        wide = angle.repeat_interleave(2, -1) if self._pairs else torch.cat((angle, angle), -1)
        return wide.cos().to(torch.bfloat16), wide.sin().to(torch.bfloat16)

    @property
    def _pairs(self) -> bool:
        return isinstance(self.row.planes, Interleaved)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        if self.row.normed:
            wide = x.float()
            x = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        size = 2 * self.row.planes.count
        part, rest = x[..., :size], x[..., size:]
        if self._pairs:
            other = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
        else:
            other = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
        turned = part * cos + other * sin
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def step(self, way: Way) -> tuple[Tensor, ...]:
        """Turn and go back."""
        return torch.autograd.grad(way(*self.heads), self.leaves, self.cotangents)

    def errors(self, ways: Mapping[str, Way] | None = None) -> dict[str, float]:
        """Return the largest error of each way against float64, relative to the largest number."""
        exact_slots = {"theta": self.theta.detach().double(), "positions": self.positions}
        inputs = [each.detach().double() for each in self.heads]
        if self.row.normed:
            inputs = [each * torch.rsqrt(each.square().mean(-1, keepdim=True) + 1e-6) for each in inputs]
        found = {}
        with torch.no_grad():
            wanted = reference_rotate(inputs, self.encoding, exact_slots)
            largest = max(float(each.abs().max()) for each in wanted)
            for name, way in (self.ways() if ways is None else ways).items():
                turned = way(*(each.detach().clone() for each in self.heads))
                pairs = zip(turned, wanted, strict=True)
                found[name] = max(float((one.double() - two).abs().max()) for one, two in pairs) / largest
        return found


def _liger() -> Callable[..., tuple[Tensor, ...]] | None:
    """Return Liger's rotation where it is installed."""
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    apply: Callable[..., tuple[Tensor, ...]] = LigerRopeFunction.apply
    return apply


def _result(
    row: Row,
    direction: str,
    found: Mapping[str, Timed],
    size: int,
    copied: float,
    errors: Mapping[str, float],
) -> dict[str, Any]:
    rates = {name: timing.rate(size) for name, timing in found.items()}
    share = rates[OURS] / copied
    kept = share >= PROMISED_SHARE and rates[OURS] >= PROMISED_OVER_LIGER * rates.get(LIGER, 0.0)
    ratios = ", ".join(f"{rates[OURS] / rate:.2f} x {name}" for name, rate in rates.items() if name != OURS)
    return {
        "name": f"{row.name}, {direction}",
        "told": f"{found[OURS].microseconds:.1f} us, {rates[OURS]:.0f} GB/s, {share:.0%} of the copy rate; {ratios}",
        "holds": kept if row.promised else None,
        "shape": [row.batch, row.heads, row.key_heads, row.tokens, row.planes.head_dim],
        "encoding": str(row.planes),
        "bytes": size,
        "copy_gb_s": round(copied, 1),
        "share_of_copy": round(share, 4),
        "ways": {
            name: timing.row() | {"gb_s": round(rates[name], 1), "error": errors[name]}
            for name, timing in found.items()
        },
    }
