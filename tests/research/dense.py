"""What the hand-written models mean: dense double loops from the equations, given a model's own weights.

A formula takes an attention layer, its input [B, T, hidden] and its plain queries and keys [B, H, T, D]; it
returns the queries and keys that are multiplied and the bias [B, H, T, T] that is added to the scaled product.
Turning is by the matrix exponential of the generator, sums are written as sums, gates and path edges pair by
pair: nothing is shared with the layers but their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from research.parts import BASE, HEAD_DIM, HEADS, HIDDEN, Fused

Formula = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Pairs = tuple[tuple[int, int], ...]

HALVES: Pairs = tuple((j, j + HEAD_DIM // 2) for j in range(HEAD_DIM // 2))
NEIGHBOURS: Pairs = tuple((2 * j, 2 * j + 1) for j in range(HEAD_DIM // 2))


def dense_logits(model: nn.Module, ids: Tensor, formula: Formula) -> Tensor:
    """The logits of a language model of `research.parts` whose attention is `formula`."""
    parts: Any = model
    x = parts.embed(ids)
    for block in parts.blocks:
        x = x + dense_attention(block.attention, block.attention_norm(x), formula)
        x = x + block.feed(block.feed_norm(x))
    logits: Tensor = parts.head(parts.norm(x))
    return logits


def dense_attention(layer: Any, x: Tensor, formula: Formula) -> Tensor:
    query, key, value = (_split(_project(weight, x), HEADS) for weight in _projections(layer))
    query, key, bias = formula(layer, x, query, key)
    logits = torch.einsum("bhtd,bhjd->bhtj", query, key) / math.sqrt(HEAD_DIM) + bias
    length = x.shape[1]
    rows = []
    for t in range(length):
        seen = t + 1 if layer.causal else length
        weights = logits[:, :, t, :seen].softmax(-1)
        rows.append(torch.einsum("bhj,bhjd->bhd", weights, value[:, :, :seen]))
    mixed: Tensor = torch.stack(rows, 1).flatten(2)
    return _project(layer.out.weight, mixed)


def _projections(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(layer, Fused):
        weight = layer.qkv.weight
        return weight[:HIDDEN], weight[HIDDEN : 2 * HIDDEN], weight[2 * HIDDEN :]
    return layer.query.weight, layer.key.weight, layer.value.weight


def _project(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.einsum("oi,bti->bto", weight, x)
    return product if bias is None else product + bias


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * n] to [B, heads, T, n]."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def _by_pairs(length: int, entry: Callable[[int, int], Tensor]) -> Tensor:
    """[..., T, T] from what `entry(t, j)` says of each pair, [...]."""
    return torch.stack([torch.stack([entry(t, j) for j in range(length)], -1) for t in range(length)], -2)


def _from_past(length: int, entry: Callable[[int, int], Tensor]) -> Tensor:
    """As `_by_pairs`, zero for j > t."""
    nothing = torch.zeros_like(entry(0, 0))
    return _by_pairs(length, lambda t, j: entry(t, j) if j <= t else nothing)


def plain(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No position."""
    return query, key, query.new_zeros(())


def _turned(x: Tensor, angles: Tensor, pairs: Pairs) -> Tensor:
    """x [..., T, D] by exp(sum of angles [..., T, planes] times the planes' generators)."""
    size = x.shape[-1]
    generators = x.new_zeros(len(pairs), size, size)
    for plane, (first, second) in enumerate(pairs):
        generators[plane, second, first], generators[plane, first, second] = 1.0, -1.0
    matrices = torch.linalg.matrix_exp(torch.einsum("...p,pij->...ij", angles, generators))
    turned: Tensor = matrices @ x.unsqueeze(-1)
    return turned.squeeze(-1)


