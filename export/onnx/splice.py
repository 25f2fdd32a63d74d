"""Put the operators of a rewritten program into the file its graph was read from.

What: each value of the file that a site replaced is computed by emitted nodes from values the file has; what only the
    replaced region used is taken out.
Leaves alone: every other node, the names and types of inputs and outputs; a site with an operand that has no ONNX
    operator here becomes a refusal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
from torch import Tensor, fx

from grape_compile.encoding import parse
from grape_compile.errors import GrapeError
from grape_compile.export.onnx.builder import MICROSOFT, Builder, Size, sizes
from grape_compile.export.onnx.clean import read_sizes
from grape_compile.export.onnx.emit_attention import attend
from grape_compile.export.onnx.emit_operators import Call
from grape_compile.export.onnx.emit_rotation import rotate
from grape_compile.export.onnx.lower import Lowered
from grape_compile.export.onnx.node_writers import WRITERS, Unwritable, Written, element
from grape_compile.export.onnx.reading.trace import Imported
from grape_compile.export.onnx.targets import Target
from grape_compile.passes.graph import op_name
from grape_compile.passes.site import Refusal, Site


@dataclass
class Spliced:
    """The sites that are in the file now, with what computes them, and those that could not be put there."""

    sites: list[Site] = field(default_factory=list)
    lowered: list[Lowered] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def splice(graph: ir.Graph, imported: Imported, target: Target) -> Spliced:
    """Replace every site's value in the graph."""
    done = Spliced()
    writer = _Writer(graph, imported, target)
    replaced: list[tuple[ir.Value, ir.Value]] = []
    for old, (new, site) in imported.program.replaced.items():
        if new._erased:  # taken in by a later site
            continue
        held = imported.values.get(old.name)
        try:
            if held is None or held.producer() is None:
                raise Unwritable(f"{old.name} is no value of the file")
            writer.stand_before(held)
            value = writer.value(new)
        except (Unwritable, GrapeError) as reason:
            said = f"{site.encoding} was found but cannot be written: {reason}"
            done.refusals.append(
                Refusal(
                    "writing",
                    said,
                    held.name or "" if held else old.name,
                    site.module,
                    site.source,
                    str(site.encoding),
                )
            )
            continue
        replaced.append((held, value))
        done.sites.append(replace(site, lowering=writer.told[new]))
        done.lowered.append(Lowered(str(site.encoding), site.module, writer.told[new]))
    if target.microsoft:
        graph.opset_imports.setdefault(MICROSOFT, 1)
    for held, value in replaced:
        _redirect(graph, held, value)
    graph.sort()
    _merge(graph, writer.made())
    _remove_unused([*(held for held, _ in replaced), *writer.made()])
    return done


