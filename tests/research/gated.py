"""GRAPE-A-Q, -K, -QK: b[t, j] = (j - t) w_h (lam_q[t] + lam_k[j]), w_h = slope_h softplus(omega_h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.parts import HEAD_DIM, HEADS, Fused, Separate, alibi_slopes, future, root_mean_square

#: softplus of this is one: the slopes start as those of ALiBi.
UNIT = math.log(math.e - 1)


class GateVectors(nn.Module):
    """The trained part: omega [H], v and u [H, D] (v for queries, u for keys)."""

    slopes: Tensor
    v: nn.Parameter
    u: nn.Parameter

    def __init__(self, *, query: bool = True, key: bool = True) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes())
        self.omega = nn.Parameter(torch.full((HEADS,), UNIT))
        if query:
            self.v = nn.Parameter(torch.randn(HEADS, HEAD_DIM))
        if key:
            self.u = nn.Parameter(torch.randn(HEADS, HEAD_DIM))

    def weights(self) -> Tensor:
        return self.slopes * F.softplus(self.omega)


class GateQuery(Fused):
    """The gate of the query alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors(key=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps.view(1, -1) - steps.view(-1, 1)).to(x.dtype)
        gate = F.softplus((query * self.gate.v[:, None, :]).sum(-1) / math.sqrt(HEAD_DIM))
        bias = distance * self.gate.weights().view(1, -1, 1, 1) * gate.unsqueeze(-1)
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class GateQueryFloatMask(Fused):
    """The gate of the query alone, through the fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors(key=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        positions = torch.arange(x.shape[1], device=x.device)
        gate = F.softplus(torch.einsum("bhtd,hd->bht", query, self.gate.v) * HEAD_DIM**-0.5)
        slope = self.gate.weights()[None, :, None] * gate
        bias = slope[..., None] * (positions[None, :] - positions[:, None])
        bias = bias.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype)))


class GateKey(Fused):
    """The gate of the key alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors(query=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        steps = torch.arange(x.shape[1], device=x.device)
        gate = F.softplus((key @ self.gate.u[:, :, None]).squeeze(-1) / math.sqrt(HEAD_DIM))
        behind = steps[:, None] - steps[None, :]
        scores = query @ key.mT / math.sqrt(HEAD_DIM)
        scores = scores - behind * (self.gate.weights()[:, None] * gate)[:, :, None, :]
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class GateKeyHeadsLast(Separate):
    """The gate of the key alone, heads behind tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors(query=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads_last(x)
        positions = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        gate = F.softplus((key * self.gate.u).sum(-1) / HEAD_DIM**0.5) * self.gate.weights()
        bias = torch.einsum("tj,bjh->bhtj", positions[None] - positions[:, None], gate)
        scores = torch.einsum("bthd,bjhd->bhtj", query, key) * HEAD_DIM**-0.5 + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        out: Tensor = self.out(torch.einsum("bhtj,bjhd->bthd", scores.softmax(-1), value).flatten(2))
        return out


class GateBoth(Fused):
    """Both gates, read off plain queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        positions = torch.arange(x.shape[1], device=x.device)
        lam_q = F.softplus(torch.einsum("bhtd,hd->bht", query, self.gate.v) / math.sqrt(HEAD_DIM))
        lam_k = F.softplus(torch.einsum("bhjd,hd->bhj", key, self.gate.u) / math.sqrt(HEAD_DIM))
        gate = lam_q[..., :, None] + lam_k[..., None, :]
        bias = (positions[None] - positions[:, None]) * self.gate.weights()[:, None, None] * gate
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class GateBothBeforeNorm(Fused):
    """Scores from normalised queries and keys, gates from what stands before."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors()
        self.query_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.key_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        lam_q = F.softplus((query * self.gate.v.view(1, HEADS, 1, HEAD_DIM)).sum(-1) / math.sqrt(HEAD_DIM))
        lam_k = F.softplus((key * self.gate.u.view(1, HEADS, 1, HEAD_DIM)).sum(-1) / math.sqrt(HEAD_DIM))
        query, key = self.query_norm(query), self.key_norm(key)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[None, :] - steps[:, None]).to(query.dtype)
        slopes = self.gate.weights().view(1, HEADS, 1, 1)
        bias = slopes * distance * lam_q.unsqueeze(-1) + slopes * distance * lam_k.unsqueeze(-2)
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class GateBothAfterNorm(Fused):
    """Scores and gates from normalised queries and keys; normalised without a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        query, key = root_mean_square(query), root_mean_square(key)
        lam_q = F.softplus(torch.einsum("bhtd,hd->bht", query, self.gate.v) / math.sqrt(HEAD_DIM))
        lam_k = F.softplus(torch.einsum("bhtd,hd->bht", key, self.gate.u) / math.sqrt(HEAD_DIM))
        positions = torch.arange(x.shape[1], device=x.device)
        behind = (positions.unsqueeze(1) - positions.unsqueeze(0)).clamp(min=0)
        bias = -behind * self.gate.weights().view(-1, 1, 1) * (lam_q.unsqueeze(3) + lam_k.unsqueeze(2))
        bias = bias.to(query.dtype).masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))


class GateBothUnit(Separate):
    """Directions of length one, heads behind tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateVectors()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads_last(x)
        v, u = F.normalize(self.gate.v, dim=-1), F.normalize(self.gate.u, dim=-1)
        lam_q = F.softplus(torch.einsum("bthd,hd->bth", query, v) * HEAD_DIM**-0.5)
        lam_k = F.softplus(torch.einsum("bthd,hd->bth", key, u) * HEAD_DIM**-0.5)
        positions = torch.arange(x.shape[1], device=x.device)
        offset = (positions[None, :] - positions[:, None]).to(x.dtype)
        gate = (lam_q[:, :, None] + lam_k[:, None]) * self.gate.weights()
        bias = (offset[..., None] * gate).permute(0, 3, 1, 2)
        scores = torch.einsum("bthd,bjhd->bhtj", query, key) * HEAD_DIM**-0.5 + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        out: Tensor = self.out(torch.einsum("bhtj,bjhd->bthd", scores.softmax(-1), value).flatten(2))
        return out
