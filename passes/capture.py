"""Bring a model's code into the one dialect: a flat pre-dispatch ATen graph, before autograd, with its inputs' values.

Two doors: an exported program (already in the dialect but for its regions), and a Dynamo graph, which is retraced with
`make_fx(pre_dispatch=True)` under Dynamo's own fake mode so that autograd, mutation and symbolic sizes stay as they
are. Node provenance survives because the retrace interprets the graph under `preserve_node_meta`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from grape_compile.errors import CaptureError, first_line
from grape_compile.passes.batches import flatten_batches, has_batches
from grape_compile.passes.facts import is_watched, keep
from grape_compile.passes.graph import Program, Role, clean_path, op_name
from grape_compile.passes.origins import mark_on
from grape_compile.passes.regions import inline_regions, outline_regions, without_gradient
from grape_compile.passes.retrace import Common, Retrace
from grape_compile.passes.stand_ins import graft

_KINDS = {
    InputKind.PARAMETER: Role.PARAMETER,
    InputKind.BUFFER: Role.BUFFER,
    InputKind.CONSTANT_TENSOR: Role.BUFFER,
    InputKind.USER_INPUT: Role.INPUT,
}


def capture_dynamo(module: fx.GraphModule, examples: Sequence[Any]) -> Program:
    """A program from the graph and example inputs a `torch.compile` backend is given.

    Examples that a graph before a graph break made are read back to what they are made of. Raises CaptureError when
    the graph cannot be retraced; the caller then runs the original graph.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta.get("example_value", example) for node, example in zip(inputs, examples, strict=True)]
    try:
        traced = retraced(_without_batches(module), fakes)
    except Exception as failure:
        raise CaptureError(
            "retrace the Dynamo graph into ATen operators",
            first_line(failure),
            "the original graph runs unchanged",
        ) from failure
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise CaptureError(
            "retrace the Dynamo graph", "a graph with other inputs", "the original graph runs unchanged"
        )
    if holds_traced_values(traced):
        raise CaptureError(
            "retrace the Dynamo graph",
            "a value that is neither an input nor computed from one, as inside of torch.func transforms",
            "the original graph runs unchanged",
        )
    _tell_backends(traced, module)
    roles = {
        new: _dynamo_role(old, example)
        for new, old, example in zip(placeholders, inputs, examples, strict=True)
    }
    values = dict(zip(placeholders, examples, strict=True))
    program = program_of(traced, roles, values)
    keep(
        program, (node for node in placeholders if roles[node] is not Role.INPUT and is_watched(values[node]))
    )
    # What a module keeps is read as it is; only what is handed over needs to be known by its origin.
    handed = (node for node in values if roles.get(node) is Role.INPUT)
    marks = {node: mark for node in handed if (mark := mark_on(values[node]))}
    return graft(program, marks) if marks else program


def _without_batches(module: fx.GraphModule) -> fx.GraphModule:
    """The graph itself, or a copy of it without vmap."""
    if not has_batches(module):
        return module
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    flatten_batches(copied)
    return copied


