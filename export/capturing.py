"""From a module and example arguments to an exported program whose batch and sequence are open."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from grape_compile.errors import CaptureError, ModelError
from grape_compile.passes.marks import is_marked
from grape_compile.passes.pipeline import rewrite_export

#: Names of the sizes that are shared by the inputs.
BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True)
class Captured:
    """A program, what runs it eagerly, and the names of its tensors in order.

    `axes` names sizes that have no name; `kind` is the class that was asked for, for messages.
    """

    program: ExportedProgram
    model: nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    kind: str = "a program"


def capture(
    model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: dict[str, Any], shapes: Any
) -> Captured:
    """Export a module in evaluation mode, or take a program as it is.

    `shapes` as torch.export takes them; "auto" opens the first axis of all inputs (`batch`) and the second of whole
    numbers (`sequence`), None leaves every size as it is. Raises ModelError for anything else than a model,
    CaptureError for one that torch.export refuses.
    """
    if isinstance(model, ExportedProgram):
        return _named(model, model.module())
    if not isinstance(model, nn.Module):
        raise ModelError(
            "export a model", f"a {type(model).__name__}", "a torch.nn.Module or an ExportedProgram"
        )
    kwargs = _without_cache(model, kwargs)
    args, kwargs = _whole((tuple(args), kwargs))
    if shapes == "auto":
        args, kwargs = _wide((args, kwargs))
    failure: Exception | None = None
    # torch opens what it can; a model that decides on a size of its own accord is exported at that size.
    for candidate in (_opened(model, args, kwargs), None) if shapes == "auto" else (shapes,):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, args, kwargs, dynamic_shapes=candidate, strict=False)
        except Exception as refused:
            failure = failure or refused
            continue
        return _named(
            program,
            model,
            _axes(*program.example_inputs) if shapes == "auto" and program.example_inputs else (),
        )
    assert failure is not None
    lines = str(failure).strip().splitlines()
    raise CaptureError(
        f"export {type(model).__name__} with torch.export",
        f"{type(failure).__name__}: {lines[0] if lines else ''}",
        "arguments the model's forward accepts, and a forward without decisions on values",
    ) from failure


def _without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A language model returns a cache unless told otherwise; a file without a cache has no use for it."""
    config = getattr(model, "config", None)
    asks = getattr(config, "use_cache", None)
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return (
        {**kwargs, "use_cache": False} if asks is not None and takes and "use_cache" not in kwargs else kwargs
    )


def _whole(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give every tensor memory of its own: torch.export writes guards about the tensor that another is a part of."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs
    )
    return copied


def _wide(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: torch.export takes a size of one for a constant."""
    tensors = _tensors(inputs)
    if not tensors or any(each.dim() == 0 or each.shape[0] != 1 for each in tensors):
        return inputs
    repeated: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, inputs
    )
    return repeated


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _opened(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the dynamic shapes that open every size."""
    names = list(inspect.signature(model.forward).parameters)
    if len(args) > len(names):
        raise CaptureError(
            "export a model", f"{len(args)} arguments", f"at most {len(names)}: {', '.join(names)}"
        )

    def opened(leaf: Any) -> Any:
        return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, Tensor) else None

    return {
        name: pytree.tree_map(opened, value)
        for name, value in (*zip(names, args, strict=False), *kwargs.items())
    }


def _axes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str | None, ...]]:
    """Name the sizes that all inputs share: their first, and the second of whole numbers."""
    tensors = _tensors((args, kwargs))
    batches = {each.shape[0] for each in tensors if each.dim()}
    lengths = {each.shape[1] for each in tensors if _is_sequence(each)}
    named = []
    for each in tensors:
        names: list[str | None] = [None] * each.dim()
        if each.dim() and len(batches) == 1:
            names[0] = BATCH
        if _is_sequence(each) and len(lengths) == 1:
            names[1] = SEQUENCE
        named.append(tuple(names))
    return named


def _is_sequence(leaf: Tensor) -> bool:
    return leaf.dim() >= 2 and not leaf.is_floating_point()


def _named(
    program: ExportedProgram, model: nn.Module, axes: Sequence[tuple[str | None, ...]] = ()
) -> Captured:
    if is_marked(program.graph_module):
        # The code of an upgraded model has its old encoding: what is compared with is the program that has the new one.
        program, _ = rewrite_export(program, is_final=True)
        model = program.module()
    inputs = [node.name for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    tensors = [
        name
        for name, node in zip(
            inputs, (node for node in program.graph.nodes if node.name in inputs), strict=True
        )
        if isinstance(node.meta.get("val"), Tensor)
    ]
    named = dict(zip(tensors, axes, strict=False))
    return Captured(program, model, tuple(tensors), _output_names(program), named, type(model).__name__)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names by the structure of the result: the fields of an output class, else numbers."""
    spec = program.call_spec.out_spec
    if spec is None:
        return ()
    filler = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    try:
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(filler)[0]]
    except ValueError:  # a class of results that does not tell the names of its parts
        paths = [f"output_{at}" for at in range(spec.num_leaves)]
    names = [_spelled(path) or "output" for path in paths]
    return tuple(names if len(set(names)) == len(names) else [f"output_{at}" for at in range(len(names))])


def _spelled(path: str) -> str:
    text = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in path)
    name = "_".join(text.split())
    return f"output_{name}" if name[:1].isdigit() else name
