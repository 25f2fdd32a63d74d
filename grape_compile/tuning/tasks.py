"""Finds what of a model, or of a layer with an encoding, there is to tune."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Clock,
    Compose,
    Encoding,
    Learned,
    Multiplicative,
    Nope,
    PathBias,
    Positions,
    Rotation,
    Table,
    Tables,
    parse,
)
from grape_compile.errors import CaptureError, GrapeError, ModelError, first_line
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.operands import Operand, Slots
from grape_compile.kernels.tensorir.rotation import supports
from grape_compile.kernels.tunable import Shape
from grape_compile.operators.operands import slot_names
from grape_compile.passes.capture import capture_export
from grape_compile.passes.graph import op_name
from grape_compile.passes.pipeline import rewrite_program
from grape_compile.passes.sizes import Sizes
from grape_compile.tuning.workloads import (
    Workload,
    attention_workload,
    distinct,
    linear_workload,
    rotation_workload,
)

_ATTEND: Final = (
    "query", "key", "value", "slots", "encoding", "mask", "is_causal", "scale", "window", "cap", "sinks", "segments",
)  # fmt: skip
_FUSED: Final = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Found:
    """What there is to tune, each thing once, and sentences about what TensorIR has no function for."""

    workloads: tuple[Workload, ...]
    left_out: tuple[str, ...]


def found_in(
    model_or_encoding: nn.Module | ExportedProgram | Encoding,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    target: engine.Target,
) -> Found:
    """Find what there is to tune of a model on its arguments, or of an encoding in layers of the shapes `args`.

    Raises GrapeError where there is nothing.
    """
    found = (
        of_encoding(model_or_encoding, args, target)
        if isinstance(model_or_encoding, Encoding)
        else of_model(model_or_encoding, args, kwargs, target)
    )
    if not found.workloads:
        raise GrapeError(
            "tune",
            "; ".join(found.left_out)
            or "no position encoding that was rewritten, and no product with weights",
            "a model in which grape_compile.inspect finds a rotation or a bias",
        )
    return found


def of_model(
    model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any], target: engine.Target
) -> Found:
    """Find the distinct operators of a model, at the sizes that it has on these arguments.

    Raises ModelError for something else than a model, CaptureError for one that torch.export refuses.
    """
    program = capture_export(_exported(model, args, kwargs), args, dict(kwargs))
    rewrite_program(program)
    found: list[Workload] = []
    left_out: list[str] = []
    for node in program.graph.nodes:
        try:
            found += _of_node(node, target)
        except GrapeError as failure:
            left_out.append(f"{node.args[-1] if node.args else node}: {failure.found}, so it is not tuned")
    return Found(tuple(distinct(found)), tuple(dict.fromkeys(left_out)))


def of_encoding(encoding: Encoding, shapes: Sequence[Shape], target: engine.Target) -> Found:
    """Find the functions of causal attention layers of these shapes with an encoding."""
    found: list[Workload] = []
    left_out: list[str] = []
    for shape in shapes:
        try:
            found += _of_layer(encoding, shape, target)
        except GrapeError as failure:
            left_out.append(f"{encoding}: {failure.found}, so it is not tuned")
    return Found(tuple(distinct(found)), tuple(dict.fromkeys(left_out)))


def _exported(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(
            "tune", f"a {type(model).__name__}", "a torch.nn.Module, an ExportedProgram or an Encoding"
        )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    except Exception as failure:
        raise CaptureError(
            f"export {type(model).__name__} with torch.export",
            first_line(failure),
            "arguments the model's forward accepts, and a forward without decisions on values",
        ) from failure


def _of_node(node: fx.Node, target: engine.Target) -> Iterator[Workload]:
    name = op_name(node) if node.op == "call_function" else ""
    if name == "grape::rotate":
        tensors, slots, text = node.args
        encoding = parse(str(text))
        named = _slots(encoding, slots)
        for tensor in tensors:  # type: ignore[union-attr]  # a list of nodes, says the schema
            yield _turned(encoding, _operand(tensor), named, target)
    elif name == "grape::attend":
        given = dict(zip(_ATTEND, node.args, strict=False)) | dict(node.kwargs)
        encoding = parse(str(given["encoding"]))
        if given.get("segments") is not None:
            raise GrapeError(str(encoding), "segments of several sequences in one", "one sequence")
        yield from _attended(encoding, given, _slots(encoding, given["slots"]), target)
    elif name == "aten::scaled_dot_product_attention":
        given = dict(zip(_FUSED, node.args, strict=False)) | dict(node.kwargs)
        given["mask"] = given.get("attn_mask")
        query, key = (_operand(given[each]) for each in ("query", "key"))
        # Its causal mask is about the first keys, that of `grape::attend` about the last.
        if len(query.shape) == 4 and not (given.get("is_causal") and query.shape[2] != key.shape[2]):
            yield from _attended(Nope(), given, {}, target)
    elif name == "aten::linear":
        yield from _multiplied(node, target)


def _multiplied(node: fx.Node, target: engine.Target) -> Iterator[Workload]:
    """Yield the product of a layer where it is a function of TensorIR: on a CPU, in at most float32."""
    given = dict(zip(("x", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    x, weight = (_operand(given[name]) for name in ("x", "weight"))
    bias = None if given.get("bias") is None else _operand(given["bias"])
    if engine.is_gpu(target) or x.dtype not in ("float16", "float32") or len(weight.shape) != 2:
        return
    rows = math.prod(int(size) for size in x.shape[:-1])
    yield linear_workload(Operand((rows, x.shape[-1]), x.dtype), weight, bias, target)


def _attended(
    encoding: Encoding, given: Mapping[str, Any], slots: Slots, target: engine.Target
) -> Iterator[Workload]:
    query, key, value = (_operand(given[name]) for name in ("query", "key", "value"))
    turns, biases = _apart(encoding)
    if turns and query.shape[2] != key.shape[2]:
        raise GrapeError(str(encoding), "rotations by slots of more tokens than there are queries", "as many")
    for turn in turns:
        for operand in (query, key):
            yield _turned(turn, operand, slots, target)
    mask, sinks = (None if given.get(name) is None else _operand(given[name]) for name in ("mask", "sinks"))
    numbers = {name: given.get(name) for name in ("scale", "window", "cap")}
    causal = bool(given.get("is_causal", False))
    attention = Attention(
        biases, query, key, value, slots=slots, mask=mask, sinks=sinks, is_causal=causal, **numbers
    )
    yield attention_workload(attention, target)


def _turned(encoding: Encoding, operand: Operand, slots: Slots, target: engine.Target) -> Workload:
    why = supports(encoding)
    if why is not True or not isinstance(encoding, Rotation):
        raise GrapeError(f"{encoding} in TensorIR", str(why), "a rotation of commuting planes")
    return rotation_workload(encoding, operand, slots, target)


def _apart(encoding: Encoding) -> tuple[list[Encoding], Encoding]:
    """Return the rotations of an encoding, and what it adds to the logits."""
    parts = list(encoding.parts) if isinstance(encoding, Compose) else [encoding]
    biases = tuple(each for each in parts if isinstance(each, Bias | PathBias))
    turns: list[Encoding] = [
        each for each in parts if isinstance(each, Multiplicative) and not isinstance(each, Nope)
    ]
    return turns, Nope() if not biases else biases[0] if len(biases) == 1 else Compose(biases)


def _slots(encoding: Encoding, nodes: Any) -> dict[str, Operand]:
    return {name: _operand(node) for name, node in zip(slot_names(encoding), nodes, strict=True)}


def _operand(node: Any) -> Operand:
    return Operand(Sizes().shape(node), str(node.meta["val"].dtype).removeprefix("torch."))


def _of_layer(encoding: Encoding, shape: Shape, target: engine.Target) -> Iterator[Workload]:
    """Yield the functions of one causal layer; slots have the fewest axes that their meaning allows."""
    dtype = str(shape.dtype).removeprefix("torch.")
    query, key = (
        Operand((shape.batch, heads, shape.tokens, shape.head_dim), dtype)
        for heads in (shape.heads, shape.key_heads)
    )
    turns, biases = _apart(encoding)
    parts = encoding.parts if isinstance(encoding, Compose) else (encoding,)
    slots = {name: operand for part in parts for name, operand in _slots_of(part, shape)}
    for turn in turns:
        for operand in (query, key):
            yield _turned(turn, operand, slots, target)
    if not turns or not isinstance(biases, Nope):
        yield attention_workload(Attention(biases, query, key, key, slots=slots, is_causal=True), target)


def _slots_of(part: Encoding, shape: Shape) -> Iterator[tuple[str, Operand]]:
    tokens = Operand((shape.batch, shape.heads, shape.tokens))
    if isinstance(part, Rotation):
        axes, planes = part.planes.axis_count, part.planes.count
        yield from _clock_of(part.clock, Operand((shape.batch, 1, shape.tokens)), (axes,) if axes > 1 else ())
        if isinstance(part.clock, Tables):
            yield from ((name, Operand((shape.tokens, planes))) for name in (part.clock.cos, part.clock.sin))
        if isinstance(part.spectrum, Learned | Table):
            yield part.spectrum.slot, Operand((planes,))
    elif isinstance(part, Bias):
        yield from _clock_of(part.clock, tokens, ())
        if isinstance(part.slopes, Learned | Table):
            yield part.slopes.slot, Operand((shape.heads,))
        for name in () if part.gate is None else (part.gate.query, part.gate.key):
            if name is not None:
                yield name, tokens
    elif isinstance(part, PathBias):
        yield from ((name, Operand((*tokens.shape, part.dim))) for name in (part.query, part.key))


def _clock_of(clock: Clock, rates: Operand, axes: tuple[int, ...]) -> Iterator[tuple[str, Operand]]:
    if isinstance(clock, Positions):
        yield clock.slot, Operand((*axes, rates.shape[-1]), "int64")
    elif isinstance(clock, Accumulated):
        yield clock.slot, rates