def retraced(module: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """The graph of the operators, one placeholder per input.

    The inputs go in as one list: `make_fx` would make a function with as many arguments, whose frame, deep in the stack
    and larger than one of the interpreter's blocks of frames, slows every call below it.
    """
    retrace = Retrace(module, Common.of(module, fakes))
    with fx.traceback.preserve_node_meta(), closing(retrace.common):
        tracing = make_fx(lambda inputs: retrace.run(*inputs), pre_dispatch=True, tracing_mode="symbolic")
        traced = tracing(list(fakes))
    traced.graph.set_codegen(fx.graph.CodeGen())
    output = traced.graph.output_node()
    output.args = (tuple(output.args[0]),)  # type: ignore[arg-type]  # the list of the results
    traced.recompile()
    return traced


def _tell_backends(traced: fx.GraphModule, module: fx.GraphModule) -> None:
    """Hand on what Dynamo tells backends of the inputs: where they come from, which of them keep their address.

    Without it gradients of DistributedDataParallel are not sent in buckets and CUDA graphs copy the weights.
    """
    known: dict[str, Any] = getattr(module, "_param_name_to_source", {})
    vars(traced)["_param_name_to_source"] = known
    own = [*dict(traced.named_parameters()), *dict(traced.named_buffers())]
    if known.keys() >= set(own):
        traced.meta.update(module.meta)
    inputs = (graph.find_nodes(op="placeholder") for graph in (traced.graph, module.graph))
    for new, old in zip(*inputs, strict=True):
        told = {
            key: value for key, value in old.meta.items() if key != "grapharg"
        }  # it holds the example itself
        new.meta = {**told, **new.meta}
        new._dynamo_source = getattr(old, "_dynamo_source", None)


def holds_traced_values(traced: fx.GraphModule) -> bool:
    """Whether tracing lost sight of a value and wrote it down as a constant, which it is not."""
    held = (_attribute(traced, str(node.target)) for node in traced.graph.find_nodes(op="get_attr"))
    return any(isinstance(value, FakeTensor) or _is_wrapped(value) for value in held)


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _dynamo_role(node: fx.Node, example: Any) -> Role:
    """What an input is by where it comes from: a path through modules to a parameter, a buffer or another attribute.

    `torch.func.functional_call` puts plain tensors where a module has parameters, and arguments of the caller as well.
    """
    source = getattr(node, "_dynamo_source", None)
    path = str(source.name) if source is not None else "L['self']" if node.name.startswith("l_self_") else ""
    if isinstance(example, torch.nn.Parameter) or "._parameters[" in path:
        return Role.PARAMETER
    if _is_sharded(source) and "._buffers[" not in path:
        return Role.PARAMETER
    kept = path.startswith(("L['self']", "G[")) or "._modules[" in path or "._buffers[" in path
    return Role.BUFFER if kept or _is_of_a_module(source) else Role.INPUT


def _is_of_a_module(source: Any) -> bool:
    """Whether a value is an attribute of a module, whatever its code calls itself."""
    owner = getattr(source, "guard_source", None)
    return owner is not None and bool(owner.is_specialized_nn_module() or owner.is_unspecialized_nn_module())


def _is_sharded(source: Any) -> bool:
    """Whether a value belongs to a module of FullyShardedDataParallel, which keeps parameters as plain attributes."""
    owner = getattr(source, "guard_source", None)
    return owner is not None and bool(owner.is_fsdp_module())


def parameter_paths(module: fx.GraphModule) -> dict[int, str]:
    """The parameters among the inputs of a Dynamo graph: by place, the path from the module whose code it is."""
    paths: dict[int, str] = {}
    for place, node in enumerate(module.graph.find_nodes(op="placeholder")):
        path = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
        if "._parameters[" in path:
            paths[place] = clean_path(path)
    return paths


def capture_export(
    program: ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    is_final: bool = True,
) -> Program:
    """A program from a copy of an exported program's graph, its regions inlined.

    What is not trained keeps its numbers; unless it `is_final`, a state dict does not, as another may be loaded.
    """
    module = copy.copy(program.graph_module)
    module = fx.GraphModule(module, copy.deepcopy(program.graph_module.graph))
    module.meta.update(program.graph_module.meta)
    inputs = (graph.find_nodes(op="placeholder") for graph in (module.graph, program.graph_module.graph))
    for copied, original in zip(*inputs, strict=True):
        # A copy gives an argument called `input` another name, and the signature goes by names.
        copied.name = original.name
    inline_regions(module)
    if has_batches(module):
        flatten_batches(module)
    placeholders = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    examples = _flat_examples(program, args, kwargs)
    roles: dict[fx.Node, Role] = {}
    values: dict[fx.Node, Any] = {}
    kept: list[fx.Node] = []
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        roles[node] = Role.LITERAL if _is_literal(spec) else _KINDS.get(spec.kind, Role.INPUT)
        if spec.kind is InputKind.USER_INPUT:
            values[node] = examples.pop(0) if examples else None
        elif spec.target is not None:
            values[node] = program.state_dict.get(spec.target, program.constants.get(spec.target))
        stays = is_final or spec.target not in program.state_dict or _is_traced_constant(spec.target)
        if (
            stays
            and spec.kind is not InputKind.USER_INPUT
            and not getattr(values[node], "requires_grad", True)
        ):
            kept.append(node)
    captured = program_of(module, roles, values)
    keep(captured, kept)
    return captured


def _is_traced_constant(name: str) -> bool:
    """Whether torch.fx named a tensor that it met while it traced: a number of the code, no state of the model."""
    return name.rpartition(".")[2].startswith("_tensor_constant")


def release_export(program: ExportedProgram, captured: Program) -> ExportedProgram:
    """The exported program again, with a graph that was captured from it and rewritten."""
    outline_regions(captured.module)
    signature = copy.deepcopy(program.graph_signature)
    results = captured.graph.output_node().args[0]
    assert isinstance(results, list | tuple)
    for spec, result in zip(signature.output_specs, results, strict=True):
        if isinstance(result, fx.Node):
            spec.arg.name = result.name
    return ExportedProgram(
        captured.module,
        captured.graph,
        signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def export_traced(module: fx.GraphModule, args: tuple[Any, ...]) -> ExportedProgram:
    """A traced module as an exported program, of any size unless it was traced on tensors of one."""
    of_one_size = any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)
    sizes = pytree.tree_map(
        lambda leaf: dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None,
        args,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not of_one_size:
                with suppress(Exception):
                    return torch.export.export(module, args, dynamic_shapes=sizes, strict=False)
            return torch.export.export(module, args, strict=False)
    except Exception as failure:
        raise CaptureError(
            f"run a GraphModule on {len(args)} example arguments",
            first_line(failure),
            "the tensors that its forward accepts, in their order, as `args`",
        ) from failure


def _is_literal(spec: InputSpec) -> bool:
    """Whether an input is a tensor the code makes of numbers: nobody can reach it to write to it."""
    return spec.kind is InputKind.CONSTANT_TENSOR and str(spec.target).startswith("lifted_tensor")


def _is_lifted(node: fx.Node) -> bool:
    """The same for an attribute of a traced graph: `torch.tensor(...)` is read through a lift and nothing else."""
    return bool(node.users) and all(op_name(user).startswith("aten::lift_fresh") for user in node.users)


def has_unknown_sizes(program: ExportedProgram) -> bool:
    """Whether a tensor of the program has a size that depends on values, such as the patches of a grid of images."""
    fakes = (node.meta.get("val") for node in program.graph.nodes)
    return any(free_unbacked_symbols(fake) for fake in fakes if isinstance(fake, torch.Tensor))


def _flat_examples(program: ExportedProgram, args: Sequence[Any], kwargs: dict[str, Any] | None) -> list[Any]:
    if not args and not kwargs:
        given = program.example_inputs
        if given is None:
            return []
        args, kwargs = given
    return list(pytree.tree_leaves((tuple(args), dict(kwargs or {}))))


def program_of(module: fx.GraphModule, roles: dict[fx.Node, Role], values: dict[fx.Node, Any]) -> Program:
    """A program of a flat graph; what its attributes hold is read off the module."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(module, str(node.target))
            values[node] = value if isinstance(value, torch.Tensor) else None
            stored = Role.LITERAL if _is_lifted(node) else Role.BUFFER
            roles[node] = Role.PARAMETER if isinstance(value, torch.nn.Parameter) else stored
            if isinstance(value, torch.Tensor):
                node.meta.setdefault("val", value)
    return Program(module, roles, values, frozenset(without_gradient(module.graph)))


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
