"""From a module of Relax to code: operators become loops, loops are scheduled, memory is planned."""

from __future__ import annotations

from typing import Any

from grape_compile.errors import EngineError, first_line
from grape_compile.export.tvm.importing import MAIN
from grape_compile.export.tvm.machine import quiet
from grape_compile.export.tvm.operators import OPAQUE
from grape_compile.kernels.tensorir.engine import IRModule, PrimFunc, Target, is_gpu, relax, tirx, tvm


def compiled(module: IRModule, target: Target) -> Any:
    """Return code whose `main` takes the inputs and a tuple of the weights; EngineError where TVM cannot make it."""
    rules = relax.transform
    passes = [
        rules.BundleModelParams(),
        rules.DecomposeOpsForInference(),
        rules.CanonicalizeBindings(),
        relax.backend.DispatchSortScan(),
        rules.LegalizeOps(),
        rules.AnnotateTIROpPattern(),
        tvm.transform.module_pass(_keep_apart, opt_level=0),
        rules.FoldConstant(),
        rules.FuseOps(),
        rules.FuseTIR(),
        rules.DeadCodeElimination([MAIN]),
    ]
    try:
        with quiet(), target:
            module = tvm.transform.Sequential(passes)(module)
            if is_gpu(target):
                module = _scheduled_for_gpu(module)
            return relax.build(module, target, relax_pipeline="default_build")
    except Exception as failure:
        raise EngineError(f"code for {target.kind.name}", first_line(failure), "another target") from failure


def _keep_apart(module: IRModule, _: Any) -> IRModule:
    """Let nothing be fused with a reshape, which alone moves nothing and is computed place by place in a loop.

    Nor with a function of a size that none of its tensors has: TVM would define the size twice.
    """
    for name, function in module.functions_items():
        if not isinstance(function, PrimFunc) or int(function.attrs["op_pattern"]) == OPAQUE:
            continue
        if relax.analysis.has_reshape_pattern(function) or _takes_a_size(function):
            module[name] = function.with_attr("op_pattern", OPAQUE)
    return module


def _takes_a_size(function: PrimFunc) -> bool:
    numbers = [each for each in function.params if isinstance(each.ty, tvm.ir.PrimType)]
    shapes = [each.ty.shape for each in function.params if each not in numbers]
    known = {each for shape in shapes for size in shape for each in tirx.analysis.undefined_vars(size)}
    return any(each not in known for each in numbers)


def _scheduled_for_gpu(module: IRModule) -> IRModule:
    """Give every loop nest that is not scheduled yet to the threads of a GPU."""
    dlight = tvm.s_tir.dlight
    rules = dlight.gpu
    return dlight.ApplyDefaultSchedule(
        rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction(), rules.Fallback()
    )(module)
