"""Read an ONNX graph as a program of ATen operators: every node is run once on fake tensors while tracing looks on.

What has no reader becomes one opaque operator, whose results are activations nobody knows more of; detection goes on
around it. Weights and tables are inputs of the program, constants by their role. The program knows which of its nodes
is which value of the file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from grape_compile.errors import CaptureError, GrapeError
from grape_compile.export.onnx.reading import layers, movement
from grape_compile.export.onnx.reading.arithmetic import torch_dtype
from grape_compile.export.onnx.reading.call import READERS, Call, Untranslated, Value, tensor
from grape_compile.export.onnx.reading.examples import Example, axes_of, inputs_of, size_of
from grape_compile.export.onnx.reading.roles import is_weight
from grape_compile.passes.capture import program_of
from grape_compile.passes.graph import Program, Role

assert layers is not None  # its readers are registered by importing it

_library = torch.library.Library("grape_onnx", "FRAGMENT")
_library.define(
    "opaque(Tensor[] operands, str name) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,)
)  # not pure: neither read through nor taken out


@dataclass(frozen=True)
class Seen:
    """What a value was in a run of the file on each of the examples."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


Measure = Callable[[Sequence[ir.Value]], list[Seen]]
"""Runs the file and tells what some of its values were."""


@dataclass(frozen=True)
class Imported:
    """A file's graph as a program, and the value of the file that each of its nodes is, by the node's name."""

    program: Program
    values: Mapping[str, ir.Value]
    opaque: tuple[str, ...]
    symbols: Mapping[Any, str]

    def size_name(self, size: Any) -> int | str | None:
        """A size as the file writes it: a number, the names it is made of, or nothing."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if not expression.free_symbols <= self.symbols.keys():
            return None
        return str(expression.xreplace({each: type(each)(name) for each, name in self.symbols.items()}))

    def apart(self) -> Program:
        """The program once more, out of reach of what is done to this one."""
        module = fx.GraphModule(self.program.module, copy.deepcopy(self.program.graph))
        old = self.program.graph.find_nodes(op="placeholder")
        same = dict(zip(old, module.graph.find_nodes(op="placeholder"), strict=True))
        roles = {same[node]: role for node, role in self.program.roles.items() if node in same}
        values = {same[node]: value for node, value in self.program.values.items() if node in same}
        return program_of(module, roles, values)


def import_graph(graph: ir.Graph, examples: Sequence[Example], measure: Measure) -> Imported:
    """The program of a graph, with the numbers of the first example in its inputs; others tell which sizes move.

    Raises CaptureError where the nodes do not fit each other.
    """
    return _Import(graph, examples, measure).run()


class _Import:
    def __init__(self, graph: ir.Graph, examples: Sequence[Example], measure: Measure) -> None:
        self.graph, self.examples, self.measure = graph, examples, measure
        example = examples[0]
        self.feeds = example.feeds(graph)
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.atoms = {name: self._symbol(size) for name, size in example.sizes.items()}
        self.sizes = {
            **self.atoms,
            **{name: size_of(held, self.atoms) for name, held in example.relations.items()},
        }
        self.env: dict[ir.Value, Value] = {}
        self.values: dict[str, ir.Value] = {}
        self.opaque: list[str] = []
        self.seen: dict[ir.Node, list[Seen]] = {}

    def _symbol(self, size: int) -> Any:
        """A size of any value, with this one for the example."""
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        return self.mode.from_tensor(torch.empty(size), symbolic_context=context).shape[0]

    def run(self) -> Imported:
        """Trace, and tell the program what its inputs are."""
        inputs: list[tuple[ir.Value, Role, Tensor, Tensor]] = []
        for value in inputs_of(self.graph):
            assert value.name is not None
            known = torch.from_numpy(self.feeds[value.name])
            sizes = [size_of(axis, self.sizes) for axis in axes_of(value)]
            inputs.append((value, Role.INPUT, self._fake(sizes, known.dtype), known))
        inputs += self._constants()

        def follow(fakes: list[Tensor]) -> list[Tensor]:
            mode = get_proxy_mode()
            assert mode is not None
            assert isinstance(mode.tracer, PythonKeyTracer)
            for (value, *_), each in zip(inputs, fakes, strict=True):
                self._bind(value, each, mode.tracer)
            for node in self.graph:
                self._step(node, mode.tracer)
            return [tensor(self.env[value]) for value in self.graph.outputs]

        try:
            tracing = make_fx(follow, pre_dispatch=True, tracing_mode="symbolic")
            with torch.no_grad():
                traced = tracing([fake for *_, fake, _ in inputs])
        except GrapeError:
            raise
        except Exception as failure:
            raise CaptureError(
                "read an ONNX graph as ATen operators",
                f"{type(failure).__name__}: {failure}".splitlines()[0],
                "a graph that ONNX Runtime runs",
            ) from failure
        self._require_open()
        traced.graph.set_codegen(fx.graph.CodeGen())
        output = traced.graph.output_node()
        output.args = (tuple(output.args[0]),)  # type: ignore[arg-type]  # the list of the results
        _share_sizes(traced.graph)
        traced.recompile()
        placeholders = traced.graph.find_nodes(op="placeholder")
        roles = {node: role for node, (_, role, *_) in zip(placeholders, inputs, strict=True)}
        numbers: dict[fx.Node, Any] = {
            node: known for node, (*_, known) in zip(placeholders, inputs, strict=True)
        }
        symbols = {size.node.expr: name for name, size in self.atoms.items()}
        return Imported(program_of(traced, roles, numbers), self.values, tuple(self.opaque), symbols)

    def _require_open(self) -> None:
        """Raise CaptureError where a node takes one size of a name only: what is read would hold for that one."""
        for name, size in self.atoms.items():
            known = self.mode.shape_env.replace(size.node.expr) if self.mode.shape_env else size.node.expr
            if known.is_number:
                raise CaptureError(
                    "read an ONNX graph for any size",
                    f"{name} has to be {known}",
                    "a file whose open sizes are open, or sizes that are numbers",
                )

    def _fake(self, sizes: Sequence[Any], dtype: torch.dtype) -> Tensor:
        with self.mode:
            return torch.empty(list(sizes), dtype=dtype)

    def _constants(self) -> Iterable[tuple[ir.Value, Role, Tensor, Tensor]]:
        """Tables and weights written into the file; short lists of numbers are read where they are used."""
        held = [(value, value.const_value) for value in self.graph.initializers.values()]
        held += [
            (node.outputs[0], movement.constant_tensor(node))
            for node in self.graph
            if node.op_type == "Constant" and node.domain == ""
        ]
        for value, content in held:
            if content is None:
                continue
            given = value.is_graph_input()
            numbers = None if given else movement.numbers_of(content)
            if numbers is not None:
                self.env[value] = numbers
                continue
            known = _as_torch(content)
            if known is None:
                continue
            role = (
                Role.BUFFER
                if given
                else Role.PARAMETER
                if known.is_floating_point() and is_weight(value)
                else Role.LITERAL
            )
            yield value, role, self._fake(known.shape, known.dtype), known

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _step(self, node: ir.Node, tracer: PythonKeyTracer) -> None:
        if all(value in self.env for value in node.outputs if value.name):
            return
        last = tracer.graph._root.prev
        try:
            for value, result in zip(node.outputs, self._read(node), strict=False):
                self._bind(value, result, tracer)
        except (Untranslated, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            self._opaque(node, tracer)
        while (last := last.next).op != "root":
            _tell(last, node)

    def _read(self, node: ir.Node) -> Sequence[Value]:
        reader = READERS.get((node.domain, node.op_type))
        if reader is None:
            raise Untranslated(node.op_type)
        operands = [None if value is None else self.env[value] for value in node.inputs]
        found = reader(Call(node), *operands)
        results = [found] if isinstance(found, Tensor | np.ndarray) else list(found)
        if len(results) < Call(node).results:
            raise Untranslated(f"the second result of {node.op_type}")
        for value, result in zip(node.outputs, results, strict=False):
            told = value.dtype
            if told is not None and isinstance(result, Tensor) and torch_dtype(told) != result.dtype:
                raise Untranslated(f"{value.name} is of type {told}, read as {result.dtype}")
        return results

    def _opaque(self, node: ir.Node, tracer: PythonKeyTracer) -> None:
        """Bind results of a node that is not read."""
        self.opaque.append(node.op_type)
        operands = [self.env[value] for value in (*node.inputs, *_captured(node)) if value in self.env]
        named = [value for value in node.outputs if value.name]
        fakes: list[Value] = [self._like(each) for each in self._seen_of(node)]
        given = [tracer.unwrap_proxy(tensor(each)) for each in operands]
        name = node.name or node.op_type
        call = tracer.create_proxy("call_function", torch.ops.grape_onnx.opaque.default, (given, name), {})
        tracked: list[Value] = track_tensor_tree(fakes, call, constant=None, tracer=tracer)
        call.node.meta["val"] = fakes
        for value, result in zip(named, tracked, strict=True):
            self._bind(value, result, tracer)

    def _seen_of(self, node: ir.Node) -> list[Seen]:
        """What running the file showed of a node's results; all nodes without a reader are asked for at once."""
        if node not in self.seen:
            unread = [each for each in self.graph if (each.domain, each.op_type) not in READERS]
            asked = list(dict.fromkeys([*unread, node]))
            values = [value for each in asked for value in each.outputs if value.name]
            found = dict(zip(values, self.measure(values), strict=True))
            for each in asked:
                self.seen[each] = [found[value] for value in each.outputs if value.name]
        return self.seen[node]

    def _like(self, seen: Seen) -> Tensor:
        """A result as large as both runs showed: sizes that did not move, sizes of a name, or of nothing known."""
        names = [{name: example.size(name) for name in self.sizes} for example in self.examples]
        sizes: list[Any] = []
        for moved in zip(*seen.shapes, strict=True):
            same = [name for name in self.sizes if tuple(each[name] for each in names) == moved]
            fixed = len(set(moved)) == 1
            sizes.append(moved[0] if fixed else self.sizes[same[0]] if same else self._symbol(moved[0]))
        return self._fake(sizes, seen.dtype)

    def _bind(self, value: ir.Value, result: Value, tracer: PythonKeyTracer) -> None:
        if not value.name:
            return
        self.env[value] = result
        if isinstance(result, Tensor):
            slot: Any = get_proxy_slot(result, tracer)
            self.values.setdefault(slot.proxy.node.name, value)


