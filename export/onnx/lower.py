"""Replace the private nodes of a translated graph by what the target has for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from grape_compile.encoding import Nope, parse
from grape_compile.errors import GrapeError
from grape_compile.export.onnx.builder import BOOL, MICROSOFT, Builder, sizes
from grape_compile.export.onnx.emit_attention import attend
from grape_compile.export.onnx.emit_experts import grouped_product
from grape_compile.export.onnx.emit_operators import Call
from grape_compile.export.onnx.emit_rotation import Emitted, rotate
from grape_compile.export.onnx.targets import Target
from grape_compile.export.onnx.translate import ATTEND, FUSED, GROUPED, PRIVATE, ROTATE


@dataclass(frozen=True)
class Lowered:
    """One place of the model: its encoding as text, the module, and what computes it in the file."""

    encoding: str
    module: str
    how: str


def lower(model: ir.Model, target: Target) -> list[Lowered]:
    """Replace every private node of the graph, in place, and return what became of each."""
    found: list[Lowered] = []
    if target.microsoft:
        model.graph.opset_imports[MICROSOFT] = 1
    for node in list(model.graph):
        if node.domain != PRIVATE:
            continue
        builder = Builder(model.graph, node)
        if node.op_type == GROUPED:
            _take_place(builder, node.outputs[0], grouped_product(builder, *map(_present, node.inputs)))
            model.graph.remove(node, safe=True)
            continue
        emitted, encoding = _emitted(builder, node, target)
        results = list(node.outputs)[: len(emitted.values)]
        for old, new in zip(results, emitted.values, strict=True):
            _take_place(builder, old, new)
        module = str(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        found.append(Lowered(encoding, _innermost(module), emitted.how))
        model.graph.remove(node, safe=True)
    return found


def _take_place(builder: Builder, old: ir.Value, new: ir.Value) -> None:
    """Let everything that read the old value read the new one; an output of the graph keeps its name."""
    if old.is_graph_output():
        new = builder.op("Identity", new, shape=sizes(old))
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if old.name is not None and new.is_graph_output():
        name, old.name = old.name, f"{old.name}_replaced"
        new.name = name
    if new.shape is None or any(size is None for size in sizes(new)):
        new.shape = old.shape


def _innermost(scopes: str) -> str:
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    named = [name for name in names if name]
    # The last scope is the operator itself.
    return named[-2] if len(named) > 1 else ""


def _emitted(builder: Builder, node: ir.Node, target: Target) -> tuple[Emitted, str]:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    text = str(attributes.get("encoding", Nope()))
    encoding = parse(text)
    inputs = list(node.inputs)
    if node.op_type == ROTATE:
        tensors = [_present(value) for value in inputs[: attributes["tensors"]]]
        given = map(_present, inputs[attributes["tensors"] :])
        slots = dict(zip(encoding.slots, given, strict=True))
        return rotate(builder, tensors, encoding, slots, target), text
    query, key, value = map(_present, inputs[:3])
    mask, sinks, segments = (inputs[at] if len(inputs) > at else None for at in (3, 4, 5))
    call = Call(
        query,
        key,
        value,
        encoding,
        dict(zip(encoding.slots, map(_present, inputs[6:]), strict=True)),
        mask,
        bool(attributes["is_causal"]),
        attributes.get("scale"),
        attributes.get("window"),
        attributes.get("cap"),
        sinks,
        segments,
    )
    if node.op_type == ATTEND:
        return attend(builder, call, target), text
    assert node.op_type == FUSED
    return attend(builder, _from_the_first_key(builder, call), target), "attention"


def _from_the_first_key(builder: Builder, call: Call) -> Call:
    """torch's own attention counts causality from the first key; a call counts from the last."""
    if not call.is_causal or sizes(call.query)[2] == sizes(call.key)[2]:
        return call
    rows = builder.unsqueeze(builder.ladder(0, builder.size(call.query, 2)), 1)
    keys = builder.unsqueeze(builder.ladder(0, builder.size(call.key, 2)), 0)
    shape = (sizes(call.query)[2], sizes(call.key)[2])
    visible = builder.op("LessOrEqual", keys, rows, dtype=BOOL, shape=shape)
    return replace(call, mask=visible, is_causal=False)


def _present(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise GrapeError("lower a node", "an operand is missing", "a graph that torch.onnx made")
    return value
