"""Readers of operators that work element by element, of reductions and of products."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from grape_compile.export.onnx.reading.call import (
    Call,
    Numbers,
    Untranslated,
    Value,
    beside,
    integers_of,
    is_numbers,
    is_symbolic,
    reads,
    settled,
    tensor,
)


def _truncated(one: Any, other: Any) -> Any:
    """ONNX divides integers towards zero; sizes are never negative."""
    integers = one.dtype == object or np.issubdtype(one.dtype, np.integer)
    return one // other if integers else one / other


_ON_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _truncated,
    "Pow": operator.pow,
    "Mod": operator.mod,
    "Min": np.frompyfunc(torch.sym_min, 2, 1),
    "Max": np.frompyfunc(torch.sym_max, 2, 1),
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "And": operator.and_,
    "Or": operator.or_,
    "Xor": operator.xor,
}
_COMPARISONS = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor")


def _divided(one: Any, other: Any) -> Any:
    integers = isinstance(one, int | torch.SymInt) or (
        isinstance(one, Tensor) and not one.is_floating_point()
    )
    return torch.div(one, other, rounding_mode="trunc") if integers else one / other


def _extremum(pick: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def extremum(one: Any, other: Any) -> Tensor:
        like = one if isinstance(one, Tensor) else other
        both = (
            each if isinstance(each, Tensor) else torch.full((), each, dtype=like.dtype)
            for each in (one, other)
        )
        return pick(*both)

    return extremum


_ON_TENSORS: dict[str, Callable[[Any, Any], Any]] = {
    **_ON_NUMBERS,
    "Div": _divided,
    "Min": _extremum(torch.minimum),
    "Max": _extremum(torch.maximum),
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
}


@reads(*_ON_TENSORS)
def binary(call: Call, *operands: Value) -> Value:
    """Two operands; `Min` and `Max` take any number of them."""
    name = call.node.op_type
    if name == "Mod" and call.integer("fmod", 0):
        raise Untranslated("Mod with the sign of the dividend")
    result = operands[0]
    for other in operands[1:]:
        result = _pair(name, result, other)
    return result


def _pair(name: str, one: Value, other: Value) -> Value:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if name not in _ON_NUMBERS:
            raise Untranslated(f"{name} of numbers")
        kind = (
            np.bool_ if name in _COMPARISONS else object if object in (one.dtype, other.dtype) else one.dtype
        )
        found = np.asarray(_ON_NUMBERS[name](one, other))
        return settled(found.astype(kind))
    if isinstance(one, Tensor):
        first, second = one, beside(other, one)
    else:
        assert isinstance(other, Tensor)
        first, second = beside(one, other), other
    if name in ("And", "Or", "Xor"):
        first, second = tensor(one), tensor(other)
    result: Tensor = _ON_TENSORS[name](first, second)
    return result


def _relu_like(function: Callable[..., Tensor], **names: float) -> Callable[[Call, Tensor], Tensor]:
    def run(call: Call, value: Tensor) -> Tensor:
        return function(value, *(call.real(name, default) for name, default in names.items()))

    return run


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Neg": torch.neg,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Exp": torch.exp,
    "Log": torch.log,
    "Cos": torch.cos,
    "Sin": torch.sin,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Erf": torch.erf,
    "Abs": torch.abs,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "Relu": torch.relu,
    "Softplus": F.softplus,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Mish": F.mish,
}
_UNARY_ON_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "Neg": operator.neg,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Exp": np.exp,
    "Log": np.log,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Abs": np.abs,
    "Not": np.logical_not,
}


@reads(*_UNARY)
def unary(call: Call, value: Value) -> Value:
    """One operand."""
    name = call.node.op_type
    known = isinstance(value, np.ndarray) and (value.dtype != object or name == "Neg")
    if known and name in _UNARY_ON_NUMBERS:
        return np.asarray(_UNARY_ON_NUMBERS[name](value))
    return _UNARY[name](tensor(value))


@reads("Identity")
def identity(call: Call, value: Value) -> Value:
    """The operand itself."""
    return value


@reads("Dropout")
def dropout(call: Call, value: Value, ratio: Value | None = None, training: Value | None = None) -> Value:
    """Dropout that is off."""
    if training is not None and not (isinstance(training, np.ndarray) and not training.item()):
        raise Untranslated("a dropout that may be on")
    if call.results > 1:
        raise Untranslated("the mask of a dropout")
    return value


@reads("Gelu")
def gelu(call: Call, value: Tensor) -> Tensor:
    """Gelu, exact or by tanh."""
    return F.gelu(value, approximate=call.text("approximate", "none"))


_SLOPED = {
    "LeakyRelu": _relu_like(F.leaky_relu, alpha=0.01),
    "Elu": _relu_like(F.elu, alpha=1.0),
    "Selu": _relu_like(F.selu),
}


@reads("LeakyRelu", "Elu")
def sloped(call: Call, value: Tensor) -> Tensor:
    """Activations with a slope."""
    return _SLOPED[call.node.op_type](call, value)


@reads("Swish")
def swish(call: Call, value: Tensor) -> Tensor:
    """x times the sigmoid of alpha x."""
    alpha = call.real("alpha", 1.0)
    return value * torch.sigmoid(value if alpha == 1.0 else alpha * value)


@reads("Clip")
def clip(call: Call, value: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """Values held between two numbers."""
    value = tensor(value)
    bounds = [None if each is None else beside(each, value) for each in (low, high)]
    return value if bounds == [None, None] else torch.clamp(value, *bounds)


@reads("Softmax")
def softmax(call: Call, value: Value) -> Tensor:
    """Softmax along one axis."""
    return torch.softmax(tensor(value), call.integer("axis", -1))


@reads("LogSoftmax")
def log_softmax(call: Call, value: Value) -> Tensor:
    """Its logarithm."""
    return torch.log_softmax(tensor(value), call.integer("axis", -1))


def torch_dtype(kind: ir.DataType) -> torch.dtype:
    """The dtype of torch that is an element type of ONNX."""
    found = getattr(torch, str(kind.name).lower(), None) or _OTHER_NAMES.get(kind.name)
    if not isinstance(found, torch.dtype):
        raise Untranslated(f"elements of type {kind.name}")
    return found


_OTHER_NAMES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "DOUBLE": torch.float64,
    "BOOL": torch.bool,
    "BFLOAT16": torch.bfloat16,
}


@reads("Cast")
def cast(call: Call, value: Value) -> Value:
    """Elements of another type."""
    return _cast(value, ir.DataType(call.integer("to", 1)))


@reads("CastLike")
def cast_like(call: Call, value: Value, like: Value) -> Value:
    """Elements of another value's type."""
    if isinstance(like, np.ndarray):
        return _cast(value, ir.DataType.INT64 if like.dtype == object else ir.DataType.from_numpy(like.dtype))
    return tensor(value).to(like.dtype)


