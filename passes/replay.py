"""Replay parts of a program in fp64: the oracle of detection and verification.

Casts to a lower precision become casts to fp64, asserts are skipped, inputs keep their own (stored) values. Everything
is on the CPU, wherever the model is: so are the random numbers it is compared on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from grape_compile.passes.graph import ANGLES, Program, Taint, Unreadable, fake, has_unknown_size, op_name
from grape_compile.passes.movement import CUTS, LIKE
from grape_compile.passes.sizes import Sizes

Found = TypeVar("Found")

_LARGEST = 1 << 27
"""Elements of one value: 1 GiB in fp64. A larger value is not worth an oracle; what is cut out of an input may be."""


def exact(value: Any) -> Any:
    """The same value on the CPU in fp64 or complex128; integers and booleans unchanged."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", exact(value.dtype))
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    if isinstance(value, list | tuple):
        return type(value)(exact(item) for item in value)
    return value


def has_value(program: Program, node: fx.Node) -> bool:
    """Whether an input of the program comes with a value."""
    value = program.values.get(node)
    return value is not None and not isinstance(value, FakeTensor) and not getattr(value, "is_meta", False)


class Replay:
    """Values of nodes in fp64, computed once for all nodes of one value number; `bound` fixes those of chosen nodes.

    The tables and masks that every layer computes anew are computed once.
    """

    def __init__(
        self, program: Program, sizes: Sizes | None = None, bound: Mapping[fx.Node, Any] | None = None
    ) -> None:
        self.program = program
        self.sizes = sizes or Sizes()
        self.known: dict[fx.Node, Any] = dict(bound or {})
        self.facts: dict[object, Any] = {}

    def __call__(self, node: fx.Node) -> Any:
        """Value of a node; Unreadable where an input has no real value or an operator cannot be replayed."""
        for step in self._missing(node):
            self.known[step] = self._run(step)
        return exact(self.known[self._first(node)])

    def _first(self, node: fx.Node) -> fx.Node:
        """The node whose value stands for this one's: itself, or the first of its value number."""
        number = None if node in self.known else self.program.value_numbers.get(node)
        return node if number is None else self.program.representatives[number]

    def once(self, fact: Hashable, nodes: Sequence[fx.Node], find: Callable[[], Found]) -> Found:
        """What `find` tells of the values of nodes, found once for all nodes of the same value numbers."""
        key = (fact, *map(self._first, nodes))
        if key not in self.facts:
            self.facts[key] = find()
        found: Found = self.facts[key]
        return found

    def tensor(self, node: fx.Node) -> Tensor:
        value = self(node)
        if not isinstance(value, Tensor):
            raise Unreadable(f"{node.name} is not a tensor")
        return value

    def branch(self, bound: Mapping[fx.Node, Any]) -> Replay:
        """A replay that shares what is known on the position side and fixes further nodes."""
        known = {
            node: value
            for node, value in self.known.items()
            if self.program.taints.get(node, Taint.DATA) < Taint.DATA
        }
        return Replay(self.program, self.sizes, {**known, **bound})

    def _missing(self, node: fx.Node) -> list[fx.Node]:
        order: list[fx.Node] = []
        stack, seen = [(self._first(node), False)], set()
        while stack:
            step, ready = stack.pop()
            if ready:
                order.append(step)
            elif step not in self.known and step not in seen:
                seen.add(step)
                stack.append((step, True))
                stack.extend((self._first(operand), False) for operand in self._operands(step))
        return order

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if not isinstance(node.meta.get("val"), Tensor | tuple | list):
            return []
        return [operand for operand in node.all_input_nodes if not self._metadata_only(node, operand)]

    def _metadata_only(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether a node asks an operand that is not known yet for its shape and type alone."""
        if self._first(operand) in self.known or op_name(node) in ANGLES:
            return False
        if op_name(node) in LIKE and operand is not node.args[0]:
            return not has_unknown_size(operand.meta.get("val"))
        return self._taint(node) < Taint.DATA and self._taint(operand) is Taint.DATA

    def _taint(self, node: fx.Node) -> Taint:
        return self.program.taints.get(node, Taint.DATA)

    def _run(self, node: fx.Node) -> Any:
        if node in self.program.stale:
            raise Unreadable(f"{node.name} reads a value that was written to in place")
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return self.sizes(value)
        if isinstance(value, torch.SymFloat):
            return self.sizes.real(value)
        if node.op in ("placeholder", "get_attr"):
            return self._input(node)
        if node.op != "call_function" or (
            op_name(node) == "" and not isinstance(node.target, torch._ops.OpOverload)
        ):
            raise Unreadable(f"{node.name} ({node.op}) cannot be replayed")
        is_cut = op_name(node) in CUTS
        if isinstance(value, Tensor) and not is_cut and torch.Size(self.sizes.shape(node)).numel() > _LARGEST:
            raise Unreadable(f"{node.name} has more than {_LARGEST} elements")
        args, kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda item: self._argument(node, item)
        )
        try:
            assert callable(node.target)
            found = node.target(*args, **kwargs)
            found = found if is_cut else exact(found)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as failure:
            raise Unreadable(f"{op_name(node)} cannot be replayed in fp64: {failure}") from failure
        if has_unknown_size(value) and found.shape != self.sizes.shape(node):
            raise Unreadable(f"the size of {node.name} is decided by values")
        return found

    def _argument(self, node: fx.Node, item: Any) -> Any:
        if isinstance(item, fx.Node):
            if (first := self._first(item)) in self.known:
                return self.known[first] if op_name(node) in CUTS else exact(self.known[first])
            if self._metadata_only(node, item) and (like := fake(item)) is not None:
                return torch.zeros((), dtype=exact(like.dtype)).expand(self.sizes.shape(item))
            value = item.meta.get("val")
            return self.sizes.real(value) if isinstance(value, torch.SymFloat) else self.sizes(value)
        if isinstance(item, torch.SymInt):
            return self.sizes(item)
        if isinstance(item, torch.SymFloat):
            return self.sizes.real(item)
        return exact(item) if isinstance(item, torch.dtype | torch.device) else item

    def _input(self, node: fx.Node) -> Any:
        value = self.program.values.get(node)
        if not has_value(self.program, node):
            raise Unreadable(f"the input {node.name} has no value here")
        # A cache that is longer than any call is cut before it is copied.
        return value.detach() if isinstance(value, Tensor) and value.numel() > _LARGEST else exact(value)
