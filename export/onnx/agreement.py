"""Whether a rewritten file computes what the original does: both run side by side, held to the original in fp64.

The original in fp64 is its graph read as ATen operators and replayed. Where a node of it is not known, the original
itself is what the new file is held to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import sympy  # type: ignore[import-untyped]  # it has no annotations
import torch

from grape_compile.errors import GrapeError
from grape_compile.export.comparison import Comparison
from grape_compile.export.contract import FACTOR, FLOOR
from grape_compile.export.deviation import Deviation
from grape_compile.export.onnx.emit_blocks import SMALLEST
from grape_compile.export.onnx.reading.examples import Example, Feeds, inputs_of
from grape_compile.export.onnx.reading.trace import Imported
from grape_compile.export.onnx.runs import Arrays, Session
from grape_compile.passes.graph import Unreadable
from grape_compile.passes.replay import Replay, exact
from grape_compile.passes.sizes import Sizes

_AGAINST = ", against the original"
_APART = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2}
"""How far two computations of one function are apart by rounding, which grows with depth. A replay farther from the
original than this is no oracle; where there is none, it is how far the files may differ."""


@dataclass(frozen=True)
class _Case:
    name: str
    feeds: Feeds
    sizes: Mapping[str, int]


class Judge:
    """Holds a new file to the original, on one and on three rows, padded, token by token, without a past."""

    def __init__(self, graph: ir.Graph, example: Example, imported: Imported, original: Session) -> None:
        self.original, self.inputs = original, [str(value.name) for value in inputs_of(graph)]
        self.program = imported.apart()
        self.symbols = {name: symbol for symbol, name in imported.symbols.items()}
        self.cases = list(_cases(graph, example))

    def compare(self, rewritten: Session) -> tuple[Comparison, ...]:
        """The errors of both files, case by case; a case that neither takes is none.

        Raises GrapeError where the new one is wrong by more than 1.25 times the original's largest error, plus 1e-7.
        """
        found: list[Comparison] = []
        for case in self.cases:
            old, new = self._run(self.original, case), self._run(rewritten, case)
            if new is None and old is None:
                continue
            if new is None:
                raise _disagreement(f"for {case.name} it does not run")
            truth = self._exact(case)
            if truth is not None and old is not None and _error(old, truth) <= _apart(old):
                found.append(Comparison(case.name, _error(new, truth), _error(old, truth)))
            elif old is not None:
                found.append(Comparison(f"{case.name}{_AGAINST}", _error(new, old), 0.0))
                if not found[-1].file <= _apart(old):
                    raise _disagreement(f"for {case.name} it differs by {found[-1].file:.3g}")
            elif truth is not None:
                found.append(
                    Comparison(f"{case.name}, which the original does not run", _error(new, truth), 0.0)
                )
        held = [each for each in found if not each.case.endswith(_AGAINST)]
        bound = FACTOR * max((each.original for each in held), default=0.0) + FLOOR
        for each in held:
            if not each.file <= bound:
                raise _disagreement(f"for {each.case} its error is {each.file:.3g}, more than {bound:.3g}")
        if not found:
            raise _disagreement("there is no size at which both could be compared")
        return tuple(found)

    def _run(self, session: Session, case: _Case) -> Arrays | None:
        return None if session.refuses(case.feeds) else _alive(session.run(case.feeds), case.feeds)

    def _exact(self, case: _Case) -> Arrays | None:
        """What the original computes in fp64; None where a node of it is not known."""
        binding: dict[Any, Any] = {
            self.symbols[name]: sympy.Integer(size) for name, size in case.sizes.items()
        }
        places = self.program.graph.find_nodes(op="placeholder")
        bound = {
            node: exact(torch.from_numpy(case.feeds[name]))
            for node, name in zip(places, self.inputs, strict=False)
        }
        replay = Replay(self.program, Sizes(binding), bound)
        results: Any = self.program.graph.output_node().args[0]
        try:
            with torch.no_grad():
                return _alive([replay.tensor(result).numpy() for result in results], case.feeds)
        except Unreadable:
            return None


def _cases(graph: ir.Graph, example: Example) -> Iterator[_Case]:
    chosen = [
        (example, False),
        (example.resized(graph, 1, SMALLEST), False),  # more queries than one block of a loop has
        (example.resized(graph, 3, -3), False),
        (example.resized(graph, 3, 5), True),
        (example.resized(graph, 2, one=True), False),
    ]
    without = example.resized(graph, 3, past=False)
    chosen += [(without, False)] if 0 in without.sizes.values() else []
    # A file without open sizes has one case.
    for each, padded in chosen if example.sizes else chosen[:1]:
        name = ", ".join(f"{axis} {size}" for axis, size in each.sizes.items()) or "its own sizes"
        feeds = each.feeds(graph, padded=padded)
        hidden = padded and any("mask" in own and not held.all() for own, held in feeds.items())
        yield _Case(name + (", padded" if hidden else ""), feeds, each.sizes)


def _alive(results: Arrays, feeds: Feeds) -> Arrays:
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


def _apart(results: Arrays) -> float:
    return max((_APART.get(str(each.dtype), 0.0) for each in results), default=0.0)


def _error(results: Arrays, truth: Arrays) -> float:
    """Relative root-mean-square difference, the largest over the results."""
    return max(
        (Deviation().add(one, other).relative for one, other in zip(results, truth, strict=True)), default=0.0
    )


def _disagreement(found: str) -> GrapeError:
    return GrapeError(
        "rewrite an ONNX file",
        found,
        "the original file, which is as it was, and a report of this: no file is left",
    )