def _cast(value: Value, kind: ir.DataType) -> Value:
    if isinstance(value, Tensor):
        return value.to(torch_dtype(kind))
    if not is_symbolic(value) and kind is not ir.DataType.BFLOAT16:
        return value.astype(kind.numpy())
    if kind in (ir.DataType.INT64, ir.DataType.INT32):
        return value
    if value.size != 1 or value.ndim > 1:
        raise Untranslated("several sizes as real numbers")
    return torch.full(value.shape, value.reshape(()).item(), dtype=torch_dtype(kind))


@reads("Where")
def where(call: Call, condition: Value, one: Value, other: Value) -> Value:
    """The elements of one where the condition holds, of the other elsewhere."""
    if isinstance(condition, np.ndarray):
        if is_numbers(one, other):
            return settled(np.asarray(np.where(condition.astype(bool), one, other)))
        if condition.size == 1:
            raise Untranslated("a choice between two tensors")
    return torch.where(tensor(condition), tensor(one), tensor(other))


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda value, axes, keep: value.sum(axes, keepdim=keep),
    "ReduceMean": lambda value, axes, keep: value.mean(axes, keepdim=keep),
    "ReduceMax": lambda value, axes, keep: value.amax(axes, keepdim=keep),
    "ReduceMin": lambda value, axes, keep: value.amin(axes, keepdim=keep),
    "ReduceSumSquare": lambda value, axes, keep: value.square().sum(axes, keepdim=keep),
    "ReduceL2": lambda value, axes, keep: value.square().sum(axes, keepdim=keep).sqrt(),
}
_NUMBERS_REDUCED: dict[str, Callable[[Numbers], Any]] = {
    "ReduceSum": np.sum,
    "ReduceProd": np.prod,
    "ReduceMax": lambda value: _folded(torch.sym_max, value),
    "ReduceMin": lambda value: _folded(torch.sym_min, value),
}


