"""Interpret a Dynamo graph while `make_fx` looks on, so that every node becomes the ATen operators it stands for.

Layers of a model repeat. A node with the operands of an earlier one, up to their values, becomes the operators that one
became, written down again instead of run again: a model of many layers costs little more than a model of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    snapshot_fake,
    track_tensor,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grape_compile.passes.graph import Unreadable, frozen, layout
from grape_compile.passes.memory import is_data
from grape_compile.passes.regions import body_of, marked, operands_of


@dataclass
class Common:
    """What the retraces of a graph and of the bodies in it share: `kept` are the results of what stays a call."""

    kept: dict[fx.Node, Any]
    devices: list[str]
    expansions: dict[object, _Expansion] = field(default_factory=dict)
    autocasts: list[torch.autocast] = field(default_factory=list)

    @classmethod
    def of(cls, module: fx.GraphModule, fakes: Sequence[Any]) -> Common:
        """For a graph and its inputs, made before tracing starts: the fakes of the nodes belong to Dynamo."""
        mode = torch._guards.detect_fake_mode(fakes)
        graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
        kept = {
            node: pytree.tree_map(lambda value: _fresh(value, mode), node.meta["example_value"])
            for graph in graphs
            for node in graph.nodes
            if _stays_a_call(node)
        }
        return cls(kept, sorted({fake.device.type for fake in fakes if isinstance(fake, Tensor)}))

    def close(self) -> None:
        """Leave the autocasts that a trace that failed has left open."""
        while self.autocasts:
            self.autocasts.pop().__exit__(None, None, None)


class Retrace(fx.Interpreter):
    """Interprets a Dynamo graph; a custom autograd function stays one call, with the backward its author wrote, and so
    does what is asked of a tensor that wraps others (a quantised cache gives its keys back), and `.data`, whose memory
    may be written without autograd being told.
    """

    def __init__(self, module: fx.GraphModule, common: Common) -> None:
        super().__init__(module)
        self.common = common

    def run_node(self, n: fx.Node) -> Any:
        mode = get_proxy_mode()
        if mode is None or n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        assert isinstance(mode.tracer, PythonKeyTracer)
        if n in self.common.kept:
            return self._keep(n, mode.tracer)
        if n.target in (autocast_mode._enter_autocast, autocast_mode._exit_autocast):
            return self._switch_autocast(n)
        body = body_of(n, self.module)
        if body is not None:
            return self._run_region(n, body, mode.tracer)
        operands = _Operands(self.env, mode.tracer)
        # Looking at a tensor's sizes would otherwise pass through the modes that watch for operators.
        with torch._C.DisableTorchFunction():
            key = self._key(n, operands)
            if key is not None and key in self.common.expansions:
                with self._set_current_node(n):
                    return self.common.expansions[key].again(operands, mode.tracer)
        last = mode.tracer.graph._root.prev  # the root itself in a graph without inputs
        result = super().run_node(n)
        expansion = None if key is None else _Expansion.since(last, operands, result, mode.tracer)
        if expansion is not None:
            self.common.expansions[key] = expansion
        return result

    def _switch_autocast(self, node: fx.Node) -> torch.autocast | None:
        """Enter or leave autocast, so that types come out as they will; the context marks the graph itself."""
        if node.target is autocast_mode._exit_autocast:
            self.common.autocasts.pop().__exit__(None, None, None)
            return None
        context = torch.autocast(*node.args)  # type: ignore[arg-type]  # as it was given to Dynamo
        context.__enter__()
        self.common.autocasts.append(context)
        return context

    def _run_region(self, node: fx.Node, body: fx.GraphModule, tracer: PythonKeyTracer) -> Any:
        """The body's operators in their place, between marks."""
        operands = operands_of(node, self.fetch_args_kwargs_from_env(node)[0])
        with marked(tracer.graph, node, body):
            return type(self)(body, self.common).run(*operands)

    def _key(self, node: fx.Node, operands: _Operands) -> object | None:
        """Equal for nodes that become the same operators; None where that cannot be told."""
        ambient = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *(
                (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in self.common.devices
            ),
        )
        try:
            key = (node.op, node.target, ambient, operands.frozen(node.args), operands.frozen(node.kwargs))
            hash(key)
        except (Unreadable, TypeError):
            return None
        return key

    def _keep(self, node: fx.Node, tracer: PythonKeyTracer) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        root = tracer.root
        for body in args:
            if isinstance(body, fx.GraphModule):
                root.register_module(f"body_{len(list(root.children()))}", body)
        operands, options = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
        call = tracer.create_proxy(node.op, node.target, operands, options)
        return track_tensor_tree(self.common.kept[node], call, constant=None, tracer=tracer)


