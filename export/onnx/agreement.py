"""Whether a rewritten file computes what the original does: both run side by side, held to the original in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from grape_compile.errors import GrapeError
from grape_compile.export.onnx.reading.examples import Example, Feeds, axes_of, inputs_of
from grape_compile.export.onnx.reading.trace import Imported
from grape_compile.export.onnx.runs import Session
from grape_compile.passes.graph import Program, Sizes, Unreadable
from grape_compile.passes.replay import Replay, exact

FACTOR, FLOOR = 1.25, 1e-7
"""A rewritten file may be wrong by this much more than the original is, both against fp64."""

_BLIND = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2}
"""How far the files may differ where the original cannot be replayed in fp64: rounding grows with depth."""


@dataclass(frozen=True)
class Comparison:
    """Both files on one example: its sizes, and the relative RMS error of each against fp64.

    `difference` is that of one file against the other; errors are None where nothing tells the exact result.
    """

    sizes: str
    difference: float
    original: float | None
    rewritten: float | None


class Judge:
    """Compares files with the original one, on examples of one and of three rows, with padding where there are masks."""

    def __init__(self, graph: ir.Graph, example: Example, imported: Imported, original: Session) -> None:
        self.graph, self.example, self.original = graph, example, original
        self.program, self.symbols = imported.apart(), {name: each for each, name in imported.symbols.items()}

    def examples(self) -> Iterator[tuple[str, Feeds, Mapping[str, int]]]:
        """Rows of 1 and 3, other lengths, padded rows; sizes the original does not take are left out."""
        sizes = dict(self.example.sizes)
        batch = self._batch()
        for rows, longer, padded in ((None, 0, False), (1, 3, False), (3, -3, False), (3, 5, True)):
            chosen = {
                name: (rows or size) if name == batch else max(2, size + longer) for name, size in sizes.items()
            }
            case = Example(chosen, self.example.relations)
            feeds = case.feeds(self.graph, padded=padded)
            if self.original.refuses(feeds) is None:
                told = ", ".join(f"{name} {size}" for name, size in chosen.items()) or "its own sizes"
                yield told + (", padded" if padded else ""), feeds, chosen

    def _batch(self) -> str | None:
        """The name of the first axis of the inputs."""
        first = (axes_of(value)[0] for value in inputs_of(self.graph) if axes_of(value))
        return next((axis for axis in first if isinstance(axis, str)), None)

    def compare(self, rewritten: Session) -> tuple[Comparison, ...]:
        """One comparison for each example. Raises GrapeError where the files disagree."""
        found = []
        for told, feeds, sizes in self.examples():
            exact_results = self._exact(feeds, sizes)
            old = self._alive(self.original.run(feeds), feeds)
            refused = rewritten.refuses(feeds)
            if refused is not None:
                raise _disagreement(f"for {told} it does not run: {refused}")
            new = self._alive(rewritten.run(feeds), feeds)
            truth = None if exact_results is None else self._alive(exact_results, feeds)
            found.append(
                Comparison(
                    told,
                    _error(new, old),
                    None if truth is None else _error(old, truth),
                    None if truth is None else _error(new, truth),
                )
            )
            self._hold(found, np.asarray(self.original.run(feeds)[0]).dtype)
        return tuple(found)

    def _hold(self, found: list[Comparison], dtype: Any) -> None:
        last = found[-1]
        if last.original is None or last.rewritten is None:
            bound = _BLIND.get(str(dtype), _BLIND["float32"])
            if not last.difference <= bound:
                raise _disagreement(f"for {last.sizes} it differs by {last.difference:.3g}, more than {bound:g}")
        elif not last.rewritten <= FACTOR * max(each.original or 0.0 for each in found) + FLOOR:
            raise _disagreement(
                f"for {last.sizes} its error is {last.rewritten:.3g}, that of the original {last.original:.3g}"
            )

    def _exact(self, feeds: Feeds, sizes: Mapping[str, int]) -> list[Any] | None:
        """What the original computes in fp64; None where a node of it is not known."""
        program: Program = self.program
        binding: dict[Any, Any] = {self.symbols[name]: sympy.Integer(size) for name, size in sizes.items()}
        places = [node for node in program.graph.find_nodes(op="placeholder")]
        bound = {
            node: exact(torch.from_numpy(feeds[str(value.name)]))
            for node, value in zip(places, inputs_of(self.graph), strict=False)
        }
        replay = Replay(program, Sizes(binding), bound)
        results: Any = program.graph.output_node().args[0]
        try:
            with torch.no_grad():
                return [replay.tensor(result).numpy() for result in results]
        except Unreadable:
            return None

    def _alive(self, results: list[Any], feeds: Feeds) -> list[Any]:
        """Results without the rows of padded tokens, which mean nothing: a softmax over no key is arbitrary."""
        mask = next((held for name, held in feeds.items() if "mask" in name and held.ndim == 2), None)
        if mask is None or bool(mask.all()):
            return results
        return [
            result[mask[:, -result.shape[1] :].astype(bool)]
            if result.ndim > 2 and result.shape[0] == mask.shape[0] and result.shape[1] <= mask.shape[1]
            else result
            for result in results
        ]


def _error(results: list[Any], truth: list[Any]) -> float:
    """Relative root-mean-square difference, the largest over the results."""
    return max((_relative(one, other) for one, other in zip(results, truth, strict=True)), default=0.0)


def _relative(one: Any, other: Any) -> float:
    if one.shape != other.shape:
        return float("inf")
    if other.dtype.kind in "ib":
        return 0.0 if bool((one == other).all()) else float("inf")
    first, second = one.astype(np.float64), other.astype(np.float64)
    if bool((np.isfinite(first) != np.isfinite(second)).any()):
        return float("inf")
    both = np.isfinite(second)
    scale = float(np.sqrt(np.mean(second[both] ** 2))) if both.any() else 0.0
    distance = float(np.sqrt(np.mean((first[both] - second[both]) ** 2))) if both.any() else 0.0
    return distance / scale if scale else distance


def _disagreement(found: str) -> GrapeError:
    return GrapeError("rewrite an ONNX file", found, "the original file, which is as it was; please report this model")
