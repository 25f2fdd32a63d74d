"""ONNX Runtime on one file: what it gives for inputs, what it refuses, how large the values in between are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from grape_compile.export.onnx.runtime import runtime, session

Arrays = list["np.ndarray[Any, np.dtype[Any]]"]


class Session:
    """A file, or the bytes of one whose data lies in a folder, run on the CPU.

    Raises GrapeError where ONNX Runtime does not load it.
    """

    def __init__(self, model: Path | bytes, folder: Path | None = None) -> None:
        self.session = session(model, folder=folder)
        self.options = runtime().RunOptions()
        self.options.log_severity_level = 4  # what it refuses is asked for, and told in errors

    def run(self, feeds: Mapping[str, Any]) -> Arrays:
        """The results for these inputs."""
        return list(self.session.run(None, dict(feeds), self.options))

    def refuses(self, feeds: Mapping[str, Any]) -> str | None:
        """Why it does not run on these inputs, or nothing."""
        try:
            self.run(feeds)
        except Exception as failure:
            return str(failure).splitlines()[0]
        return None


def measure(
    model: ir.Model, folder: Path, feeds: Mapping[str, Any], values: Sequence[ir.Value]
) -> dict[ir.Value, tuple[int, ...]]:
    """The sizes of values inside of a model in one run."""
    graph = model.graph
    own = len(graph.outputs)
    asked = [value for value in values if not value.is_graph_output() and value.dtype is not None]
    graph.outputs.extend(asked)
    try:
        content = ir.to_proto(model).SerializeToString()
    finally:
        del graph.outputs[own:]
    results = Session(content, folder).run(feeds)
    return {value: np.asarray(result).shape for value, result in zip(asked, results[own:], strict=True)} | {
        value: np.asarray(result).shape for value, result in zip(graph.outputs, results, strict=False)
    }
