"""From a program to a module of Relax by the portable ONNX file: where TVM's importer of programs lacks an operator."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from torch.export import ExportedProgram
from tvm.relax.frontend import detach_params
from tvm.relax.frontend.onnx import from_onnx

from grape_compile.errors import CaptureError, GrapeError, first_line
from grape_compile.export.onnx import export
from grape_compile.export.tvm.importing import MAIN
from grape_compile.kernels.tensorir.engine import IRModule

#: TVM reads few operators of an ONNX file whose sizes are computed.
WORKS: Final = "a model without that operator, or sizes that are known: dynamic_shapes=None"


def imported_by_onnx(program: ExportedProgram, why: CaptureError) -> tuple[IRModule, Mapping[str, Any]]:
    """Return a module whose `main` takes the inputs and then the weights, and these by name.

    Raises CaptureError with both reasons where this way is closed too; `why` is that of the other.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            # For no provider of ONNX Runtime: TVM reads no loops.
            export(program, path=path, target="portable", providers=(), verify=False)
            module = from_onnx(onnx.load(path), keep_params_in_input=True)
    except Exception as failure:
        reason = failure.found if isinstance(failure, GrapeError) else first_line(failure)
        raise CaptureError(why.asked, f"{why.found}; by ONNX: {reason}", WORKS) from failure
    module, weights = detach_params(module)
    main = module[MAIN]
    names = [parameter.name for parameter in main.params[int(main.attrs["num_input"]) :]]
    return module, dict(zip(names, weights[MAIN], strict=True))
