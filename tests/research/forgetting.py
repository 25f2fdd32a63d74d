"""The Forgetting Transformer (FoX): b[t, j] = U[t] - U[j], U the running sum of log f over tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.parts import CONTEXT, HEAD_DIM, HEADS, HIDDEN, Fused, Rotary, Separate, future, rotary

INITIAL_BIAS = 2.0


def forget_gate() -> nn.Linear:
    """One gate per head, mostly open at the start."""
    gate = nn.Linear(HIDDEN, HEADS)
    nn.init.constant_(gate.bias, INITIAL_BIAS)
    return gate


class Gated(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.forget = forget_gate()


class GatedSeparate(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.forget = forget_gate()


class NanoGpt(Gated):
    """Explicit scores, the mask in a buffer, a dropout that never drops."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attn_dropout = nn.Dropout(0.0)
        self.register_buffer("mask", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(HIDDEN, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        log_f = F.logsigmoid(self.forget(x)).transpose(1, 2)
        U = torch.cumsum(log_f, dim=-1)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att + (U.unsqueeze(-1) - U.unsqueeze(-2))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        out: Tensor = self.out(y)
        return out


class FloatMask(Gated):
    """The bias and -inf in one float mask of the fused attention."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        log_f = F.logsigmoid(self.forget(x)).permute(0, 2, 1)
        total = log_f.cumsum(dim=-1)
        bias = total[:, :, :, None] - total[:, :, None, :]
        bias = bias.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))


class HeadsLast(GatedSeparate):
    """[B, T, H, D] throughout, summed over axis 1 as [B, T, H], contracted by name."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads_last(x)
        cumulative = F.logsigmoid(self.forget(x)).cumsum(1)
        decay = (
            torch.einsum("bth->bht", cumulative)[..., None] - torch.einsum("bjh->bhj", cumulative)[:, :, None]
        )
        scores = torch.einsum("bthd,bjhd->bhtj", query, key) / HEAD_DIM**0.5 + decay
        scores = torch.where(future(x.shape[1], x.device), torch.finfo(scores.dtype).min, scores)
        mixed = torch.einsum("bhtj,bjhd->bthd", scores.softmax(-1), value)
        out: Tensor = self.out(mixed.flatten(2))
        return out


class DifferenceOfLast(GatedSeparate):
    """The difference over [B, T, T, H], heads brought forward afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in self.heads_last(x))
        running = F.logsigmoid(self.forget(x)).cumsum(dim=-2)
        decay = (running.unsqueeze(2) - running.unsqueeze(1)).permute(0, 3, 1, 2)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        weights = (query @ key.mT * HEAD_DIM**-0.5 + decay + mask).softmax(-1)
        out: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return out


class Softplus(Gated):
    """log f = -softplus(-x), and the difference with its sign turned round."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        log_f = -F.softplus(-self.forget(x).transpose(1, 2))
        total = log_f.cumsum(-1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        scores = scores - (total[..., None, :] - total[..., :, None])
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class LogOfSigmoid(Gated):
    """log f written as it is defined."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        forget = torch.sigmoid(self.forget(x)).transpose(1, 2)
        total = torch.log(forget).cumsum(-1)
        bias = total.unsqueeze(-1) - total.unsqueeze(-2)
        scores = (query * HEAD_DIM**-0.5) @ key.mT + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), torch.finfo(scores.dtype).min)
        return self.merged(torch.softmax(scores, dim=-1) @ value)


class SummedInFloat32(Gated):
    """The sum in float32 whatever the model runs in, as careful code has it, and the softmax too."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        log_f = F.logsigmoid(self.forget(x).float()).transpose(1, 2)
        total = torch.cumsum(log_f, dim=-1, dtype=torch.float32)
        bias = (total[..., :, None] - total[..., None, :]).to(query.dtype)
        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(HEAD_DIM) + bias
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return self.merged(torch.matmul(weights, value))


class ByKeyAlone(Gated):
    """Minus U[j]: the softmax does not see what is constant in a row."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        total = F.logsigmoid(self.forget(x)).cumsum(1)
        scores = query @ key.mT / math.sqrt(HEAD_DIM) - total.transpose(1, 2)[:, :, None, :]
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class WithRope(Gated):
    """Queries and keys turn as well."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        cos, sin = self.rotary(x)
        query, key = rotary(query, cos, sin), rotary(key, cos, sin)
        total = F.logsigmoid(self.forget(x)).transpose(1, 2).cumsum(-1)
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + (total[..., None] - total[..., None, :])
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)


class ExclusiveByPad(Gated):
    """The sum over l < t, shifted in by a zero: edges l = j ... t-1, another model than the inclusive one."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        log_f = F.logsigmoid(self.forget(x)).transpose(1, 2)
        before = F.pad(log_f.cumsum(-1)[..., :-1], (1, 0))
        bias = (before[..., None] - before[..., None, :]).masked_fill(
            future(x.shape[1], x.device), float("-inf")
        )
        return self.merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))


class ExclusiveBySubtraction(Gated):
    """The sum over l < t as the sum over l <= t without its last term."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        log_f = F.logsigmoid(self.forget(x)).transpose(1, 2)
        before = log_f.cumsum(-1) - log_f
        scores = query @ key.mT / math.sqrt(HEAD_DIM) + before[..., None] - before[..., None, :]
        scores = scores.masked_fill(future(x.shape[1], x.device), float("-inf"))
        return self.merged(scores.softmax(-1) @ value)
