"""From a flat program, or an ONNX file, to a module of Relax: here TVM's importers are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import fx
from tvm.relax.frontend.torch import from_exported_program

from grape_compile.errors import CaptureError, first_line
from grape_compile.export.tvm.flattening import Flat
from grape_compile.kernels.tensorir.engine import IRModule, relax
from grape_compile.passes.graph import module_path, source_line

#: The function that a library holds.
MAIN: Final = "main"


def imported(flat: Flat, converters: Mapping[str, Any]) -> IRModule:
    """Return a module whose `main` takes the inputs and then the weights; CaptureError names what is not known.

    `converters` are functions of a node and the importer by the name of an operator, besides those of this file.
    """
    missing = _missing(flat, converters)
    if missing is not None:
        at = ", ".join(part for part in (module_path(missing), source_line(missing)) if part)
        raise CaptureError(
            "import a program into TVM", f"{missing.target} ({at}), which TVM's importer does not have", "ONNX"
        )
    try:
        module = from_exported_program(
            flat.program, custom_convert_map={**_CONVERTERS, **converters}, run_ep_decomposition=False
        )
    except Exception as failure:
        raise CaptureError("import a program into TVM", first_line(failure), "ONNX") from failure
    return with_inputs(module, len(flat.inputs))


def with_inputs(module: IRModule, count: int) -> IRModule:
    """Mark the first parameters of `main` as inputs: what follows are weights."""
    module[MAIN] = module[MAIN].with_attr("num_input", count)
    return module


def _missing(flat: Flat, converters: Mapping[str, Any]) -> fx.Node | None:
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = {*ExportedProgramImporter().convert_map, *_CONVERTERS, *converters}
    calls = (node for node in flat.program.graph.nodes if node.op == "call_function")
    return next((node for node in calls if _name(node) not in known), None)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def dtype_of(node: fx.Node) -> str:
    """Return the dtype of a node's value, by the name that TVM has for it."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _product(node: fx.Node, importer: Any) -> Any:
    """A product of matrices, summed in float32 (float64 for float64) and rounded once, as torch does."""
    left, right = (importer.env[each] for each in node.args)
    return importer.block_builder.emit(_summed(left, right, dtype_of(node)))


def _summed(left: Any, right: Any, dtype: str, bias: Any = None) -> Any:
    wide = dtype if dtype in ("float64", "int64", "int32") else "float32"
    product = relax.op.matmul(left, right, out_dtype=wide)
    if bias is not None:
        product = relax.op.add(product, bias if wide == dtype else relax.op.astype(bias, wide))
    return product if wide == dtype else relax.op.astype(product, dtype)


def _affine(node: fx.Node, importer: Any) -> Any:
    bias, left, right = (importer.env[each] for each in node.args)
    assert node.kwargs.get("alpha", 1) == 1
    assert node.kwargs.get("beta", 1) == 1
    return importer.block_builder.emit(_summed(left, right, dtype_of(node), bias))


def _embedding(node: fx.Node, importer: Any) -> Any:
    """Rows of a table; a number past its end reads the last row instead of foreign memory."""
    table, numbers = (importer.env[each] for each in node.args[:2])
    return importer.block_builder.emit(relax.op.take(table, numbers, axis=0, mode="clip"))


_CONVERTERS: Final[Mapping[str, Any]] = {
    "mm.default": _product,
    "bmm.default": _product,
    "matmul.default": _product,
    "addmm.default": _affine,
    "embedding.default": _embedding,
}