def _folded(pick: Callable[[Any, Any], Any], value: Numbers) -> Any:
    items = value.reshape(-1).tolist()
    found = items[0]
    for item in items[1:]:
        found = pick(found, item)
    return found


@reads(*_REDUCTIONS, "ReduceProd")
def reduction(call: Call, value: Value, axes: Value | None = None) -> Value:
    """Sums, means and extrema along axes; along all of them where none is given."""
    name, keep = call.node.op_type, bool(call.integer("keepdims", 1))
    held = call.integers("axes") if axes is None else integers_of(axes)
    if not held and call.integer("noop_with_empty_axes", 0):
        return value
    if isinstance(value, np.ndarray) and name in _NUMBERS_REDUCED and value.ndim <= 1:
        found = np.asarray(_NUMBERS_REDUCED[name](value), dtype=value.dtype)
        return settled(found.reshape((1,) * value.ndim if keep else ()))
    if name not in _REDUCTIONS:
        raise Untranslated(name)
    operand = tensor(value)
    return _REDUCTIONS[name](operand, held or list(range(operand.dim())), keep)


@reads("ArgMax")
def argmax(call: Call, value: Value) -> Tensor:
    """Where the largest element is, the first of equals."""
    if call.integer("select_last_index", 0):
        raise Untranslated("the last of equal elements")
    return tensor(value).argmax(call.integer("axis", 0), keepdim=bool(call.integer("keepdims", 1)))


@reads("CumSum")
def cumsum(call: Call, value: Value, axis: Value) -> Tensor:
    """Running sums; exclusive ones and those from the end by their definition."""
    operand, along = tensor(value), int(integers_of(axis)[0])
    if call.integer("reverse", 0):
        total = operand.flip(along).cumsum(along, dtype=operand.dtype).flip(along)
    else:
        total = operand.cumsum(along, dtype=operand.dtype)
    return total - operand if call.integer("exclusive", 0) else total


@reads("MatMul")
def matmul(call: Call, one: Value, other: Value) -> Tensor:
    """The matrix product over the last two axes."""
    return torch.matmul(tensor(one), tensor(other))


@reads("Gemm")
def gemm(call: Call, one: Value, other: Value, added: Value | None = None) -> Tensor:
    """alpha A B + beta C, either matrix transposed."""
    first, second = tensor(one), tensor(other)
    first = first.t() if call.integer("transA", 0) else first
    second = second.t() if call.integer("transB", 0) else second
    product = first @ second
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    product = product if alpha == 1.0 else product * alpha
    if added is None:
        return product
    rest = beside(added, product)
    total: Tensor = product + (rest if beta == 1.0 else rest * beta)
    return total


@reads("Einsum")
def einsum(call: Call, *operands: Value) -> Tensor:
    """Einstein's sum."""
    product: Tensor = torch.einsum(call.text("equation", ""), *map(tensor, operands))
    return product
