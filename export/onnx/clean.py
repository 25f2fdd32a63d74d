"""Clean-up of a graph before and after its private nodes are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer
from onnxscript.rewriter.rules.fusion import _rms_normalization as norms

from grape_compile.export.onnx.builder import FLOAT, Builder, Size, sizes
from grape_compile.export.onnx.reading.examples import axes_of, inputs_of
from grape_compile.export.onnx.targets import Target
from grape_compile.export.onnx.translate import ATTEND, FUSED, PRIVATE


def simplify(model: ir.Model) -> None:
    """Fold constants, compute equal values once, drop what nothing reads."""
    optimizer.optimize_ir(model, num_iterations=2)


def drop_unread(model: ir.Model) -> None:
    """Drop what nothing reads."""
    common.RemoveUnusedNodesPass()(model)


def read_sizes(graph: ir.Graph, nodes: Iterable[ir.Node | None]) -> None:
    """Let nodes that ask a value for one size ask the input that has it: what is made of it is made once."""
    given = {
        size: (value, axis)
        for value in reversed(inputs_of(graph))
        for axis, size in enumerate(axes_of(value))
    }
    for node in nodes:
        value = node.inputs[0] if node is not None and node.op_type == "Shape" else None
        if node is None or value is None or value.shape is None or "end" not in node.attributes:
            continue
        start, end = node.attributes["start"].as_int(), node.attributes["end"].as_int()
        size = sizes(value)[start]
        if end == start + 1 and isinstance(size, str) and size in given:
            source, axis = given[size]
            node.replace_input_with(0, source)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def share_heads(graph: ir.Graph) -> None:
    """Give attention the key heads there are, where the model repeats them for every query head.

    Recognised by shapes: [B, H, T, D] seen as [B, H, 1, T, D], broadcast to [B, H, G, T, D] and laid out as
    [B, H * G, T, D] holds head h of the keys at places h * G ... h * G + G - 1, as grouped attention reads them.
    """
    for node in list(graph):
        if node.domain != PRIVATE or node.op_type not in (ATTEND, FUSED):
            continue
        for place in range(3):
            source = _before_views(node.inputs[place])
            if source is not node.inputs[place]:
                node.replace_input_with(place, source)
        key, value = node.inputs[1], node.inputs[2]
        sources = [_unrepeated(part) for part in (key, value)]
        if sources[0] is None or sources[1] is None or sizes(sources[0])[1] != sizes(sources[1])[1]:
            continue
        for place, source in zip((1, 2), sources, strict=True):
            node.replace_input_with(place, source)


def _before_views(value: ir.Value | None) -> ir.Value | None:
    """The value of the same shape that `value` is another view of and back, such as by batch and heads in one axis."""
    own, found = value, value
    while own is not None and (node := own.producer()) is not None and node.op_type == "Reshape":
        own = node.inputs[0]
        if own is None or own.shape is None or value is None or value.shape is None:
            break
        if sizes(own) == sizes(value) and None not in sizes(own):
            found = own
    return found


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """The heads that `value` repeats, or None."""
    chain: list[ir.Value] = []
    while value is not None and value.shape is not None and len(chain) < 4:
        chain.append(value)
        node = value.producer()
        if node is None or node.op_type not in ("Reshape", "Expand", "Unsqueeze"):
            break
        value = node.inputs[0]
    shapes = [sizes(each) for each in chain]
    kinds = [node.op_type for each in chain[:3] if (node := each.producer()) is not None]
    if len(chain) < 4 or kinds != ["Reshape", "Expand", "Unsqueeze"]:
        return None
    flat, wide, single, source = shapes[:4]
    if len(flat) != 4 or len(wide) != 5 or len(single) != 5 or len(source) != 4:
        return None
    heads, groups = wide[1], wide[2]
    if not isinstance(heads, int) or not isinstance(groups, int) or flat[1] != heads * groups:
        return None
    if single[1:3] != (heads, 1) or source[1] != heads or source[3] != flat[3] or wide[4] != flat[3]:
        return None
    return chain[3]


def finish(model: ir.Model, target: Target) -> None:
    """Simplify once more, with the target's own normalization."""
    if target.fused:
        norms.fuse_rms_normalization(model)
        _widen_normalized(model.graph)
    simplify(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.TopologicalSortPass()(model)


def _widen_normalized(graph: ir.Graph) -> None:
    """Norms of numbers narrower than their weights take them as wide: ONNX Runtime has no kernel for two types."""
    for node in list(graph):
        if node.op_type != "RMSNormalization":
            continue
        value, scale = node.inputs[:2]
        if value is not None and scale is not None and scale.dtype == FLOAT != value.dtype:
            node.replace_input_with(0, Builder(graph, node).op("Cast", value, dtype=FLOAT, to=int(FLOAT)))


def name_axes(graph: ir.Graph, axes: Mapping[str, tuple[str | None, ...]]) -> None:
    """Give the open sizes of inputs and outputs the names that people look for, and the same sizes the same names."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for size, name in zip(sizes(value), axes.get(value.name or "", ()), strict=False):
            if isinstance(size, str) and name is not None:
                names.setdefault(size, name)
    for value in graph.inputs:
        _rename(value, axes.get(value.name or "", ()), names)
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_named(size, names) for size in sizes(value)])
    for value in graph.outputs:
        _rename(value, axes.get(value.name or "", ()), names)


def _named(size: Size, names: Mapping[str, str]) -> Size:
    """The same size with its symbols named; without a name where it is computed from several."""
    if not isinstance(size, str):
        return size
    return names.get(size, size if size.isidentifier() else None)


def _rename(value: ir.Value, own: Sequence[str | None], names: Mapping[str, str]) -> None:
    """Name the open sizes of an input or output: as told for it, else as the same size elsewhere."""
    if value.shape is None:
        return
    told = (*own, *(None,) * (len(value.shape) - len(own)))
    value.shape = ir.Shape(
        [
            size if isinstance(size, int) else name or _named(size, names)
            for size, name in zip(sizes(value), told, strict=True)
        ]
    )


#: Operators of two numbers that ONNX Runtime lacks for bfloat16 on a CPU.
_ARITHMETIC = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Pow",
    "Sqrt",
    "Exp",
    "Cos",
    "Sin",
    "Range",
    "CumSum",
    "Max",
    "Min",
}


def widen_arithmetic(graph: ir.Graph) -> None:
    """Compute what a float model computes in bfloat16 in float, and round as it does: the same numbers to the bit.

    torch computes a sum or product of bfloat16 in float and rounds once; the rounding is all that is kept.
    """
    for node in list(graph):
        if node.op_type not in _ARITHMETIC or node.domain != "":
            continue
        if all(value is None or value.dtype != ir.DataType.BFLOAT16 for value in node.inputs):
            continue
        builder = Builder(graph, node)
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                node.replace_input_with(place, builder.op("Cast", value, dtype=FLOAT, to=int(FLOAT)))
        (result,) = node.outputs
        readers = list(result.uses())
        narrow = ir.Node("", "Cast", [result], [ir.AttrInt64("to", int(ir.DataType.BFLOAT16))])
        (rounded,) = narrow.outputs
        rounded.name, rounded.type, rounded.shape = f"{result.name}_rounded", result.type, result.shape
        result.type = ir.TensorType(FLOAT)
        graph.insert_after(node, narrow)
        for user, place in readers:
            user.replace_input_with(place, rounded)
