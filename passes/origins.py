"""Tables that one graph makes and a later graph is given: behind a graph break, what they are made of is still known.

torch.compile cuts a model where it cannot look inside; the tables of cosines and sines of the first graph are then
plain inputs of the others, and inputs may hold anything. Every table a compiled graph returns is therefore marked with
its origin, a copy of the operators that made it, and with what these were given, which may be marked tables again. A
graph that is given marked tensors is read as if it had made them itself; what is found holds for tensors with the same
marks (stand_ins.py). A tensor that was written into since, or made by anything else, has no origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils.weak import WeakTensorKeyDictionary

from grape_compile.passes.graph import Program, Role, Taint, Unreadable, fake, frozen, is_pure, op_name
from grape_compile.passes.movement import MOVEMENTS, is_frozen
from grape_compile.passes.verify import PHASES

_DEEPEST = 8
"""Graphs that a table may have come through: a state that every call changes must not remember all of them."""


@dataclass(frozen=True)
class Leaf:
    """Where the copy of a table begins: argument `place` of its graph, or a value inside of it.

    An open one may be a table of an earlier graph, or anything else. The numbers of one that is kept may be read.
    """

    name: str
    place: int | None
    role: Role
    value: Any
    is_open: bool
    is_kept: bool


@dataclass(frozen=True)
class Origin:
    """What one table of a graph is made of: a graph that returns it alone, and where this graph begins.

    Equal for the same operators on leaves of the same kinds, whatever the leaves hold. `sizes` are the inputs of the
    graph that stand for open sizes, made of `symbols`: sizes of an argument, or (no axis) the argument itself.
    `needs_tables`: it is a table only where all open leaves are.
    """

    key: object
    graph: fx.Graph = field(compare=False)
    leaves: tuple[Leaf, ...] = field(compare=False)
    sizes: Mapping[fx.Node, torch.SymInt] = field(compare=False)
    symbols: tuple[tuple[Any, int, int | None], ...] = field(compare=False)
    needs_tables: bool = field(compare=False)


@dataclass(frozen=True, eq=False)
class Part:
    """A leaf in one call: equal identities are equal values. `value` gives the tensor as long as somebody keeps it."""

    identity: tuple[object, ...]
    value: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Mark:
    """On a tensor of one version: what it is made of, in which call, of which parts, and the values of open sizes."""

    origin: Origin
    parts: tuple[Mark | Part, ...]
    sizes: tuple[int, ...]
    call: int
    version: int
    depth: int


_CALLS = count()
_NUMBERS = count()
# Not attributes: a copy or a file of a tensor must not take them along.
_marks: Any = WeakTensorKeyDictionary()
_numbers: Any = WeakTensorKeyDictionary()


def mark_on(value: object) -> Mark | None:
    """The mark on a tensor that was not written into since."""
    mark: Mark | None = _marks.get(value) if isinstance(value, Tensor) else None
    return mark if mark is not None and mark.version == _version(value) else None


def _version(value: Any) -> int | None:
    """How often a tensor was written into; tensors of inference do not tell."""
    return None if value.is_inference() else value._version


# -- what the results of a graph are made of --------------------------------------------------------------


def origins_of(program: Program) -> dict[int, Origin]:
    """What the tables among a program's results are made of, by their place."""
    results = program.graph.output_node().args[0]
    assert isinstance(results, list | tuple)
    numbers = {place: node for place, node in enumerate(results) if _is_number(node)}
    if not numbers:
        return {}
    handed = [node for node in program.graph.find_nodes(op="placeholder") if _is_open(program, node)]
    roles = {**program.roles, **dict.fromkeys(handed, Role.BUFFER)}
    opened = Program(program.module, roles, program.values, program.no_grad) if handed else program
    found: dict[int, Origin] = {}
    for place, node in numbers.items():
        for reading in (program, opened):
            if reading.taints[node] < Taint.PARAMETER:
                try:
                    found[place] = _Copy(program, reading).of(node)
                except Unreadable:
                    continue
                break
    return found


def _is_number(node: Any) -> bool:
    value = fake(node) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return value is not None and (value.is_floating_point() or value.is_complex())


