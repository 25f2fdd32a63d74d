"""The definitions, written for reading: coordinate by coordinate and logit by logit.

Plain torch, differentiable by autograd, computed in the dtype of the operands: give them float64 to have the
truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

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
    Link,
    LogSigmoid,
    NegativeExp,
    NonCommuting,
    PathBias,
    Positions,
    Rank2,
    Rotation,
    Signed,
    Slopes,
    Spectrum,
    Steps,
    Table,
    Tables,
    Uniform,
)

Slots = Mapping[str, Tensor]


def reference_rotate(
    tensors: Sequence[Tensor], encoding: Encoding, slots: Slots | None = None
) -> tuple[Tensor, ...]:
    """Return every tensor turned by `encoding` (GRAPE 2-3), in the dtype of the tensor.

    Rotations turn plane by plane, generators by the matrix exponential.

    Same operands and layout as `rotate`. Angles are radians, in the dtype of the tensor.
    """
    given = {} if slots is None else slots
    return tuple(_rotated(tensor, encoding, given) for tensor in tensors)


def _rotated(tensor: Tensor, encoding: Encoding, slots: Slots) -> Tensor:
    match encoding:
        case Compose(parts):
            for part in parts:
                tensor = tensor if isinstance(part, Bias | PathBias) else _rotated(tensor, part, slots)
            return tensor
        case Rotation():
            return _planes_turned(tensor, encoding, slots)
        case Rank2() | NonCommuting():
            return _generated(tensor, encoding, slots)
        case _:
            return tensor.clone()


def _planes_turned(tensor: Tensor, rotation: Rotation, slots: Slots) -> Tensor:
    cos, sin = _cos_sin(tensor, rotation, slots)
    source = tensor if rotation.basis is None else tensor @ slots[rotation.basis].to(tensor.dtype)
    pairs, targets = rotation.planes.pairs(), rotation.output.pairs()
    columns: list[Tensor | None] = [None] * rotation.head_dim
    for j, ((i0, i1), (o0, o1)) in enumerate(zip(pairs, targets, strict=True)):
        c, s = cos[..., j] * rotation.scale, sin[..., j] * rotation.scale
        columns[o0] = c * source[..., i0] - s * source[..., i1]
        columns[o1] = s * source[..., i0] + c * source[..., i1]
    outside = iter(
        sorted(set(range(rotation.head_dim)) - {coordinate for pair in pairs for coordinate in pair})
    )
    filled = [source[..., next(outside)] if column is None else column for column in columns]
    return torch.stack(torch.broadcast_tensors(*filled), -1)


def _cos_sin(tensor: Tensor, rotation: Rotation, slots: Slots) -> tuple[Tensor, Tensor]:
    if isinstance(rotation.clock, Tables):
        cos, sin = slots[rotation.clock.cos].to(tensor.dtype), slots[rotation.clock.sin].to(tensor.dtype)
        return cos, rotation.orientation * sin
    theta = _frequencies(rotation.spectrum, rotation.planes.count, tensor, slots)
    several = rotation.planes.axis_count > 1
    clock = _clock(rotation.clock, tensor.shape[-2] if tensor.dim() > 1 else 1, tensor, slots)
    times = [clock[axis] if several else clock for axis in rotation.planes.axes()]
    angles = rotation.orientation * torch.stack(times, -1) * theta
    return angles.cos(), angles.sin()


def _generated(tensor: Tensor, encoding: Rank2 | NonCommuting, slots: Slots) -> Tensor:
    """x + E (exp(n L) - I) E^T x: for `Rank2`, E is the identity and L = w (a b^T - b a^T) (GRAPE 2.1, App. D)."""
    powers = encoding.orientation * _clock(encoding.clock, tensor.shape[-2], tensor, slots)[..., None, None]
    if isinstance(encoding, Rank2):
        a, b = (slots[name].to(tensor.dtype) for name in (encoding.a, encoding.b))
        a, b = (vector[None] if vector.dim() == 1 else vector for vector in (a, b))
        w = _frequencies(encoding.spectrum, 1, tensor, slots)[..., None]
        basis = torch.eye(encoding.size, dtype=tensor.dtype, device=tensor.device)
        powers = powers * w * (a.mT @ b - b.mT @ a).unsqueeze(-3)
    else:
        basis, generator = (slots[name].to(tensor.dtype) for name in (encoding.basis, encoding.generator))
        powers = powers * ((generator - generator.mT) / 2).unsqueeze(-3)
    inner = tensor @ basis
    turned = (torch.linalg.matrix_exp(powers) @ inner[..., None])[..., 0]
    result: Tensor = tensor + (turned - inner) @ basis.mT
    return result


def _frequencies(spectrum: Spectrum | None, count: int, like: Tensor, slots: Slots) -> Tensor:
    if isinstance(spectrum, Learned | Table):
        return slots[spectrum.slot].to(like.dtype)
    assert spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
    return torch.tensor(spectrum.frequencies(count), dtype=like.dtype, device=like.device)


def _clock(clock: Clock, length: int, like: Tensor, slots: Slots) -> Tensor:
    match clock:
        case Positions(slot):
            return slots[slot].to(like.dtype)
        case Accumulated(slot, inclusive):
            rates = slots[slot].to(like.dtype)
            return rates.cumsum(-1) if inclusive else rates.cumsum(-1) - rates
        case _:
            return torch.arange(length, dtype=like.dtype, device=like.device)


def reference_bias(
    encoding: Encoding, slots: Slots, query_length: int, keys: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Return the logit bias, broadcastable to [B, H, T_q, T_k], of `encoding` for `keys` [B, H, T_k, D].

    Signed, b[t, j] = slope * gate[t, j] * (clock_j - clock_t), or minus slope times the distance (GRAPE 4.2,
    4.6); along a path, the sum of its edges (GRAPE 5.1). Biases of a composition add up. The queries are the
    last T_q keys; `rows` picks some of them.
    """
    everyone = torch.arange(query_length, device=keys.device)
    chosen = everyone if rows is None else everyone[list(rows)]
    match encoding:
        case Compose(parts):
            total = keys.new_zeros(())
            for part in parts:
                total = total + reference_bias(part, slots, query_length, keys, rows)
            return total
        case PathBias():
            return _path(encoding, slots, chosen + keys.shape[-2] - query_length, chosen, keys)
        case Bias():
            return _additive(encoding, slots, chosen + keys.shape[-2] - query_length, chosen, keys)
        case _:
            return keys.new_zeros(())


