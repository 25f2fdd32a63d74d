"""`grape::decode`: a step turns, appends and attends as the parts of it do, in two launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

pytest.importorskip("triton")

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Compose,
    Encoding,
    Gate,
    Geometric,
    Half,
    Interleaved,
    Learned,
    LogSigmoid,
    Pairs,
    Partial,
    PathBias,
    Positions,
    Rank2,
    Rotation,
    Steps,
    Tables,
    alibi,
    grape_ap,
    nope,
    rope,
)
from grape_compile.errors import OperandError
from grape_compile.kernels import decoding_step
from grape_compile.kernels.decoding import Decoding
from grape_compile.kernels.launch import Launch
from grape_compile.operators import attend, chunked, decode, providers
from grape_compile.operators.call import AttendCall
from grape_compile.operators.decode_call import DecodeCall
from grape_compile.operators.prepare import parts
from grape_compile.operators.providers import Provider
from grape_compile.operators.samples import tensor

BATCH, HEADS, KEY_HEADS, SIZE, CAPACITY = 2, 4, 2, 16, 40
LENGTHS = (19, 33)

TIMED = Bias(Learned("slopes"), Positions("times"), gate=Gate("gate_query", "gate_key"))
STEPPED = Rotation(Interleaved(16), Geometric(100.0), Steps(), orientation=-1, scale=0.7)
ENCODINGS: dict[str, Encoding] = {
    "none": nope(),
    "alibi": alibi(HEADS),
    "rope and alibi": Compose((rope(16), alibi(HEADS))),
    "positions": Rotation(Half(16), Learned("theta"), Positions("n")),
    "exact": Rotation(Half(16), Learned("theta"), Positions("exact")),
    "tables": Rotation(Partial(Half(8), 4, 16), None, Tables()),
    "pairs": Rotation(Pairs(((0, 3), (5, 1), (2, 7)), 16), Geometric(10.0), Positions("n")),
    "gates and times": Compose((STEPPED, TIMED)),
    "path": grape_ap(HEADS, 4),
    "rope and kept path": Compose((rope(16), PathBias(LogSigmoid(), Learned("slopes"), 6))),
}


@contextmanager
def kernel_only() -> Iterator[list[str]]:
    """The kernels alone, and what they launch."""
    launched: list[str] = []
    run, before = Launch.run, providers.DECODE_PROVIDERS

    def noted(launch: Launch, *, traced: bool = False) -> None:
        launched.append(launch.function.__name__)
        run(launch, traced=traced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "run", noted)
        row = Provider("triton decoding", "grape_compile.kernels.decoding_step", priority=10)
        patch.setattr(providers, "DECODE_PROVIDERS", (row,))
        yield launched
    assert before is providers.DECODE_PROVIDERS


Heads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(count: int, seed: int = 0) -> tuple[Heads, Tensor]:
    """New heads as projections leave them, and caches whose free places are poisoned."""
    new = [
        tensor(BATCH, count, heads, SIZE, seed=seed + number, dtype=torch.float32).to(DEVICE).transpose(1, 2)
        for number, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS))
    ]
    caches = [
        tensor(BATCH, KEY_HEADS, CAPACITY, SIZE, seed=7 + each, dtype=torch.float32).to(DEVICE)
        for each in (0, 1)
    ]
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    for row, length in enumerate(LENGTHS):
        for cache in caches:
            cache[row, :, length:] = torch.nan
    return (new[0], new[1], new[2], caches[0], caches[1]), lengths


def finite(heads: Heads) -> Heads:
    """The same without poison."""
    return (*heads[:3], heads[3].nan_to_num(), heads[4].nan_to_num())


def _dim(encoding: Encoding) -> int:
    """Coordinates of a path."""
    return next((part.dim for part in parts(encoding) if isinstance(part, PathBias)), 1)


def slots_of(encoding: Encoding, count: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "slopes": (HEADS,),
        "times": (BATCH, CAPACITY),
        "gate_query": (BATCH, HEADS, count),
        "gate_key": (BATCH, 1, CAPACITY),
        "theta": (8,),
        "n": (BATCH, 1, count),
        "exact": (count,),
        "cos": (BATCH, 1, count, 4),
        "sin": (1, 1, count, 4),
        "path_query": (BATCH, HEADS, count, _dim(encoding)),
        "path_key": (BATCH, HEADS, CAPACITY, _dim(encoding)),
    }
    found = {name: tensor(*shapes[name], seed=3, dtype=torch.float32).abs() for name in encoding.slots}
    if "n" in found:
        found["n"] = torch.arange(BATCH * count).reshape(BATCH, 1, count)
    if "exact" in found:
        found["exact"] = torch.arange(count, dtype=torch.float64) + 1e6
    if "path_key" in found:
        for row, length in enumerate(LENGTHS):
            found["path_key"][row, :, length + count :] = torch.nan
    return {name: slot.to(DEVICE) for name, slot in found.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_step_is_its_parts(name: str, count: int) -> None:
    encoding = ENCODINGS[name]
    slots = slots_of(encoding, count)
    heads, lengths = operands(count)
    wanted = decode(*heads, lengths, encoding, slots, window=24)
    own, _ = operands(count)
    with kernel_only() as launched:
        found = decode(*own, lengths, encoding, slots, window=24)
    assert launched == ["decode_split", "decode_merge"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Each new token is where it belongs, turned, and every other place is as it was.
    torch.testing.assert_close(own[3:], heads[3:], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("way", "bias"),
    [
        ("kernel", alibi(HEADS)),
        ("torch", grape_ap(HEADS, 4)),
        pytest.param("torch", alibi(HEADS), marks=pytest.mark.slow),
        pytest.param("kernel", grape_ap(HEADS, 4), marks=pytest.mark.slow),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_steps_one_after_the_other_are_attention_over_all(way: str, bias: Encoding) -> None:
    """From an empty cache on, by pieces of several sizes."""
    encoding = Compose((rope(16), bias))
    slots = {
        name: tensor(BATCH, HEADS, CAPACITY, 4, seed=at, dtype=torch.float32).to(DEVICE)
        for at, name in enumerate(encoding.slots)
    }
    shapes = ((HEADS, 11), (KEY_HEADS, 11), (KEY_HEADS, 11))
    query, key, value = (
        tensor(BATCH, heads, tokens, SIZE, seed=seed, dtype=torch.float32).to(DEVICE)
        for seed, (heads, tokens) in enumerate(shapes)
    )
    caches = [torch.full((BATCH, KEY_HEADS, CAPACITY, SIZE), torch.nan, device=DEVICE) for _ in range(2)]
    results, length = [], 0
    for count in (3, 1, 1, 5, 1):
        part = slice(length, length + count)
        lengths = torch.full((BATCH,), length, dtype=torch.int32, device=DEVICE)
        given = query[:, :, part], key[:, :, part], value[:, :, part], caches[0], caches[1]
        now = {**slots, "path_query": slots["path_query"][:, :, part]} if slots else {}
        with kernel_only() if way == "kernel" else nullcontext():
            results.append(decode(*given, lengths, encoding, now))
        length += count
    whole = attend(
        query, key, value, encoding, {name: slot[:, :, :11] for name, slot in slots.items()}, is_causal=True
    )
    torch.testing.assert_close(torch.cat(results, 2), whole, rtol=1e-5, atol=1e-5)


def call_of(encoding: Encoding, **changed: Any) -> DecodeCall:
    heads, lengths = operands(1)
    slots = {name: torch.ones(8 if name == "theta" else SIZE) for name in encoding.slots}
    call = DecodeCall(heads[0], heads[1], heads[2], heads[3], heads[4], lengths, encoding, slots, 1.0, None)
    return replace(call, **changed)


def test_what_a_kernel_does_not_take() -> None:
    supports = decoding_step.supports
    assert "more than one" in str(supports(call_of(Compose((rope(16), rope(16))))))
    moved = Rotation(Interleaved(16), Geometric(1.0), Steps(), out=Half(16))
    assert "planes that move" in str(supports(call_of(moved)))
    assert "mixes more" in str(supports(call_of(Rank2(16, Geometric(1.0), Steps()))))
    own = {"cos": torch.ones(HEADS, 1, 8), "sin": torch.ones(HEADS, 1, 8)}
    assert "of their own" in str(supports(call_of(Rotation(Half(16), None, Tables()), slots=own)))
    theta = {"theta": torch.ones(1, 8), "n": torch.zeros(1)}
    assert "each token" in str(supports(call_of(ENCODINGS["positions"], slots=theta)))
    cache = torch.zeros(BATCH, KEY_HEADS, SIZE, CAPACITY).transpose(2, 3)
    assert "neighbours" in str(supports(call_of(nope(), key_cache=cache)))


def test_operands_that_do_not_fit() -> None:
    heads, lengths = operands(2)
    with pytest.raises(OperandError, match="append tokens"):
        decode(heads[0][:, :, :1], *heads[1:], lengths, nope())
    with pytest.raises(OperandError, match="tokens of each sequence"):
        decode(*heads, lengths.float(), nope())
    path = {"path_query": torch.ones(1, HEADS, 2, 4), "path_key": torch.ones(1, HEADS, CAPACITY, 4)}
    turned = replace(grape_ap(HEADS, 4), turn=Rotation(Half(4), Geometric(1.0), Positions("n")))
    with pytest.raises(OperandError, match="turned before they joined"):
        decode(*heads, lengths, turned, {**path, "n": torch.arange(CAPACITY)})
    summed = Rotation(Half(16), Geometric(1.0), Accumulated("phase", inclusive=True))
    with pytest.raises(OperandError, match="sum over all tokens"):
        decode(*heads, lengths, summed, {"phase": torch.ones(2)})
    with pytest.raises(OperandError, match="gradient"):
        decode(heads[0].requires_grad_(), *heads[1:], lengths, nope())


def test_decode_is_an_operator() -> None:
    heads, lengths = operands(1)
    heads = finite(heads)
    torch.library.opcheck(torch.ops.grape.decode.default, (*heads, lengths, [], str(rope(16)), None, None))


def test_a_cache_in_pages() -> None:
    """Pages in any order hold what a cache in one piece would, and the new token joins its page."""
    page, encoding = 8, rope(16)
    heads, lengths = operands(1)
    wanted = decode(*heads, lengths, encoding)
    numbers = torch.randperm(BATCH * CAPACITY // page, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    own, _ = operands(1)
    pages = []
    for cache in own[3:]:
        pieces = cache.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
        pages.append(torch.empty_like(pieces))
        pages[-1][numbers] = pieces
    call = DecodeCall(own[0], own[1], own[2], own[3], own[4], lengths, encoding, {}, 0.25, None)
    table = numbers.to(torch.int32).view(BATCH, -1)
    step = {
        **decoding_step.step_arguments(call),
        "PAGES": table,
        "pages_batch": table.stride(0),
        "PAGE": page,
    }
    step |= {"KEY": pages[0], "VALUE": pages[1]}
    for name, each in zip(("key", "value"), pages, strict=True):
        step |= {f"{name}_page": each.stride(0), f"{name}_batch": 0, f"{name}_head": each.stride(1)}
    attending = AttendCall(own[0], own[3], own[4], (), None, True, call.scale, None)
    output, logsumexp = chunked.empty_result(attending)
    both = Decoding(attending, step=step)
    both.split_launch().run()
    both.merge_launch(output, logsumexp).run()
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    for kept, each in zip(heads[3:], pages, strict=True):
        whole = each[numbers].unflatten(0, (BATCH, -1)).transpose(1, 2).flatten(2, 3)
        torch.testing.assert_close(whole, kept, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_one_graph_steps_through_a_cache() -> None:
    encoding = Compose((rope(16), alibi(HEADS)))
    heads, lengths = operands(1)
    heads = finite(heads)
    kept = [each.clone() for each in heads[3:]]
    start = lengths.clone()

    def step() -> Tensor:
        return decode(*heads, lengths, encoding)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for cache, before in zip(heads[3:], kept, strict=True):
        cache.copy_(before)
    for number in range(4):
        lengths.copy_(start + number)
        graph.replay()
        query, key, value = (each.cpu() for each in heads[:3])
        there = [each.cpu() for each in kept]
        wanted = decode(query, key, value, there[0], there[1], lengths.cpu(), encoding)
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
        for cache, before in zip(heads[3:], kept, strict=True):
            before.copy_(cache)