def _is_open(program: Program, node: fx.Node) -> bool:
    return program.roles.get(node) is Role.INPUT and program.taints[node] is Taint.DATA


class _Copy:
    """The operators behind one result. `reading` is the program, or that with its open inputs taken for tables."""

    def __init__(self, program: Program, reading: Program) -> None:
        self.program, self.reading = program, reading
        self.inputs = program.graph.find_nodes(op="placeholder")
        self.graph, self.copies = fx.Graph(), dict[fx.Node, fx.Node]()
        self.leaves: list[Leaf] = []
        self.sizes: dict[fx.Node, torch.SymInt] = {}
        self.symbols: set[Any] = set()

    def of(self, result: fx.Node) -> Origin:
        needed = self._needed(result)
        nodes = [node for node in self.program.graph.nodes if node in needed]
        for node in nodes:
            if self._is_leaf(node):
                self.copies[node] = self.graph.placeholder(node.name)
                self.leaves.append(self._leaf(node))
                self._size(fake(node))
        numbers = {node: number for number, node in enumerate(nodes)}
        kinds = [
            (leaf.role, leaf.is_open, leaf.is_kept, leaf.place is None, _kind(leaf)) for leaf in self.leaves
        ]
        key: list[object] = [tuple(kinds)]
        for node in nodes:
            if node not in self.copies:
                args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), self._copied)
                copied = self.copies[node] = self.graph.call_function(node.target, args, kwargs)
                dtype = getattr(node.meta.get("val"), "dtype", None)
                copied.meta = {name: node.meta[name] for name in _PROVENANCE if name in node.meta}
                copied.meta["dtype"] = dtype
                key.append(
                    (
                        node.target,
                        *(frozen(each, _named(numbers)) for each in (node.args, node.kwargs)),
                        dtype,
                    )
                )
        self.graph.output(self.copies[result])
        needs = self.program.taints[result] >= Taint.PARAMETER
        return Origin(tuple(key), self.graph, tuple(self.leaves), self.sizes, self._bindings(), needs)

    def _is_leaf(self, node: fx.Node) -> bool:
        """Where the copy ends: at inputs, and at activations behind what angles are made with."""
        inside = self.reading.taints[node] is not Taint.DATA or op_name(node) in PHASES
        return node.op != "call_function" or not inside

    def _needed(self, result: fx.Node) -> set[fx.Node]:
        needed, stack = {result}, [result]
        while stack:
            node = stack.pop()
            if self._is_leaf(node):
                continue
            if not is_pure(node):
                raise Unreadable("a table that is drawn or written into")
            if op_name(node) in MOVEMENTS and is_frozen(node, op_name(node)):
                raise Unreadable("a table cut at an offset that may be another in the next call")
            for operand in node.all_input_nodes:
                if operand not in needed and not isinstance(operand.meta.get("val"), torch.SymInt):
                    needed.add(operand)
                    stack.append(operand)
        return needed

    def _leaf(self, node: fx.Node) -> Leaf:
        place = self.inputs.index(node) if node.op == "placeholder" else None
        known = self.program.values.get(node) if node.op == "get_attr" else None
        value = fake(node) if known is None else known
        if value is None:
            raise Unreadable(f"{node.name} is no tensor")
        role = self.program.roles.get(node, Role.INPUT)
        kept = node in self.program.kept
        return Leaf(node.name, place, role, value, _is_open(self.program, node), kept)

    def _copied(self, item: Any) -> Any:
        if isinstance(item, fx.Node) and item in self.copies:
            return self.copies[item]
        value = item.meta.get("val") if isinstance(item, fx.Node) else item
        if not isinstance(value, torch.SymInt):
            return value
        self._size(value)
        stand_in = self.graph.placeholder("size")
        self.sizes[stand_in] = value
        return stand_in

    def _size(self, value: Any) -> None:
        self.symbols |= free_symbols(value) if value is not None else set()

    def _bindings(self) -> tuple[tuple[Any, int, int | None], ...]:
        """Where the value of each symbol is found among the arguments of a call."""
        found: dict[Any, tuple[int, int | None]] = {}
        for place, node in enumerate(self.inputs):
            value = node.meta.get("val")
            sizes = list(enumerate(value.shape)) if isinstance(value, Tensor) else [(None, value)]
            for axis, size in sizes:
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (place, axis))
        if not self.symbols <= found.keys():
            raise Unreadable("a size that no argument tells")
        return tuple((symbol, *found[symbol]) for symbol in sorted(self.symbols, key=str))


