"""Streaming: tokens fed in pieces, cropped and reordered, give what all of them at once give."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operator_laws import sequence_axes
from torch import Tensor

from grape_compile.encoding import Bias, Compose, Euclidean, Rotation, alibi, fox
from grape_compile.errors import OperandError
from grape_compile.nn import StreamingCache
from grape_compile.operators import reference_attend
from grape_compile.operators.samples import (
    BATCH,
    BIASES,
    COMPOSITIONS,
    GENERATORS,
    HEAD_DIM,
    HEADS,
    LENGTH,
    PATHS,
    ROTATIONS,
    Sample,
    tensor,
)

SAMPLES = [*ROTATIONS, *GENERATORS, *BIASES, *PATHS, *COMPOSITIONS]
PIECES: dict[str, tuple[int, ...]] = {
    "one_by_one": (1,) * LENGTH,
    "prompt_then_one": (6, 1, 1, 1),
    "chunks": (4, 5),
}

samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def operands(key_heads: int = HEADS) -> list[Tensor]:
    return [
        tensor(BATCH, heads, LENGTH, HEAD_DIM, seed=seed)
        for seed, heads in enumerate((HEADS, key_heads, key_heads))
    ]


def piece(sample: Sample, slots: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    """The slots of some tokens alone."""
    axes = sequence_axes(sample.encoding)
    return {
        name: slot.narrow(axes[name], tokens.start, tokens.stop - tokens.start) if name in axes else slot
        for name, slot in slots.items()
    }


def fed(cache: StreamingCache, sample: Sample, sizes: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """Feed all tokens after those of the cache, in pieces."""
    outputs, slots = [], sample.slots()
    for size in sizes:
        tokens = slice(cache.length, cache.length + size)
        parts = [part[:, :, tokens] for part in tensors]
        outputs.append(cache.attend(parts[0], parts[1], parts[2], piece(sample, slots, tokens)))
    return torch.cat(outputs, 2)


def whole(sample: Sample, tensors: Sequence[Tensor], slots: dict[str, Tensor] | None = None) -> Tensor:
    query, key, value = tensors
    filled = sample.slots() if slots is None else slots
    return reference_attend(query, key, value, sample.encoding, filled, is_causal=True)


@samples
@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
def test_cached_is_uncached(sample: Sample, sizes: tuple[int, ...]) -> None:
    tensors = operands()
    found = fed(StreamingCache(sample.encoding), sample, sizes, tensors)
    torch.testing.assert_close(found, whole(sample, tensors), rtol=1e-10, atol=1e-10)


@samples
def test_cropped_cache_goes_on(sample: Sample) -> None:
    """Tokens that were taken back leave no trace."""
    tensors = operands()
    cache = StreamingCache(sample.encoding)
    fed(cache, sample, (3, 4), [part.flip(2) for part in tensors])
    cache.crop(0)
    fed(cache, sample, (4, 3), tensors)
    cache.crop(5)
    cache.crop(50)
    assert cache.length == 5
    found = fed(cache, sample, (1, 3), tensors)
    torch.testing.assert_close(found, whole(sample, tensors)[:, :, 5:], rtol=1e-10, atol=1e-10)


@samples
def test_reordered_beams(sample: Sample) -> None:
    """Row b goes on with the past of row beams[b]."""
    beams = torch.tensor([1, 1])
    tensors = operands()
    cache = StreamingCache(sample.encoding)
    fed(cache, sample, (5,), tensors)
    cache.reorder(beams)
    found = fed(cache, sample, (1,), tensors)
    mixed = [torch.cat([part[beams][:, :, :5], part[:, :, 5:6]], 2) for part in tensors]
    slots, axes = sample.slots(), sequence_axes(sample.encoding)
    for name, axis in axes.items():
        slot = slots[name]
        past, now = slot.narrow(axis, 0, 5), slot.narrow(axis, 5, 1)
        batch = batch_axis(sample, name)
        if batch is not None:
            past = past.index_select(batch, beams)
        slots[name] = torch.cat([past, now], axis)
    wanted = whole(sample, mixed, slots)[:, :, 5:]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def batch_axis(sample: Sample, name: str) -> int | None:
    """The axis of the batch in a slot along the sequence, behind that of the coordinates where there are several."""
    slot = sample.slots()[name]
    parts = sample.encoding.parts if isinstance(sample.encoding, Compose) else (sample.encoding,)
    lead = 0
    for part in parts:
        several = isinstance(part, Rotation) and part.planes.axis_count > 1
        if name in part.slots and (
            several or (isinstance(part, Bias) and isinstance(part.distance, Euclidean))
        ):
            lead = int(slot.dim() >= 3)
    token = sequence_axes(sample.encoding)[name] % slot.dim()
    return lead if lead < token and slot.shape[lead] == BATCH else None


def test_grouped_heads_a_window_and_a_mask() -> None:
    query, key, value = operands(key_heads=2)
    cache, outputs = StreamingCache(alibi(HEADS)), []
    seen = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.2
    for t in range(LENGTH):
        now = slice(t, t + 1)
        parts = [part[:, :, now] for part in (query, key, value)]
        mask = seen[..., now, : t + 1]
        outputs.append(cache.attend(parts[0], parts[1], parts[2], mask=mask, scale=0.3, window=4))
    wanted = reference_attend(query, key, value, alibi(HEADS), mask=seen, scale=0.3, window=4, is_causal=True)
    torch.testing.assert_close(torch.cat(outputs, 2), wanted, rtol=1e-10, atol=1e-10)


def test_long_running_sums_lose_nothing() -> None:
    """After a million tokens the bias of float32 rates is that of their exact sums."""
    length = 1 << 20
    rates = torch.full((1, 1, length), -0.001)
    cache = StreamingCache(fox())
    part = torch.zeros(1, 1, length, 1)
    cache.attend(part[:, :, :1], part[:, :, :1], part[:, :, :1], {"log_forget": rates[..., :1]})
    # Only the sums matter here; the attention over them is checked elsewhere.
    sums = cache._sums(fox().clock, rates[..., 1:], "0.sums", length - 1, 0)  # type: ignore[arg-type]
    exact = torch.arange(1, length + 1, dtype=torch.float64) * float(rates[0, 0, 0])
    assert float((sums[0, 0] - exact).abs().max()) < 1e-7


def test_what_does_not_fit_leaves_the_cache_as_it_was() -> None:
    query, key, value = operands()
    cache = StreamingCache(fox())
    rates = torch.zeros(BATCH, HEADS, LENGTH, dtype=torch.float64)
    cache.attend(query, key, value, {"log_forget": rates})
    wrong: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor], str]] = [
        ((query, key[:, :, :3], value[:, :, :3]), {"log_forget": rates}, "the same T new tokens"),
        ((query, key, value), {}, "a mapping with log_forget"),
        ((query, key, value), {"log_forget": rates[..., :3]}, "one rate for each token"),
        ((query, key, value[:, :, :3]), {"log_forget": rates}, "value [B, H_kv, T_k, D_v]"),
    ]
    for tensors, slots, works in wrong:
        with pytest.raises(OperandError) as caught:
            cache.attend(*tensors, slots)
        assert works in caught.value.works
        assert cache.length == LENGTH
    with pytest.raises(OperandError):
        cache.crop(-1)


def test_every_encoding_has_a_cache() -> None:
    """The cache turns what rotates once, and keeps what a bias needs of every key."""
    for sample in SAMPLES:
        cache = StreamingCache(sample.encoding)
        fed(cache, sample, (LENGTH,), operands())
        assert cache.length == LENGTH
        assert set(cache._kept) >= {"key", "value"}
        if isinstance(sample.encoding, Rotation) and not sample.encoding.clock.slots:
            assert set(cache._kept) == {"key", "value"}