@dataclass
class _Operands:
    """The tensors a node is given, in the order they are met, each once."""

    env: Mapping[fx.Node, Any]
    tracer: PythonKeyTracer
    nodes: list[fx.Node] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def frozen(self, argument: Any) -> object:
        """Equal for arguments that differ in nothing but the values of tensors; Unreadable where that is not known."""
        return frozen(argument, self._value)

    def _value(self, value: Any) -> object:
        if isinstance(value, fx.Node):
            return self.frozen(self.env[value])
        return self._number(value) if isinstance(value, Tensor) else value.node.expr

    def _number(self, tensor: Tensor) -> object:
        number = self.numbers.get(id(tensor))
        if number is None:
            slot = get_proxy_slot(tensor, self.tracer, None)
            if slot is None or slot.constant is not None or not isinstance(tensor, FakeTensor):
                raise Unreadable("a tensor whose values are known to the tracer")
            number = self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.nodes.append(slot.proxy.node)
        return (number, layout(tensor), tensor.requires_grad)


@dataclass(frozen=True)
class _Result:
    """What a node gave: a tensor like it, that no write reaches; where it was made; the number of the operand it is
    where an operator returned its operand."""

    tensor: Tensor
    node: fx.Node
    operand: int | None


@dataclass(frozen=True)
class _Expansion:
    """What a node became: the operands it starts at, operators, results."""

    operands: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]
    results: tuple[_Result, ...]
    spec: pytree.TreeSpec

    @classmethod
    def since(
        cls, last: fx.Node, operands: _Operands, result: Any, tracer: PythonKeyTracer
    ) -> _Expansion | None:
        """The expansion whose operators were traced after `last`; None for one that may not be repeated."""
        steps: list[fx.Node] = []
        while (last := last.next).op != "root":
            steps.append(last)
        inside = {*operands.nodes, *steps}
        if not all(_is_repeatable(step, inside) for step in steps):
            return None
        leaves, spec = pytree.tree_flatten(result)
        if not all(isinstance(leaf, FakeTensor) for leaf in leaves):
            return None
        results = [
            _Result(_another(leaf), get_proxy_slot(leaf, tracer).proxy.node, operands.numbers.get(id(leaf)))
            for leaf in leaves
        ]
        if any(each.node not in inside for each in results):
            return None
        return cls(tuple(operands.nodes), tuple(steps), tuple(results), spec)

    def again(self, operands: _Operands, tracer: PythonKeyTracer) -> Any:
        """The same operators on other operands."""
        placed = dict(zip(self.operands, operands.nodes, strict=True))
        for step in self.steps:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda node: placed.get(node, node))
            node = tracer.create_node("call_function", step.target, args, kwargs, step.name)
            node.meta |= {name: step.meta[name] for name in _MADE if name in step.meta}
            placed[step] = node
        tensors = []
        for result in self.results:
            tensor = _another(result.tensor) if result.operand is None else operands.tensors[result.operand]
            if result.node not in self.operands:
                track_tensor(tensor, fx.Proxy(placed[result.node], tracer), constant=None, tracer=tracer)
            tensors.append(tensor)
        return pytree.tree_unflatten(tensors, self.spec)


def _another(tensor: Tensor) -> Tensor:
    """A tensor that differs from another in its identity alone; like it, it is no leaf where it requires gradients."""
    if tensor.requires_grad:
        with disable_proxy_modes_tracing():
            alias: Tensor = torch.ops.aten.alias.default(tensor)
            return alias
    copy = snapshot_fake(tensor)
    assert copy is not None
    return copy


_MADE = ("val", "tensor_meta", "original_aten")
"""What a node tells of its operator; the rest tells of the code it comes from."""


def _is_repeatable(step: fx.Node, inside: set[fx.Node]) -> bool:
    """An operator on the operands, earlier steps and sizes that writes nothing and makes up no new symbols."""
    target = step.target
    writes = target._schema.is_mutable if isinstance(target, torch._ops.OpOverload) else target is not getitem
    return (
        not writes
        and "unbacked_bindings" not in step.meta
        and all(
            node in inside or isinstance(node.meta.get("val"), torch.SymInt) for node in step.all_input_nodes
        )
    )


def _stays_a_call(node: fx.Node) -> bool:
    if getattr(node.target, "__name__", "") == "autograd_function_apply" or is_data(node):
        return True
    operands = (operand.meta.get("example_value") for operand in node.all_input_nodes)
    return node.op in ("call_function", "call_method") and any(map(is_traceable_wrapper_subclass, operands))


def _fresh(value: Any, mode: Any) -> Any:
    """A fake tensor of the given mode with the metadata of another."""
    if not isinstance(value, torch.Tensor) or mode is None:
        return value
    with mode:
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return fresh.requires_grad_(value.requires_grad)
