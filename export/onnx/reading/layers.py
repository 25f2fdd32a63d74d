"""Readers of operators that are layers of a model: norms, attention, rotations an exporter has fused already."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_compile.export.onnx.reading.call import Call, Untranslated, Value, reads, tensor


@reads("LayerNormalization")
def layer_norm(call: Call, value: Value, scale: Value, shift: Value | None = None) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon), scaled and shifted."""
    operand = tensor(value)
    sizes = list(operand.shape)[call.integer("axis", -1) % operand.dim() :]
    if call.results > 1:
        raise Untranslated("the statistics of a norm")
    return F.layer_norm(
        operand,
        sizes,
        tensor(scale),
        None if shift is None else tensor(shift),
        call.real("epsilon", 1e-5),
    )


@reads("RMSNormalization")
@reads("SimplifiedLayerNormalization")
def rms_norm(call: Call, value: Value, scale: Value) -> Tensor:
    """x / sqrt(mean of squares + epsilon), scaled."""
    operand = tensor(value)
    if call.results > 1:
        raise Untranslated("the statistics of a norm")
    sizes = list(operand.shape)[call.integer("axis", -1) % operand.dim() :]
    return F.rms_norm(operand, sizes, tensor(scale), call.real("epsilon", 1e-5))


@reads("RotaryEmbedding")
def rotary(call: Call, value: Value, cos: Value, sin: Value, places: Value | None = None) -> Tensor:
    """What the operator of opset 23 is defined to do, by its parts.

    y1 = x1 cos - x2 sin, y2 = x1 sin + x2 cos over the first `rotary_embedding_dim` channels.
    """
    operand, tables = tensor(value), [tensor(cos), tensor(sin)]
    if operand.dim() != 4:
        raise Untranslated("heads side by side")
    if places is not None:
        index = tensor(places).long()
        tables = [F.embedding(index, table) for table in tables]
    width = call.integer("rotary_embedding_dim", 0) or operand.shape[-1]
    turned, rest = operand[..., :width], operand[..., width:]
    first_cos, first_sin = (table[..., : width // 2].unsqueeze(1) for table in tables)
    if call.integer("interleaved", 0):
        one, other = turned[..., 0::2], turned[..., 1::2]
    else:
        one, other = turned[..., : width // 2], turned[..., width // 2 :]
    real, imag = one * first_cos - other * first_sin, one * first_sin + other * first_cos
    if call.integer("interleaved", 0):
        result = torch.stack((real, imag), -1).flatten(-2)
    else:
        result = torch.cat((real, imag), -1)
    return result if width == operand.shape[-1] else torch.cat((result, rest), -1)


@reads("Attention")
def attention(
    call: Call, query: Value, key: Value, value: Value, mask: Value | None = None, *past: Value | None
) -> Tensor:
    """The operator of opset 23 without a cache, on four axes."""
    parts = [tensor(part) for part in (query, key, value)]
    if any(part is not None for part in past) or call.results > 1:
        raise Untranslated("an attention that keeps a cache or returns its scores")
    if any(part.dim() != 4 for part in parts) or call.real("softcap", 0.0):
        raise Untranslated("an attention with heads side by side, or with capped scores")
    scale = call.real("scale", 0.0) or 1.0 / math.sqrt(parts[0].shape[-1])
    groups = parts[0].shape[1] // parts[1].shape[1]
    if groups > 1:
        parts[1:] = [part.repeat_interleave(groups, 1) for part in parts[1:]]
    return F.scaled_dot_product_attention(
        parts[0],
        parts[1],
        parts[2],
        attn_mask=None if mask is None else tensor(mask),
        is_causal=bool(call.integer("is_causal", 0)),
        scale=scale,
    )
