"""The one graph dialect, seen by detection: roles of inputs, taint of values, value numbers, sizes.

A `Program` is a flat pre-dispatch ATen graph with the real values of its inputs. Nothing in this file changes it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from grape_compile.passes.memory import is_pure as is_pure
from grape_compile.passes.memory import late_readers, writes
from grape_compile.passes.memory import op_name as op_name
from grape_compile.passes.regions import is_mark
from grape_compile.passes.site import Site

if TYPE_CHECKING:
    from grape_compile.passes.own_weights import OwnWeights


class Role(enum.Enum):
    """What an input of the graph is to the model; a literal is a tensor written out in its code."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    LITERAL = "literal"


class Taint(enum.IntEnum):
    """What a value depends on, ordered: a result carries the largest taint of its operands.

    STRUCTURE: shapes, constants, buffers, aranges. POSITION: integer and boolean inputs as well (positions, masks),
    and the cosines and sines of any angle: learned, accumulated, drawn at random, or an activation's.
    PARAMETER: weights. DATA: activations.
    """

    STRUCTURE = 0
    POSITION = 1
    PARAMETER = 2
    DATA = 3


Fact = Callable[[torch.Tensor], bool]
"""Something that is true of the numbers in a tensor."""


class Unreadable(Exception):
    """A value that cannot be read here (missing real input, unknown op): detection stops, softly."""


class Changing(Unreadable):
    """Numbers that would have to be known and may change unseen: worth telling."""


