"""Numbers of a program that follow from its parameters alone, made when the file is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.node import map_arg

from grape_compile.passes.graph import op_name


def fold_parameters(program: ExportedProgram) -> ExportedProgram:
    """Replace what is computed from parameters and buffers alone by its numbers, where a file gains by it.

    1. A slot of a `grape::` operator (a learned spectrum, a basis): ONNX Runtime would compute it at every run.
    2. The result of linear algebra (`linalg_solve`, `linalg_matrix_exp`): ONNX has no such operator.

    Everything else stays, so that weights are not stored twice. The program given is left as it is.
    """
    held = _held(program)
    fixed: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            fixed[node] = node.name in held
        else:
            fixed[node] = _is_pure(node) and all(fixed[each] for each in node.all_input_nodes)
    chosen = [node for node in program.graph.nodes if fixed[node] and _gains(node)]
    if not chosen:
        return program
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        numbers = {node.name: _value(node, held, values) for node in chosen}
    # A result may be the parameter itself; a constant of a program is no parameter.
    made = {name: each.detach().clone() for name, each in numbers.items() if isinstance(each, Tensor)}
    return _with_constants(program, made)


def _held(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers that nobody writes to, and constants, by the names of their placeholders."""
    written = set(program.graph_signature.buffers_to_mutate.values())
    found = {}
    for spec in program.graph_signature.input_specs:
        target = spec.target
        if spec.kind is InputKind.USER_INPUT or target is None or target in written:
            continue
        value = program.state_dict.get(target, program.constants.get(target))
        if isinstance(value, Tensor):
            found[spec.arg.name] = value
    return found


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        tags, schema = node.target.tags, node.target._schema
        return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags
    return op_name(node).endswith("getitem")


def _gains(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        "linalg" in str(node.target) or any(op_name(user).startswith("grape::") for user in node.users)
    )


def _value(node: fx.Node, held: dict[str, Tensor], values: dict[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        return held[node.name]
    if node not in values:
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: _value(each, held, values))
        assert callable(node.target), "a node that is pure is a call"
        values[node] = node.target(*args, **kwargs)
    return values[node]


def _with_constants(program: ExportedProgram, numbers: dict[str, Tensor]) -> ExportedProgram:
    """A program that reads these numbers where it computed the nodes of their names."""
    module = copy.deepcopy(program.graph_module)
    signature = copy.deepcopy(program.graph_signature)
    nodes = {node.name: node for node in module.graph.nodes}
    first = next(iter(_user_inputs(signature.input_specs)), len(signature.input_specs))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    anchor = placeholders[first] if first < len(placeholders) else placeholders[-1].next
    for name in numbers:
        old = nodes[name]
        with module.graph.inserting_before(anchor):
            new = module.graph.placeholder(f"c_{name}_folded")
        new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new)
        constant = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(new.name), new.name, None)
        signature.input_specs.insert(first, constant)
        first += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return ExportedProgram(
        module,
        module.graph,
        signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        {**program.constants, **{f"c_{name}_folded": number for name, number in numbers.items()}},
        verifiers=program.verifiers,
    )


def _user_inputs(specs: list[InputSpec]) -> Iterator[int]:
    return (number for number, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