_PROVENANCE = ("stack_trace", "nn_module_stack")


def _kind(leaf: Leaf) -> object:
    """What a leaf is, but for what it holds; a literal is what it holds."""
    literal = id(leaf.value) if leaf.role is Role.LITERAL and leaf.place is None else None
    return tuple(map(str, leaf.value.shape)), leaf.value.dtype, leaf.value.device, literal


def _named(numbers: Mapping[fx.Node, int]) -> Callable[[Any], object]:
    def name(item: Any) -> object:
        if isinstance(item, fx.Node) and item in numbers:
            return numbers[item]
        value = item.meta.get("val") if isinstance(item, fx.Node) else item
        return str(value) if isinstance(value, torch.SymInt) else id(value)

    return name


# -- marks ------------------------------------------------------------------------------------------------


def marking(compiled: Callable[..., Any], origins: Mapping[int, Origin]) -> Callable[..., Any]:
    """A compiled graph whose tables carry marks."""

    def call(*args: Any) -> Any:
        results, number = compiled(*args), next(_CALLS)
        for place, origin in origins.items():
            tensor = results[place]
            version = _version(tensor)
            if version is not None and not any(tensor is given for given in args):
                mark = _mark(origin, args, number, version)
                if mark is not None:
                    _marks[tensor] = mark
        return results

    return call


def _mark(origin: Origin, args: Sequence[Any], call: int, version: int) -> Mark | None:
    parts: list[Mark | Part] = []
    for leaf in origin.leaves:
        part = _part(leaf, args, call)
        if part is None or (leaf.is_open and origin.needs_tables and isinstance(part, Part)):
            return None
        parts.append(part)
    depth = 1 + max((part.depth for part in parts if isinstance(part, Mark)), default=0)
    sizes = tuple(
        int(args[place] if axis is None else args[place].shape[axis]) for _, place, axis in origin.symbols
    )
    return Mark(origin, tuple(parts), sizes, call, version, depth) if depth <= _DEEPEST else None


def _part(leaf: Leaf, args: Sequence[Any], call: int) -> Mark | Part | None:
    if leaf.place is None and isinstance(leaf.value, torch._subclasses.FakeTensor):
        return Part(("made", call, leaf.name), lambda: None)
    tensor = leaf.value if leaf.place is None else args[leaf.place]
    mark = mark_on(tensor) if leaf.is_open else None
    version = _version(tensor)
    if mark is not None or version is None:
        return mark
    if tensor not in _numbers:
        _numbers[tensor] = next(_NUMBERS)
    kept = ref(tensor)
    return Part(("given", _numbers[tensor], version), lambda: _as_it_was(kept(), version))


def _as_it_was(tensor: Tensor | None, version: int) -> Tensor | None:
    return tensor if tensor is not None and tensor._version == version else None


def alike(marks: Iterable[tuple[int, Mark]]) -> object:
    """Equal for tensors, each at its place, that were made in the same way from parts that are the same among them."""
    numbers: dict[object, int] = {}
    sizes: dict[int, tuple[int, ...]] = {}

    def number(thing: object) -> int:
        return numbers.setdefault(thing, len(numbers))

    def of(part: Mark | Part) -> object:
        if isinstance(part, Part):
            return number(part.identity)
        if part.sizes:
            sizes[part.call] = part.sizes
        own = number(part.call) if part.sizes else None
        return part.origin, own, tuple(map(of, part.parts))

    made = [(place, of(mark)) for place, mark in marks]
    # Open sizes are read as those of one graph; sizes of several have to agree where they did.
    told = [[number(("size", size)) for size in each] for each in sizes.values()] if len(sizes) > 1 else []
    return made, told