@dataclass
class Program:
    """A flat ATen graph, what its inputs are, and their values where they are known.

    Nodes in `outside` are known to have run in another graph and are not to be used; the last of each such stretch
    `stands` for an input of this one. `rotated` and `attended` hold the sites of values that were
    turned and of calls that attend. `replaced` says, for every value of the graph as captured whose users were given
    another, which that is and the site it belongs to. The numbers of `kept` inputs may be read, as somebody sees to it
    that the `facts` about them hold whenever the graph runs; `ways` say where those are found that were inputs of
    another graph: an input of this one by its place, and which part of what it is made of, and so on. Calls that attend
    and that nothing reads, the `weighted` ones, say what scores layers are to have that keep their own weights.
    """

    module: fx.GraphModule
    roles: Mapping[fx.Node, Role]
    values: Mapping[fx.Node, Any]
    no_grad: frozenset[fx.Node] = frozenset()
    rotated: dict[fx.Node, Site] = field(default_factory=dict)
    attended: dict[fx.Node, Site] = field(default_factory=dict)
    outside: frozenset[fx.Node] = frozenset()
    stands: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    replaced: dict[fx.Node, tuple[fx.Node, Site]] = field(default_factory=dict)
    kept: frozenset[fx.Node] = frozenset()
    facts: dict[fx.Node, list[Fact]] = field(default_factory=dict)
    weighted: dict[fx.Node, OwnWeights] = field(default_factory=dict)
    ways: Mapping[fx.Node, tuple[int, ...]] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of every node in the graph as captured."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    @cached_property
    def taints(self) -> dict[fx.Node, Taint]:
        """Taint of every node."""
        taints: dict[fx.Node, Taint] = {}
        for node in self.graph.nodes:
            taints[node] = Taint.DATA if node in self.stale else _taint(node, taints, self.roles)
        return taints

    @cached_property
    def value_numbers(self) -> dict[fx.Node, int]:
        """Equal numbers mean equal values: pure nodes with equal operators and operands share one."""
        numbers: dict[fx.Node, int] = {}
        table: dict[Any, int] = {}
        for node in self.graph.nodes:
            key: Any = node
            taint = self.taints.get(node, Taint.DATA)  # what was put in since is told apart by itself
            if node.op == "call_function" and taint <= Taint.PARAMETER and is_pure(node):
                args, kwargs = (frozen(each, numbers.__getitem__) for each in (node.args, node.kwargs))
                # Autocast makes one operator give two types; a value is not its own rounding.
                key = (node.target, args, kwargs, getattr(node.meta.get("val"), "dtype", None))
            try:
                numbers[node] = table.setdefault(key, len(table))
            except TypeError:
                numbers[node] = table.setdefault(node, len(table))
        return numbers

    @cached_property
    def representatives(self) -> dict[int, fx.Node]:
        """The first node of every value number."""
        first: dict[int, fx.Node] = {}
        for node, number in self.value_numbers.items():
            first.setdefault(number, node)
        return first

    @cached_property
    def mutations(self) -> list[fx.Node]:
        """Nodes that write into one of their operands."""
        return [node for node in self.graph.nodes if writes(node)]

    @cached_property
    def stale(self) -> frozenset[fx.Node]:
        """Nodes that read memory after something wrote into it: what they see is not what their operand was."""
        return frozenset(late for write in self.mutations for late in late_readers(write, self.order))

    def representative(self, node: fx.Node) -> fx.Node:
        """The first node with the same value."""
        return self.representatives[self.value_numbers[node]]

    def signature(self, results: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> object:
        """Equal for results that are the same function of their inputs: same operators, same position-side values."""
        first = min(self.order[node] for node in inputs)
        numbers: dict[fx.Node, object] = {node: ("input", place) for place, node in enumerate(inputs)}
        steps: dict[object, int] = {}

        def number(node: fx.Node) -> object:
            if node not in numbers:
                numbers[node] = self._own_number(node, first)
            if numbers[node] is None:
                step = (
                    node.target,
                    frozen(node.args, number),
                    frozen(node.kwargs, number),
                    node in self.stale,
                )
                numbers[node] = steps.setdefault(step, len(steps))
            return numbers[node]

        return tuple(map(number, results)), tuple(steps), tuple(map(_kind, inputs))

    def _own_number(self, node: fx.Node, first: int) -> object | None:
        """What stands for a value wherever it is used; None where that is how it is computed."""
        if node in self.value_numbers and self.taints.get(node, Taint.DATA) < Taint.DATA:
            return ("value", self.value_numbers[node])
        inside = node.op == "call_function" and self.order.get(node, first) >= first
        return None if inside else ("outside", node)

    def is_constant(self, node: fx.Node) -> bool:
        """True when a value is made of constants alone: it cannot change from call to call."""
        return self.made_of(node) == frozenset()

    def rely(self, node: fx.Node, facts: Iterable[Fact]) -> None:
        """What was rewritten holds as long as these are true of a kept input."""
        known = self.facts.setdefault(node, [])
        known += [fact for fact in dict.fromkeys(facts) if fact not in known]

    def made_of(self, node: fx.Node) -> frozenset[fx.Node] | None:
        """The kept inputs a value is made of beside constants; None where anything else goes into it."""
        if node not in self.constants:
            self.constants[node] = self._made_of(node)
        return self.constants[node]

    def _made_of(self, node: fx.Node) -> frozenset[fx.Node] | None:
        if self.roles.get(node) is Role.LITERAL:
            return frozenset()
        if node in self.kept:
            return frozenset((node,))
        if not is_pure(node) or isinstance(node.meta.get("val"), torch.SymInt) or _has_symbols(node):
            return None
        whole: frozenset[fx.Node] = frozenset()
        for operand in node.all_input_nodes:
            part = self.made_of(operand)
            if part is None:
                return None
            whole |= part
        return whole

    def unknown_behind(self, node: fx.Node) -> fx.Node | None:
        """What keeps the numbers of a value from being known: an input that is not kept, or what a call alone decides.

        Inputs come first. None for a value made of constants and kept inputs.
        """
        seen, stack = {node}, [node]
        sized: fx.Node | None = None
        while stack:
            step = stack.pop()
            if self.made_of(step) is not None:
                continue
            if step.op != "call_function" and fake(step) is not None:
                return step
            sized = step if sized is None or _has_symbols(step) else sized
            new = [each for each in step.all_input_nodes if each not in seen]
            seen.update(new)
            stack += new
        return sized

    @cached_property
    def marks(self) -> dict[fx.Node, fx.Node | None]:
        """The last node before each at which gradients, autocast or the region change."""
        last: fx.Node | None = None
        marks: dict[fx.Node, fx.Node | None] = {}
        for node in self.graph.nodes:
            marks[node] = last
            last = node if is_mark(node) else last
        return marks

    @cached_property
    def constants(self) -> dict[fx.Node, frozenset[fx.Node] | None]:
        """What `made_of` has found so far."""
        return {}

    def forget(self) -> None:
        """Drop what was derived from the graph, after the graph changed."""
        for name in (
            "order",
            "taints",
            "value_numbers",
            "representatives",
            "mutations",
            "marks",
            "stale",
            "constants",
        ):
            self.__dict__.pop(name, None)


def _kind(node: fx.Node) -> object:
    """Sizes and types of a node's tensors, of which an operator may give several."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return tuple(
        (tuple(map(str, each.shape)), each.dtype) for each in leaves if isinstance(each, torch.Tensor)
    )


def has_unknown_size(value: object) -> bool:
    """Whether a tensor has a size that is known at run time alone."""
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes)


def _has_symbols(node: fx.Node) -> bool:
    value = fake(node)
    return value is not None and any(not isinstance(size, int) for size in value.shape)


def fake(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node, or None when it is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def require_fake(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node; Unreadable when it is no tensor."""
    value = fake(node)
    if value is None:
        raise Unreadable(f"{node.name} is not a tensor")
    return value


def frozen(argument: Any, value: Callable[[Any], object]) -> object:
    """Arguments as something to compare and to look up by, with `value` for every node, tensor and symbol in them."""
    if isinstance(argument, fx.Node | torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return ("value", value(argument))
    if isinstance(argument, list | tuple):
        return (type(argument), *(frozen(item, value) for item in argument))
    if isinstance(argument, dict):
        return tuple((key, frozen(item, value)) for key, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", frozen((argument.start, argument.stop, argument.step), value))
    return (type(argument), repr(argument) if isinstance(argument, float) else argument)


def layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """What an operator is decided by besides values: equal for tensors that differ in their values alone."""
    if tensor.layout is not torch.strided:
        raise Unreadable("a sparse tensor")
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    numbers = tuple(size if isinstance(size, int) else size.node.expr for size in sizes)
    return numbers, tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()


def module_path(node: fx.Node) -> str:
    """Qualified name of the module whose code made the node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = list(stack.values())[-1]
    path = str(entry[0] if isinstance(entry, tuple) else entry)
    return clean_path(path)


def clean_path(path: str) -> str:
    """A dotted module path, spelled by Dynamo ("L['self'].model.layers[0]") or by export ("model.layers.0")."""
    for old, new in (("L['self']", ""), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return ".".join(
        part for part in path.split(".") if part not in ("", "__dict__", "_modules", "_parameters")
    )


def source_line(node: fx.Node) -> str:
    """`file:line` of the model's code that made the node."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not frames:
        return ""
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{file}:{rest.partition(',')[0]}"


_SHAPE_ONLY = {
    "aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::size", "aten::zeros_like", "aten::ones_like",
    "aten::full_like", "aten::empty_like", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty",
}  # fmt: skip
ANGLES = {"aten::cos", "aten::sin", "aten::polar"}
_LOOKUPS = {
    "aten::embedding": (0, 1),
    "aten::index_select": (0, 2),
    "aten::gather": (0, 2),
    "aten::index": (0, 1),
}


def _taint(node: fx.Node, taints: Mapping[fx.Node, Taint], roles: Mapping[fx.Node, Role]) -> Taint:
    if node.op in ("placeholder", "get_attr"):
        return _input_taint(node, roles)
    operands = [taints[operand] for operand in node.all_input_nodes]
    name = op_name(node)
    if name in _SHAPE_ONLY:
        return Taint.STRUCTURE
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not is_pure(node):
        return Taint.DATA
    if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        return (
            Taint.STRUCTURE if name or node.op == "call_function" else max(operands, default=Taint.STRUCTURE)
        )
    if name in ("aten::type_as", "aten::expand_as", "aten::view_as", "aten::to") and node.args:
        return _of(node.args[0], taints)
    worst = max(operands, default=Taint.STRUCTURE)
    if name in ANGLES and worst >= Taint.PARAMETER:
        return Taint.POSITION
    if worst is Taint.PARAMETER and name in _LOOKUPS:
        return _lookup_taint(node, taints, *_LOOKUPS[name])
    return worst


def _of(argument: Any, taints: Mapping[fx.Node, Taint]) -> Taint:
    return taints[argument] if isinstance(argument, fx.Node) else Taint.STRUCTURE


def _lookup_taint(node: fx.Node, taints: Mapping[fx.Node, Taint], table: int, index: int) -> Taint:
    """A weight looked up by positions is a table of positions; looked up by tokens it is an activation."""
    indices = node.args[index]
    flat = list(indices) if isinstance(indices, list | tuple) else [indices]
    if _of(node.args[table], taints) is not Taint.PARAMETER:
        return Taint.PARAMETER
    return Taint.STRUCTURE if all(_of(item, taints) is Taint.STRUCTURE for item in flat) else Taint.DATA


def _input_taint(node: fx.Node, roles: Mapping[fx.Node, Role]) -> Taint:
    role = roles.get(node, Role.BUFFER)
    value = node.meta.get("val")
    if role is Role.PARAMETER:
        return Taint.PARAMETER
    if role in (Role.BUFFER, Role.LITERAL) or not isinstance(value, torch.Tensor):
        return Taint.STRUCTURE
    return Taint.DATA if value.is_floating_point() or value.is_complex() else Taint.POSITION