def _share_sizes(graph: fx.Graph) -> None:
    """Every size is read where it is first known: asking an activation how large it is would be a use of it."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        size = node.meta.get("val")
        if node.op == "call_function" and isinstance(size, torch.SymInt):
            kept = first.setdefault(size.node.expr, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _captured(node: ir.Node) -> list[ir.Value]:
    """Values of the graph that the bodies of a condition or a loop read."""
    found: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        bodies = [attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else []
        for body in bodies:
            own = {value for inner in body.all_nodes() for value in inner.outputs} | set(body.inputs)
            for inner in body.all_nodes():
                found.update(
                    (value, None) for value in inner.inputs if value is not None and value not in own
                )
    return list(found)


def _as_torch(held: ir.TensorProtocol) -> Tensor | None:
    """The numbers of a constant, where torch has their type."""
    try:
        kind = torch_dtype(held.dtype)
    except Untranslated:
        return None
    array = held.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file that is mapped: nothing is written into it
        if kind is torch.bfloat16:
            return torch.from_numpy(np.asarray(array).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.asarray(array)).to(kind)


def _tell(made: fx.Node, node: ir.Node) -> None:
    """Where a node comes from: the module and the line an exporter has noted, or the name of the node in the file."""
    noted = node.metadata_props
    path = noted.get("pkg.torch.onnx.name_scopes")
    scopes = [scope.strip(" '\"") for scope in (path or "").strip("[]").split(",")]
    module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
    if not module and node.name and "/" in node.name:
        module = ".".join(node.name.strip("/").split("/")[:-1])
    made.meta["nn_module_stack"] = {module: (module, "")} if module else {}
    made.meta["stack_trace"] = noted.get("pkg.torch.onnx.stack_trace", "")
