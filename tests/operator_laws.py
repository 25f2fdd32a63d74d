"""The laws of a bias (GRAPE, arXiv 2512.07805), each for any function that claims to compute it.

A law takes the function and one row of samples and raises AssertionError where the function breaks it.
Everything is float64; the tolerance is 1e-12 of numbers of size one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Clock,
    Compose,
    Encoding,
    Euclidean,
    Identity,
    Learned,
    LogSigmoid,
    NegativeExp,
    Nope,
    PathBias,
    Positions,
    Rotation,
    Signed,
    Table,
    Tables,
    Uniform,
)
from grape_compile.operators import attend, providers, reference_attend, reference_rotate, rotate
from grape_compile.operators.samples import BATCH, HEAD_DIM, HEADS, LENGTH, Sample, query_axes, tensor

Slots = Mapping[str, Tensor]
Rotate = Callable[[Sequence[Tensor], Encoding, Slots], tuple[Tensor, ...]]


#: `attend` and what stands in for it.
Attend = Callable[..., Tensor]


@contextmanager
def only(name: str) -> Iterator[None]:
    """Leave one provider of `grape::attend` in the table."""
    before = providers.PROVIDERS
    providers.PROVIDERS = tuple(row for row in before if row.name == name)
    try:
        yield
    finally:
        providers.PROVIDERS = before


def chunked_attend(*operands: Any, **options: Any) -> Tensor:
    with only("chunked"):
        return attend(*operands, **options)


ROTATE: dict[str, Rotate] = {"reference": reference_rotate, "operator": rotate}
ATTEND: dict[str, Attend] = {"reference": reference_attend, "operator": attend, "chunked": chunked_attend}


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """Raise AssertionError unless two tensors agree to the tolerance, absolute plus relative."""
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def operands(queries: int = LENGTH, keys: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tensor(BATCH, HEADS, queries, HEAD_DIM, seed=11),
        tensor(BATCH, HEADS, keys, HEAD_DIM, seed=12),
        tensor(BATCH, HEADS, keys, HEAD_DIM, seed=13),
    )


def generator(slope: Tensor) -> Tensor:
    """A = -slope e_{d+2} e_{d+1}^T (4.2), [..., d + 2, d + 2]."""
    lifted = torch.zeros(*slope.shape, HEAD_DIM + 2, HEAD_DIM + 2, dtype=torch.float64)
    lifted[..., HEAD_DIM + 1, HEAD_DIM] = -slope
    return lifted


def slopes_of(bias: Bias | PathBias, slots: Slots) -> Tensor:
    """Slopes [B, H]."""
    if isinstance(bias.slopes, Learned | Table):
        return slots[bias.slopes.slot].expand(BATCH, HEADS)
    if isinstance(bias.slopes, Uniform):
        return torch.full((BATCH, HEADS), bias.slopes.slope, dtype=torch.float64)
    return torch.tensor(bias.slopes.values(), dtype=torch.float64).expand(BATCH, HEADS)


def times_of(bias: Bias, slots: Slots) -> Tensor:
    """Times of the keys, [axes, B, H, T]."""
    if isinstance(bias.clock, Positions | Accumulated):
        times = slots[bias.clock.slot].double()
        if isinstance(bias.clock, Accumulated):
            times = times.cumsum(-1) - (0 if bias.clock.inclusive else times)
        if isinstance(bias.distance, Euclidean) and times.dim() == 3:
            return times[:, :, None].expand(-1, BATCH, HEADS, LENGTH)
        times = times[:, None] if times.dim() == 2 else times
        return times.expand(BATCH, HEADS, LENGTH)[None]
    return torch.arange(LENGTH, dtype=torch.float64).expand(1, BATCH, HEADS, LENGTH)


def gate_of(bias: Bias, slots: Slots) -> Tensor:
    """What multiplies the slope, broadcastable to [B, H, T, T]."""
    if bias.gate is None:
        return torch.ones((), dtype=torch.float64)
    gate = torch.zeros((), dtype=torch.float64)
    if bias.gate.query is not None:
        gate = gate + slots[bias.gate.query][..., :, None]
    return gate if bias.gate.key is None else gate + slots[bias.gate.key][..., None, :]


def lifted_logits(query: Tensor, key: Tensor, bias: Bias, slots: Slots, scale: float) -> Tensor:
    """Scaled logits q^^T G(j - t)^{-T} k^ of the lift to d + 2 coordinates (4.2-4.7).

    A distance that is not signed takes the place of j - t (App. G); a gate multiplies the slope (4.6).
    """
    times = times_of(bias, slots)
    apart = times[..., None, :] - times[..., :, None]
    steps = apart[0] if isinstance(bias.distance, Signed) else -apart.square().sum(0).sqrt()
    steps = steps * gate_of(bias, slots)
    powers = steps[..., None, None] * generator(slopes_of(bias, slots))[:, :, None, None]
    acted = torch.linalg.matrix_exp(-powers.mT)
    one, zero = torch.ones_like(query[..., :1]), torch.zeros_like(query[..., :1])
    lifted_query = torch.cat([query, one / scale, zero], -1)
    lifted_key = torch.cat([key, zero, one], -1)
    return scale * torch.einsum("bhtd,bhtjde,bhje->bhtj", lifted_query, acted, lifted_key)


def path_bias(bias: PathBias, slots: Slots) -> Tensor:
    """b[t, j], edge by edge: the unipotent steps from j to t multiply, so their exponents add up (5.1)."""

    def size_one(tensor: Tensor) -> Tensor:
        return tensor / (tensor.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    shape = (BATCH, HEADS, LENGTH, bias.dim)
    query, key = slots[bias.query].expand(shape), slots[bias.key].expand(shape)
    query = size_one(query) if bias.normalised == "both" else query
    key = key if bias.normalised == "none" else size_one(key)
    if bias.turn is not None:
        (key,) = reference_rotate([key], bias.turn, slots)
    links: dict[type, Callable[[Tensor], Tensor]] = {
        LogSigmoid: lambda x: -(1 + (-x).exp()).log(), NegativeExp: lambda x: -x.exp(), Identity: lambda x: x
    }  # fmt: skip
    total = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for t in range(LENGTH):
        for j in range(t - 1, -1, -1):
            edge = links[type(bias.link)]((query[:, :, t] * key[:, :, j + 1]).sum(-1) / bias.dim)
            total[:, :, t, j] = total[:, :, t, j + 1] + slopes_of(bias, slots) * edge
    return total


def written_logits(sample: Sample, slots: Slots, cap: float | None = None) -> Tensor:
    """Causal logits with everything added by hand, rotations first, a cap on the product alone."""
    query, key, _ = operands()
    for part in _leaves(sample.encoding):
        if isinstance(part, Rotation):
            query, key = reference_rotate([query, key], part, slots)
    logits = HEAD_DIM**-0.5 * query @ key.mT
    if cap is not None:
        grown = (2 * logits / cap).exp()
        logits = cap * (grown - 1) / (grown + 1)
    for part in _leaves(sample.encoding):
        if isinstance(part, PathBias):
            logits = logits + path_bias(part, slots)
        elif isinstance(part, Bias):
            logits = logits + lifted_logits(torch.zeros_like(query), key, part, slots, 1.0)
    return logits.masked_fill(future(), -torch.inf)


def walks_its_paths(function: Attend, sample: Sample) -> None:
    """softmax of the logits with every edge added by hand, causal; rotations and other biases beside it."""
    slots = sample.slots()
    found = function(*operands(), sample.encoding, slots, is_causal=True)
    same(found, written_logits(sample, slots).softmax(-1) @ operands()[2])


def caps_products_alone(function: Attend, sample: Sample) -> None:
    """A soft cap stands below biases and mask."""
    slots = sample.slots()
    found = function(*operands(), sample.encoding, slots, is_causal=True, cap=0.75)
    same(found, written_logits(sample, slots, 0.75).softmax(-1) @ operands()[2])


def sinks_have_no_value(function: Attend, sample: Sample) -> None:
    """A sink is in the denominator of its head, and in nothing else."""
    slots, sinks = sample.slots(), tensor(HEADS, seed=21)
    for given in (sinks, sinks + tensor(BATCH, HEADS, seed=22)):
        grown = written_logits(sample, slots).exp()
        weights = grown / (grown.sum(-1, keepdim=True) + given.exp()[..., None, None])
        same(
            function(*operands(), sample.encoding, slots, is_causal=True, sinks=given),
            weights @ operands()[2],
        )


def segments_do_not_see_each_other(function: Attend, sample: Sample) -> None:
    """Keys of another segment are as if they were not there, wherever they stand; the queries are the last keys."""
    slots = sample.slots()
    for segments in (torch.arange(LENGTH) // 4, torch.arange(BATCH)[:, None] + torch.arange(LENGTH) % 2):
        apart = segments[..., :, None] != segments[..., None, :]
        logits = written_logits(sample, slots).masked_fill(apart.reshape(-1, 1, LENGTH, LENGTH), -torch.inf)
        found = function(*operands(), sample.encoding, slots, is_causal=True, segments=segments)
        same(found, logits.softmax(-1) @ operands()[2])


def falls_with_the_distance(function: Attend, sample: Sample) -> None:
    """Where slopes, gates and rates have one sign, a key further back has no larger weight for equal products."""
    slots = sample.slots()
    query, key, _ = (torch.zeros_like(part) for part in operands())
    value = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, HEADS, LENGTH, LENGTH)
    weights = function(query, key, value, sample.encoding, slots, is_causal=True)
    for t in range(LENGTH):
        assert bool((weights[:, :, t, 1 : t + 1] - weights[:, :, t, :t] >= -1e-15).all())


def future() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def attends_like_the_lift(function: Attend, sample: Sample) -> None:
    """softmax of the lifted logits, causal and not, with the scale given and by default."""
    query, key, value = operands()
    slots = sample.slots()
    for scale in (HEAD_DIM**-0.5, 0.7):
        if isinstance(sample.encoding, Nope):
            logits = scale * query @ key.mT
        else:
            assert isinstance(sample.encoding, Bias)
            logits = lifted_logits(query, key, sample.encoding, slots, scale)
        given = None if scale != 0.7 else scale
        same(function(query, key, value, sample.encoding, slots, scale=given), logits.softmax(-1) @ value)
        hidden = logits.masked_fill(future(), -torch.inf)
        causal = function(query, key, value, sample.encoding, slots, scale=given, is_causal=True)
        same(causal, hidden.softmax(-1) @ value)


def ignores_the_future(function: Attend, sample: Sample) -> None:
    """A causal output does not change with later keys and values."""
    query, key, value = operands()
    slots = sample.slots()
    other = operands()[1].flip(2)
    for t in (0, 4):
        changed = [torch.cat([part[:, :, : t + 1], other[:, :, t + 1 :]], 2) for part in (key, value)]
        before = function(query, key, value, sample.encoding, slots, is_causal=True)[:, :, : t + 1]
        after = function(query, *changed, sample.encoding, slots, is_causal=True)[:, :, : t + 1]
        same(after, before)


def streams_keys(function: Attend, sample: Sample) -> None:
    """One query at a time over the keys so far equals the whole causal sequence."""
    query, key, value = operands()
    slots = sample.slots()
    whole = function(query, key, value, sample.encoding, slots, is_causal=True)
    for t in range(LENGTH):
        so_far = {name: _so_far(sample.encoding, name, slot, t + 1) for name, slot in slots.items()}
        parts = (query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1])
        same(function(*parts, sample.encoding, so_far, is_causal=True), whole[:, :, t : t + 1])


def _so_far(encoding: Encoding, name: str, slot: Tensor, length: int) -> Tensor:
    if name in query_axes(encoding):
        return slot.narrow(query_axes(encoding)[name], length - 1, 1)
    axes = sequence_axes(encoding)
    return slot.narrow(axes[name], 0, length) if name in axes else slot


def sequence_axes(encoding: Encoding) -> dict[str, int]:
    """The slots that have one entry for each token, and their axis of tokens."""
    axes = query_axes(encoding)
    for part in _leaves(encoding):
        turn = part.turn if isinstance(part, PathBias) else part
        clock = getattr(turn, "clock", None)
        if isinstance(clock, Tables):
            axes |= {clock.cos: -2, clock.sin: -2}
        elif isinstance(clock, Clock):
            axes |= dict.fromkeys(clock.slots, -1)
        if isinstance(part, Bias) and part.gate is not None and part.gate.key is not None:
            axes[part.gate.key] = -1
        if isinstance(part, PathBias):
            axes[part.key] = -2
    return axes


def _leaves(encoding: Encoding) -> list[Encoding]:
    parts = encoding.parts if isinstance(encoding, Compose) else ()
    return [leaf for part in parts for leaf in _leaves(part)] if parts else [encoding]


def has_no_first_key(function: Attend, sample: Sample) -> None:
    """The same output when all times are later by a constant."""
    encoding = sample.encoding
    if not (isinstance(encoding, Bias) and isinstance(encoding.clock, Positions)):
        return
    slots = sample.slots()
    name = encoding.clock.slot
    moved = {**slots, name: slots[name] + 3}
    for causal in (False, True):
        outputs = [function(*operands(), encoding, given, is_causal=causal) for given in (slots, moved)]
        same(outputs[1], outputs[0])


ATTEND_LAWS: tuple[Callable[[Attend, Sample], None], ...] = (
    attends_like_the_lift,
    ignores_the_future,
    streams_keys,
    has_no_first_key,
)

#: Of what stands beside any encoding.
OPTION_LAWS: tuple[Callable[[Attend, Sample], None], ...] = (
    caps_products_alone,
    sinks_have_no_value,
    segments_do_not_see_each_other,
)

PATH_LAWS: tuple[Callable[[Attend, Sample], None], ...] = (walks_its_paths, ignores_the_future, streams_keys)

#: Samples whose bias never rises with the distance: one sign of slopes and rates, no gate of the key (GRAPE 4.6).
FALLING = (
    "alibi", "table_slopes", "learned_slopes", "forgetting", "absolute", "fox", "fox_exclusive", "phase_modulated",
    "gated_query", "grape_ap", "grape_ap_both", "path_learned",
)  # fmt: skip
