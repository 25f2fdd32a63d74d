"""Write a graph so that a file is whole or not there: checked and verified under another name, then renamed."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from grape_compile.errors import GrapeError
from grape_compile.export.onnx.lower import Lowered

#: What one file of protocol buffers can hold.
LIMIT: Final = 2 * 1024**3 - 64 * 1024**2
#: Bytes of a tensor that stays in the file itself.
SMALL: Final = 1024


def write(model: ir.Model, path: Path, external_above: int | None) -> Path | None:
    """Write a graph, its weights in a second file where they are more than `external_above` bytes; return that.

    None for `external_above` keeps everything in one file; GrapeError where that is larger than a file can be.
    """
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if external_above is None and size > LIMIT:
        raise GrapeError(
            f"write {path.name} as one file",
            f"{size / 2**30:.1f} GiB of weights; a file holds 2 GiB",
            "external_data_above=... in bytes, for weights in a file of their own",
        )
    if external_above is None or size <= external_above:
        ir.save(model, path)
        return None
    data = path.with_name(f"{path.name}.data")
    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor) and held.nbytes <= SMALL:
            # onnx-ir would close the file that it is read from, which a replay may still look into.
            value.const_value = ir.Tensor(held.numpy().copy(), name=held.name)
    ir.save(model, path, external_data=data.name, size_threshold_bytes=SMALL)
    return data


def check(path: Path) -> None:
    """Run the checker of onnx over a file; GrapeError for what it finds."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as failure:
        raise GrapeError(
            f"write a valid ONNX file {path.name}",
            str(failure).splitlines()[0],
            "a report of this: it is a defect",
        ) from failure


def describe(model: ir.Model, target: str, lowered: Sequence[Lowered]) -> None:
    """Put into a graph who made it and the encodings it holds, as text that `grape_compile.encoding.parse` reads."""
    version = importlib.metadata.version("grape-compile")
    model.producer_name, model.producer_version = "grape-compile", version
    texts = [each.encoding for each in lowered if each.encoding != "attention"]
    model.metadata_props.update(
        {
            "grape_compile.version": version,
            "grape_compile.target": target,
            "grape_compile.encodings": json.dumps(list(dict.fromkeys(texts))),
        }
    )
