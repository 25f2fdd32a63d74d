"""Calls to verify a file with: shapes that were not in the example, one row padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from grape_compile.errors import GrapeError
from grape_compile.export.capturing import Captured

#: No case is larger than this along any axis.
_LARGEST: Final = 1 << 20


@dataclass(frozen=True)
class Case:
    """Inputs of one call in the order of the file, and which tokens [B, T] of the results count (None: all)."""

    name: str
    inputs: tuple[Tensor, ...]
    counted: Tensor | None = None


def drawn_cases(captured: Captured, seed: int, *, least: int = 2) -> list[Case]:
    """Return calls at three shapes: one row of `least` tokens, three rows, one of them padded on the left, a short one.

    Whole numbers are drawn from those of the example, real ones with its mean and deviation; sizes that are not open
    stay. GrapeError where a program has no example inputs.
    """
    random = torch.Generator().manual_seed(seed)
    examples = example_tensors(captured.program)
    shapes = _shapes(captured.program, captured.input_names)
    opened = any(not isinstance(size, int) for shape in shapes for size in shape)
    if not opened:
        return [_case("the example's shape", captured, examples, shapes, 1, 0, random)]
    return [
        _case("batch 1", captured, examples, shapes, 1, 3, random, least),
        _case("batch 3, left padding", captured, examples, shapes, 3, 5, random),
        _case("batch 2, short", captured, examples, shapes, 2, -6, random),
    ]


def example_tensors(program: ExportedProgram) -> list[Tensor]:
    """Return the tensors of a program's example inputs in order."""
    given = program.example_inputs
    if given is None:
        raise GrapeError(
            "verify a file", "the program has no example inputs", "a program with them, or verify=False"
        )
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]


def _shapes(program: ExportedProgram, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return the sizes of every input: numbers, and symbolic expressions for those that are open."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [
        tuple(size if isinstance(size, int) else size.node.expr for size in nodes[name].meta["val"].shape)
        for name in names
    ]


def _case(
    name: str,
    captured: Captured,
    examples: Sequence[Tensor],
    shapes: Sequence[tuple[Any, ...]],
    batch: int,
    longer: int,
    random: torch.Generator,
    least: int = 2,
) -> Case:
    sizes = _bound(captured.program, examples, shapes, batch, longer, least)
    inputs, counted = [], None
    for own, example, shape in zip(captured.input_names, examples, shapes, strict=True):
        wanted = [size if isinstance(size, int) else int(size.subs(sizes)) for size in shape]
        drawn = _drawn(example, wanted, random)
        if own.endswith("attention_mask") and drawn.dim() == 2 and batch > 2:
            drawn[0, : max(1, wanted[1] // 3)] = 0
            counted = drawn != 0
        inputs.append(drawn)
    return Case(name, tuple(inputs), counted)


def _bound(
    program: ExportedProgram,
    examples: Sequence[Tensor],
    shapes: Sequence[tuple[Any, ...]],
    batch: int,
    longer: int,
    least: int,
) -> dict[Any, int]:
    """Give every open size a number: rows of a batch, or the example's size and a few more."""
    rows = {symbol for shape in shapes for symbol in _symbols(shape[:1])}
    sizes: dict[Any, int] = dict.fromkeys(rows, batch)
    for example, shape in zip(examples, shapes, strict=True):
        for size, own in zip(shape, example.shape, strict=True):
            for symbol in _symbols((size,)):
                sizes.setdefault(symbol, max(least, int(own) + longer))
    for symbol, limits in program.range_constraints.items():
        if symbol in sizes:
            lower = 1 if symbol in rows else int(limits.lower)
            upper = int(limits.upper) if limits.upper < _LARGEST else _LARGEST
            sizes[symbol] = min(max(sizes[symbol], lower), upper)
    return sizes


def _symbols(sizes: Sequence[Any]) -> list[Any]:
    return [symbol for size in sizes if not isinstance(size, int) for symbol in size.free_symbols]


def _drawn(example: Tensor, shape: Sequence[int], random: torch.Generator) -> Tensor:
    if example.is_floating_point():
        wide = example.double()
        deviation = float(wide.std()) if example.numel() > 1 else 1.0
        numbers = torch.randn(list(shape), generator=random, dtype=torch.float64)
        return (float(wide.mean()) + deviation * numbers).to(example.dtype)
    if example.numel() == 0 or bool((example == example.flatten()[0]).all()):
        return torch.full(
            list(shape), 0 if example.numel() == 0 else example.flatten()[0].item(), dtype=example.dtype
        )
    steps = torch.arange(example.shape[-1]).expand(example.shape)
    if example.dtype != torch.bool and torch.equal(example.to(torch.int64), steps):
        return torch.arange(shape[-1]).expand(list(shape)).to(example.dtype).contiguous()
    chosen = torch.randint(example.numel(), list(shape), generator=random)
    return example.flatten()[chosen]