class _Writer:
    """Writes nodes of the program that the file does not have, each once, in front of the value in hand."""

    def __init__(self, graph: ir.Graph, imported: Imported, target: Target) -> None:
        self.graph, self.imported, self.target = graph, imported, target
        self.written: dict[fx.Node, ir.Value] = {}
        self.calls: dict[fx.Node, tuple[tuple[ir.Value, ...], str]] = {}
        self.told: dict[fx.Node, str] = {}
        self.before = set(graph)

    def stand_before(self, value: ir.Value) -> None:
        """What is written from here on stands in front of the node that computes a value."""
        node = value.producer()
        assert node is not None
        self.builder = Builder(self.graph, node)

    def made(self) -> list[ir.Value]:
        """The results of the nodes that were written, in the order of the graph."""
        return [value for node in self.graph if node not in self.before for value in node.outputs]

    def value(self, node: fx.Node) -> ir.Value:
        """The value of the file that a node of the program is: one it has, or one written now."""
        stack = [node]
        while stack:
            step = stack[-1]
            if step not in self.written:
                missing = [each for each in self._operands(step) if each not in self.written]
                if missing:
                    stack += missing
                    continue
                self.written[step] = self._write(step)
            stack.pop()
        self.told[node] = self._told(node)
        return self.written[node]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [] if node.name in self.imported.values else node.all_input_nodes

    def _write(self, node: fx.Node) -> ir.Value:
        held = self.imported.values.get(node.name)
        if held is not None:
            return self._sized(held, node)
        name = op_name(node)
        if name in ("grape::rotate", "grape::attend"):
            self.calls[node] = self._call(node)
            return self.calls[node][0][0]
        call, place = node.args if name == "getitem" else (None, None)
        if isinstance(call, fx.Node) and call in self.calls:
            return self.calls[call][0][int(place)]  # type: ignore[arg-type]  # of a call: a number
        if name not in WRITERS:
            raise Unwritable(f"no ONNX operator is known for {name or node.op}")
        value = WRITERS[name](self.builder, Written(node, self.written))
        return self._sized(value, node)

    def _call(self, node: fx.Node) -> tuple[tuple[ir.Value, ...], str]:
        written: Any = self.written.__getitem__
        args: Any = fx.node.map_arg(node.args, written)
        options: Any = fx.node.map_arg(dict(node.kwargs), written)
        if op_name(node) == "grape::rotate":
            tensors, operands, text = args
            encoding = parse(text)
            emitted = rotate(
                self.builder, tensors, encoding, dict(zip(encoding.slots, operands, strict=True)), self.target
            )
        else:
            query, key, value, operands, text = args
            encoding = parse(text)
            slots = dict(zip(encoding.slots, operands, strict=True))
            emitted = attend(self.builder, Call(query, key, value, encoding, slots, **options), self.target)
        return emitted.values, emitted.how

    def _told(self, node: fx.Node) -> str:
        """What computes a replaced value: the call behind the views and casts around it."""
        stack = [node]
        while stack:
            step = stack.pop()
            if step in self.calls:
                return self.calls[step][1]
            stack += self._operands(step)
        raise Unwritable(f"{node.name} is made by no operator of a site")

    def _sized(self, value: ir.Value, node: fx.Node) -> ir.Value:
        """The value, with the sizes and the type the program knows."""
        known = node.meta.get("val")
        if isinstance(known, Tensor):
            told: list[Size] = [None] * known.dim() if value.shape is None else list(sizes(value))
            seen = [self.imported.size_name(size) for size in known.shape]
            value.shape = ir.Shape(
                [own if isinstance(own, int) else size for own, size in zip(told, seen, strict=True)]
            )
            if value.dtype is None:
                value.type = ir.TensorType(element(known.dtype))
        return value


# -- the graph ---------------------------------------------------------------------------------------------------------


def _redirect(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Everybody who reads a value reads another; as a result of the graph the other takes its name."""
    name = old.name
    given = old.is_graph_output()
    new.type, new.shape = old.type, old.shape or new.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if given:
        old.name = f"{name}_before"
        new.name = name


def _merge(graph: ir.Graph, made: list[ir.Value]) -> None:
    """Of written nodes that compute the same keep the first: tables are made once for all layers.

    Sizes are read off the inputs of the graph where one of them has that size.
    """
    first: dict[object, ir.Node] = {}
    own = {value.producer() for value in made}
    read_sizes(graph, own)
    for node in list(graph):
        if node not in own:
            continue
        attributes = tuple(sorted((name, str(held.value)) for name, held in node.attributes.items()))
        key = (node.domain, node.op_type, tuple(node.inputs), attributes)
        same = first.setdefault(key, node)
        if same is not node and not any(value.is_graph_output() for value in node.outputs):
            for value, kept in zip(node.outputs, same.outputs, strict=True):
                value.replace_all_uses_with(kept)


def _remove_unused(values: Iterable[ir.Value]) -> None:
    """Take out the nodes behind values that nobody reads any more, and what only they read."""
    stack = list(values)
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or node.graph is None:
            if node is None and value.is_initializer() and not value.uses() and not value.is_graph_input():
                _drop_initializer(value)
            continue
        if any(each.uses() or each.is_graph_output() for each in node.outputs):
            continue
        operands = [each for each in node.inputs if each is not None]
        node.graph.remove(node, safe=True)
        stack += operands


def _drop_initializer(value: ir.Value) -> None:
    graph = value.graph
    if graph is not None and not value.is_graph_output():
        del graph.initializers[str(value.name)]