def _additive(bias: Bias, slots: Slots, at: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Queries number `queries` stand at key numbers `at`."""
    times = _clock(bias.clock, keys.shape[-2], keys, slots)
    axes = times.shape[:1] if isinstance(bias.distance, Euclidean) and times.dim() >= 3 else ()
    # [axes, B or 1, H or 1, T_k]; two axes are batch and keys.
    times = times.reshape(*axes, *_four(times.shape[len(axes) :]))
    rows = at.to(times.dtype) if isinstance(bias.clock, Steps) else times[..., at]
    apart = times[..., None, :] - rows[..., :, None]
    if isinstance(bias.distance, Signed):
        pass
    elif axes:
        apart = -cast(Tensor, torch.linalg.vector_norm(apart, dim=0))
    else:
        apart = -apart.abs()
    gate = keys.new_ones(())
    if bias.gate is not None:
        found = []
        if bias.gate.query is not None:
            found.append(slots[bias.gate.query].to(keys.dtype)[..., queries, None])
        if bias.gate.key is not None:
            found.append(slots[bias.gate.key].to(keys.dtype)[..., None, :])
        gate = cast(Tensor, sum(found))
    return _slopes(bias.slopes, keys, slots)[..., None, None] * gate * apart


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    """[T], [B, T] or [B, H, T] as three axes."""
    return (1, 1, *shape) if len(shape) < 2 else (shape[0], 1, shape[1]) if len(shape) == 2 else tuple(shape)


def _path(bias: PathBias, slots: Slots, at: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    query, edge = slots[bias.query].to(keys.dtype), slots[bias.key].to(keys.dtype)
    if bias.normalised == "both":
        query = _by_size(query)
    if bias.normalised != "none":
        edge = _by_size(edge)
    if bias.turn is not None:
        edge = _rotated(edge, bias.turn, slots)
    product = query[..., queries, :] @ edge.mT / bias.dim
    edges = _LINKS[type(bias.link)](product)
    later = torch.arange(keys.shape[-2], device=keys.device) > at[:, None]
    edges = edges.masked_fill(later, 0.0)
    # The sum over l > j: all edges from j on, without the one at j.
    sums = edges.flip(-1).cumsum(-1).flip(-1) - edges
    return _slopes(bias.slopes, keys, slots)[..., None, None] * sums


_LINKS: Final[Mapping[type[Link], Callable[[Tensor], Tensor]]] = {
    LogSigmoid: torch.nn.functional.logsigmoid,
    NegativeExp: lambda product: -product.exp(),
    Identity: lambda product: product,
}


def _by_size(tensor: Tensor) -> Tensor:
    """Divided by its root mean square (plus 1e-6 below the root)."""
    mean: Tensor = tensor.square().mean(-1, keepdim=True)
    return tensor * (mean + 1e-6).rsqrt()


def _slopes(slopes: Slopes, like: Tensor, slots: Slots) -> Tensor:
    if isinstance(slopes, Learned | Table):
        return slots[slopes.slot].to(like.dtype)
    if isinstance(slopes, Uniform):
        return torch.full((1,), slopes.slope, dtype=like.dtype, device=like.device)
    return torch.tensor(slopes.values(), dtype=like.dtype, device=like.device)


def reference_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoding: Encoding,
    slots: Slots | None = None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T scale + bias + mask) v with all logits in memory (GRAPE 4.2); see `attend`."""
    logits = reference_logits(
        query,
        key,
        encoding,
        slots,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        window=window,
        cap=cap,
        segments=segments,
    )
    return weighted(logits if sinks is None else beside_sinks(logits, sinks), value)


def beside_sinks(logits: Tensor, sinks: Tensor) -> Tensor:
    """Return [B, H, T_q, T_k + 1]: behind the keys' logits that of a key without a value, one for each head."""
    column = sinks.to(logits.dtype)[..., None, None].expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], -1)