def _rope_angles(length: int) -> Tensor:
    spectrum = [BASE ** (-2 * j / HEAD_DIM) for j in range(HEAD_DIM // 2)]
    return torch.tensor([[t * theta for theta in spectrum] for t in range(length)], dtype=torch.float64)


def with_rope(formula: Formula) -> Formula:
    """The bias of `formula` and RoPE over halves."""

    def both(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angles = _rope_angles(x.shape[1]).to(query.dtype)
        _, _, bias = formula(layer, x, query, key)
        return _turned(query, angles, HALVES), _turned(key, angles, HALVES), bias

    return both


def forgetting(*, inclusive: bool = True) -> Formula:
    """The product of the forget gates f between key and query, as a sum of logarithms."""
    offset = 1 if inclusive else 0

    def formula(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        forget = torch.sigmoid(_project(layer.forget.weight, x, layer.forget.bias)).mT
        bias = _from_past(x.shape[1], lambda t, j: forget[..., j + offset : t + offset].log().sum(-1))
        return query, key, bias

    return formula


def gated(*, query: bool, key: bool, norm: str = "none", unit: bool = False) -> Formula:
    """(j - t) w_h (lam_q[t] + lam_k[j]); `norm`: the gates stand "before" the norm of q and k, or "after" it."""

    def formula(layer: Any, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, plain = layer.gate, (q, k)
        if norm != "none":
            q, k = _rms(q, 1e-6), _rms(k, 1e-6)
        source = (q, k) if norm == "after" else plain
        if norm == "before":
            q, k = q * layer.query_norm.weight, k * layer.key_norm.weight
        lam_q = _gate(gate.v, source[0], unit) if query else 0.0 * q[..., 0]
        lam_k = _gate(gate.u, source[1], unit) if key else 0.0 * k[..., 0]
        slopes = _alibi(x) * torch.log1p(gate.omega.exp())
        bias = _by_pairs(x.shape[1], lambda t, j: slopes * (j - t) * (lam_q[..., t] + lam_k[..., j]))
        return q, k, bias

    return formula


def _gate(direction: Tensor, x: Tensor, unit: bool) -> Tensor:
    if unit:
        direction = direction / direction.square().sum(-1, keepdim=True).sqrt()
    product = torch.stack([x[:, h] @ direction[h] for h in range(HEADS)], 1)
    return torch.log1p((product / math.sqrt(HEAD_DIM)).exp())


def _rms(x: Tensor, eps: float) -> Tensor:
    mean_square = x.square().sum(-1, keepdim=True) / x.shape[-1]
    return x / (mean_square + eps).sqrt()


def _alibi(x: Tensor) -> Tensor:
    return torch.tensor([2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)], dtype=x.dtype)


def phase_bias(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One phase for all heads: minus theta times the rates after j up to t."""
    rate = torch.log1p(_project(layer.rate.weight, x, layer.rate.bias).exp()).mT
    theta = torch.log1p(layer.theta.exp())
    bias = _from_past(x.shape[1], lambda t, j: -theta * rate[..., j + 1 : t + 1].sum(-1))
    return query, key, bias


def phase_bias_per_head(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A phase per head: minus theta times the rates after j up to t."""
    rate = (_project(layer.rate.weight, x, layer.rate.bias) / 4).exp().mT
    theta = layer.log_theta.exp()
    bias = _from_past(x.shape[1], lambda t, j: -theta * rate[..., j + 1 : t + 1].sum(-1))
    return query, key, bias


def contextual(pairs: Pairs) -> Formula:
    """RoPE whose position is the sum of the rates before t."""

    def formula(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rate = torch.sigmoid(_project(layer.rate.weight, x, layer.rate.bias) / 16).mT
        phase = torch.stack([rate[..., :t].sum(-1) for t in range(x.shape[1])], -1)
        spectrum = [BASE ** (-2 * j / HEAD_DIM) for j in range(HEAD_DIM // 2)]
        angles = torch.stack([phase * theta for theta in spectrum], -1)
        return _turned(query, angles, pairs), _turned(key, angles, pairs), query.new_zeros(())

    return formula


def learned_spectrum(pairs: Pairs, basis: Callable[[Any], Tensor] | None = None) -> Formula:
    """theta = exp(log_theta / 16), for all heads or for each, after a change of basis x -> x E."""

    def formula(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta = (layer.log_theta / 16).exp().reshape(-1, HEAD_DIM // 2)
        angles = torch.stack([t * theta for t in range(x.shape[1])], 1)
        if basis is not None:
            query, key = query @ basis(layer), key @ basis(layer)
        return _turned(query, angles, pairs), _turned(key, angles, pairs), query.new_zeros(())

    return formula


def linear_basis(layer: Any) -> Tensor:
    """E of a linear layer, which multiplies by its transposed weight."""
    weight: Tensor = layer.basis.weight
    return weight.mT


def cayley_basis(layer: Any) -> Tensor:
    """(I - A)^-1 (I + A) for each head."""
    skew = layer.generator - layer.generator.mT
    eye = torch.eye(HEAD_DIM, dtype=skew.dtype)
    basis: Tensor = torch.linalg.inv(eye - skew) @ (eye + skew)
    return basis


def path(pairs: Pairs, *, normalised: str = "keys", eps: float = 1e-6) -> Formula:
    """The sum of the edges psi(t, l) after j up to t, each a log sigmoid of its own product."""

    def formula(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, length = _split(_project(layer.path.weight, x), HEADS), x.shape[1]
        turns = torch.arange(length, dtype=x.dtype)[:, None].expand(-1, len(pairs))
        edge = _turned(_rms(p, eps), turns, pairs)
        start = _rms(p, eps) if normalised == "both" else p
        slopes = _alibi(x)

        def psi(t: int, source: int) -> Tensor:
            product = (start[:, :, t] * edge[:, :, source]).sum(-1) / p.shape[-1]
            return -slopes * torch.log1p((-product).exp())

        edges = _from_past(length, psi)
        return query, key, _from_past(length, lambda t, j: edges[..., t, j + 1 : t + 1].sum(-1))

    return formula


PATH_HALVES: Pairs = tuple((j, j + 4) for j in range(4))
PATH_NEIGHBOURS: Pairs = tuple((2 * j, 2 * j + 1) for j in range(4))


def linear(scale: float = 1.0, *, both_ways: bool = False, norm: bool = False) -> Formula:
    """ALiBi with its slopes times `scale`."""

    def formula(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slopes = _alibi(x) * scale
        if norm:
            query = _rms(query, 1e-6) * layer.query_norm.weight
            key = _rms(key, 1e-6) * layer.key_norm.weight
        bias = _by_pairs(x.shape[1], lambda t, j: slopes * (-abs(j - t) if both_ways else j - t))
        return query, key, bias

    return formula


def two_slopes_on_a_grid(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two slopes for columns and rows of a grid seven wide."""

    def entry(t: int, j: int) -> Tensor:
        across: Tensor = layer.slope_x * (j % 7 - t % 7)
        down: Tensor = layer.slope_y * (j // 7 - t // 7)
        return across + down

    return query, key, _by_pairs(x.shape[1], entry)


def two_slopes_of_places(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two slopes for the two coordinates: ALiBi's, and ALiBi's in the opposite order of heads."""
    slopes, at = _alibi(x), layer.places

    def entry(t: int, j: int) -> Tensor:
        across: Tensor = slopes * (at[j, 0] - at[t, 0])
        down: Tensor = slopes.flip(0) * (at[j, 1] - at[t, 1])
        return across + down

    return query, key, _by_pairs(x.shape[1], entry)


def euclidean(layer: Any, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the slope times the distance of two places."""
    slopes, at = _alibi(x), layer.places.tolist()
    return query, key, _by_pairs(x.shape[1], lambda t, j: -slopes * math.dist(at[t], at[j]))
