"""How operators are written in plain ATen where TVM's importer has no equal of them, or one that rounds more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from grape_compile.encoding import nope
from grape_compile.operators import attend_decomposition, rotate_decomposition

aten = torch.ops.aten
_NARROW = (torch.float16, torch.bfloat16)


def decompositions(keeps: Callable[..., bool]) -> dict[Any, Callable[..., Any]]:
    """Return the table for `ExportedProgram.run_decompositions`; operators of ours for which `keeps` holds stay."""

    def rotate(tensors: Sequence[Tensor], slots: Sequence[Tensor], encoding: str) -> Any:
        if keeps(torch.ops.grape.rotate.default, tensors, slots, encoding):
            return NotImplemented
        return rotate_decomposition(tensors, slots, encoding)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, slots: Sequence[Tensor], encoding: str, *options: Any
    ) -> Any:
        if keeps(torch.ops.grape.attend.default, query, key, value, slots, encoding, *options):
            return NotImplemented
        return attend_decomposition(query, key, value, list(slots), encoding, *options)

    return {
        torch.ops.grape.rotate.default: rotate,
        torch.ops.grape.attend.default: attend,
        aten.scaled_dot_product_attention.default: _fused,
        aten.repeat.default: _repeat,
        aten._softmax.default: _softmax,
        aten.native_layer_norm.default: _layer_norm,
        aten.mean.dim: _mean,
        aten.sum.dim_IntList: _sum,
    }


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of torch is attention without a position; its causal mask is about the first keys, ours the last."""
    del dropout_p, enable_gqa  # nothing is dropped where nothing is trained, and the shapes tell of groups
    if query.dim() != 4 or (is_causal and not statically_known_true(query.shape[2] == key.shape[2])):
        return NotImplemented
    attend = torch.ops.grape.attend.default
    return attend(query, key, value, [], str(nope()), attn_mask, is_causal, scale)[0]


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeat by views: TVM's importer takes no repeats that are sizes of an input."""
    sizes = [1] * (len(repeats) - x.dim()) + list(x.shape)
    split = [part for size in sizes for part in (1, size)]
    wide = [part for times, size in zip(repeats, sizes, strict=True) for part in (times, size)]
    return (
        x.reshape(split)
        .expand(wide)
        .reshape([times * size for times, size in zip(repeats, sizes, strict=True)])
    )


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    if x.dtype not in _NARROW:
        return NotImplemented
    wide = torch.softmax(x.float(), dim)
    return wide if half_to_float else wide.to(x.dtype)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    if x.dtype not in _NARROW:
        return NotImplemented
    parts = [None if each is None else each.float() for each in (weight, bias)]
    found, mean, deviation = aten.native_layer_norm.default(x.float(), shape, *parts, eps)
    return found.to(x.dtype), mean, deviation


def _mean(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if x.dtype not in _NARROW:
        return NotImplemented
    return aten.mean.dim(x.float(), dim, keepdim).to(dtype or x.dtype)


def _sum(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if x.dtype not in _NARROW:
        return NotImplemented
    return aten.sum.dim_IntList(x.float(), dim, keepdim).to(dtype or x.dtype)
