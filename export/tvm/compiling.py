"""From a module of Relax to code: operators become loops, loops are scheduled, memory is planned."""

from __future__ import annotations

from typing import Any

from grape_compile.errors import EngineError, first_line
from grape_compile.export.tvm.importing import MAIN
from grape_compile.kernels.tensorir.engine import IRModule, Target, is_gpu, relax, tvm


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
        rules.FoldConstant(),
        rules.FuseOps(),
        rules.FuseTIR(),
        rules.DeadCodeElimination([MAIN]),
    ]
    try:
        with target:
            module = tvm.transform.Sequential(passes)(module)
            if is_gpu(target):
                module = _scheduled_for_gpu(module)
        return relax.build(module, target, relax_pipeline="default_build")
    except Exception as failure:
        raise EngineError(f"code for {target.kind.name}", first_line(failure), "another target") from failure


def _scheduled_for_gpu(module: IRModule) -> IRModule:
    """Give every loop nest that is not scheduled yet to the threads of a GPU."""
    from tvm.s_tir import dlight

    rules = dlight.gpu
    return dlight.ApplyDefaultSchedule(
        rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction(), rules.Fallback()
    )(module)
