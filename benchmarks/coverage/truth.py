"""Counts what a model rotates and biases in one forward pass, by patching its own functions while it runs.

A rotation is a floating tensor returned by the outermost call of a function that says it rotates
(`apply_rotary_pos_emb`, `rotate_queries_or_keys`, the forward of a rotary module that is given queries). A bias is a
call of an attention layer that is handed an ALiBi tensor. Nothing here looks at a graph.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

ROTATES = re.compile(
    r"_?(vision_)?apply_\w*(rot|rope)\w*|_?apply_multimodal\w*|"
    r"rotate_(half\w*|every_two|pairwise|queries_or_keys)"
)
ROTARY_CLASS = re.compile(r"Rot(ary|ator)|RoPE")
QUERY_NAMES = {"q", "query", "queries", "query_states", "xq", "t"}
ALIBI_ARGUMENTS = ("alibi", "position_bias")


@dataclass
class Count:
    """Tensors rotated and layers biased so far, and the functions that did it."""

    rotations: int = 0
    biases: int = 0
    functions: dict[str, int] = field(default_factory=dict)
    depth: int = 0

    @property
    def sites(self) -> int:
        return self.rotations + self.biases


@contextmanager
def counting(model: nn.Module) -> Iterator[Count]:
    """Count what happens to the model while the context is open."""
    count = Count()
    with ExitStack() as patches:
        for module in _modules_of(model):
            for owner, name, replacement in _replacements(module, count):
                patches.enter_context(patch.object(owner, name, replacement))
        yield count


def has_encoding_code(module: ModuleType) -> bool:
    """Whether a modeling module holds anything that `counting` would patch."""
    return next(_replacements(module, Count()), None) is not None


def _modules_of(model: nn.Module) -> list[ModuleType]:
    """The Python modules whose code the model runs."""
    names = {base.__module__ for part in model.modules() for base in type(part).__mro__}
    return [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]


def _replacements(module: ModuleType, count: Count) -> Iterator[tuple[object, str, object]]:
    names_alibi = any("alibi" in name for name in vars(module))
    for name, value in list(vars(module).items()):
        if inspect.isfunction(value) and ROTATES.fullmatch(name):
            yield module, name, _counts_results(value, count)
        elif inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, nn.Module):
            yield from _method_replacements(value, count, names_alibi)


def _method_replacements(
    owner: type, count: Count, names_alibi: bool
) -> Iterator[tuple[object, str, object]]:
    for name, value in list(vars(owner).items()):
        method = value.__func__ if isinstance(value, staticmethod) else value
        if not inspect.isfunction(method):
            continue
        arguments = list(inspect.signature(method).parameters)
        rotary_forward = name == "forward" and ROTARY_CLASS.search(owner.__name__)
        if ROTATES.fullmatch(name) or (rotary_forward and QUERY_NAMES & set(arguments[1:3])):
            counted = _counts_results(method, count)
            yield owner, name, staticmethod(counted) if isinstance(value, staticmethod) else counted
        elif (
            name == "forward"
            and names_alibi
            and "Attention" in owner.__name__
            and set(ALIBI_ARGUMENTS) & set(arguments)
        ):
            yield owner, name, _counts_bias(method, count)


def _counts_results(function: Callable[..., Any], count: Count) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count.depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            count.depth -= 1
        if count.depth == 0:
            found = _floating(result)
            count.rotations += found
            label = f"{function.__module__.rsplit('.', 1)[-1]}.{function.__qualname__}"
            count.functions[label] = count.functions.get(label, 0) + found
        return result

    return counted


def _floating(result: Any) -> int:
    results = result if isinstance(result, tuple | list) else (result,)
    return sum(
        isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()) for each in results
    )


def _counts_bias(forward: Callable[..., Any], count: Count) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given: Mapping[str, Any] = signature.bind(*args, **kwargs).arguments
        count.biases += any(isinstance(given.get(name), torch.Tensor) for name in ALIBI_ARGUMENTS)
        return forward(*args, **kwargs)

    return counted