def weighted(logits: Tensor, value: Tensor) -> Tensor:
    """Return softmax(logits) v, zero in a row that sees no key; logits behind the last key have no value."""
    # Such a row would be nan.
    weights = torch.where(logits.isneginf().all(-1, keepdim=True), 0.0, logits).softmax(-1)
    values = value.repeat_interleave(logits.shape[1] // value.shape[1], 1)
    return weights.masked_fill(logits.isneginf(), 0.0)[..., : value.shape[2]] @ values


def reference_logits(
    query: Tensor,
    key: Tensor,
    encoding: Encoding,
    slots: Slots | None = None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return q k^T scale + bias + mask, [B, H, T_q, T_k], minus infinity where a key may not be seen (GRAPE 4.2).

    A soft cap stands below bias and mask: cap tanh(q k^T scale / cap) in place of q k^T scale (Gemma 2, 2.2).
    """
    given = {} if slots is None else slots
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    query, keys = _turned_pair(query, keys, encoding, given)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query @ keys.mT) * factor
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    logits = logits + reference_bias(encoding, given, query.shape[2], keys)
    hidden = _hidden(query.shape[2], key.shape[2], is_causal, window, query.device)
    if segments is not None:
        own = segments[..., key.shape[2] - query.shape[2] :]
        hidden = hidden | (own[..., :, None] != segments[..., None, :]).unsqueeze(-3)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        logits = logits + mask.to(logits.dtype)
    return logits.masked_fill(hidden, -math.inf)


def _turned_pair(query: Tensor, key: Tensor, encoding: Encoding, slots: Slots) -> tuple[Tensor, Tensor]:
    """Turn queries and keys of one sequence whose last tokens are the queries."""
    length = key.shape[-2]
    padding = query.new_zeros(*query.shape[:2], max(length - query.shape[-2], 0), query.shape[-1])
    turned_query, turned_key = reference_rotate([torch.cat([padding, query], -2), key], encoding, slots)
    return turned_query[..., padding.shape[-2] :, :], turned_key


def _hidden(queries: int, keys: int, is_causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Return True where query t may not see key j: the future, and what is `window` or more tokens behind."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if is_causal:
        hidden = hidden | (behind < 0)
    if window is not None:
        hidden = hidden | (behind >= window)
    return hidden
