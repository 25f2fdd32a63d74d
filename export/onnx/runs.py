"""ONNX Runtime on one file: what it gives for inputs, what it refuses, how large the values in between are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from grape_compile.errors import CaptureError
from grape_compile.export.onnx.reading.trace import Seen
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
    model: ir.Model, folder: Path, feeds: Sequence[Mapping[str, Any]], values: Sequence[ir.Value]
) -> list[Seen]:
    """What values inside of a model are in a run on each of some inputs. Raises CaptureError where one is no tensor."""
    graph = model.graph
    own = len(graph.outputs)
    inside = [value for value in values if not value.is_graph_output()]
    graph.outputs.extend(inside)
    try:
        order = {value: place for place, value in enumerate(graph.outputs)}
        content = ir.to_proto(model).SerializeToString()
    finally:
        del graph.outputs[own:]
    session = Session(content, folder)
    results = [session.run(each) for each in feeds]
    found = []
    for value in values:
        arrays = [run[order[value]] for run in results]
        try:
            dtype = torch.from_numpy(arrays[0]).dtype
        except TypeError as failure:
            raise CaptureError(
                "read an ONNX graph as ATen operators",
                f"{value.name} is no tensor of numbers",
                "a graph of tensors",
            ) from failure
        found.append(Seen(tuple(array.shape for array in arrays), dtype))
    return found
