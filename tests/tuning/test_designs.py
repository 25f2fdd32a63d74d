"""Our spaces searched by MetaSchedule: what it draws is built, computes what it must, and is found again."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("tvm")

from grape_compile.encoding import Encoding, alibi, rope
from grape_compile.kernels.tensorir import engine
from grape_compile.tuning import DesignSpace, Shape, design_spaces
from grape_compile.tuning.tasks import of_encoding
from grape_compile.tuning.workloads import tensor_of

LAYER = Shape(1, 40, 2, 2, 16, torch.float32)
ms = engine.s_tir.meta_schedule


def drawn(space: DesignSpace, number: int) -> list[Any]:
    """Schedules as a search of MetaSchedule draws them."""
    # TVM's own intrinsics take half a minute to be read, and no design is one of them.
    with patch.dict(sys.modules, {"tvm.s_tir.tensor_intrin": ModuleType("tensor_intrin")}):
        context = ms.TuneContext(
            mod=space.module[space.space.name],
            target=space.target,
            space_generator=space.generator,
            search_strategy="replay-trace",
            rand_state=1,
            num_threads=1,
        )
    context.pre_tuning(number, number, context.generate_design_space())
    return [each.sch for each in context.generate_measure_candidates()]


def check(module: Any, encoding: Encoding, space: DesignSpace) -> None:
    """Hold a program to the contract of a winner."""
    (work,) = (
        each for each in of_encoding(encoding, [LAYER], space.target).workloads if each.task == space.task
    )
    inputs = work.draw(0)
    values = [engine.device_tensor(each) for each in work.arguments(inputs)]
    (name,) = (str(each.name_hint) for each in module.get_global_vars())
    engine.compile_module(module, space.target)[name](*values)
    error, allowed = work.error(tensor_of(values[-1].numpy()), inputs)
    assert error <= allowed


@pytest.mark.parametrize("encoding", [rope(16), alibi(2)], ids=["rope", "alibi"])
def test_what_metaschedule_draws_is_a_program_of_the_space(encoding: Encoding, tmp_path: Path) -> None:
    (space,) = design_spaces(encoding, [LAYER], target="llvm", most=4)
    schedules = drawn(space, 4)
    points = [dict(space.point(each)) for each in schedules]
    assert all(each in space.space.candidates() for each in points)
    assert len({str(each) for each in points}) > 1
    for schedule in schedules[:2]:
        check(schedule.mod, encoding, space)
    # A database that another process fills names the same programs.
    paths = [str(tmp_path / each) for each in ("workloads.json", "records.json")]
    base = ms.tune_context._normalize_mod(space.module)
    with_records = ms.database.JSONDatabase(*paths)
    workload = with_records.commit_workload(base)
    with_records.commit_tuning_record(
        ms.database.TuningRecord(schedules[0].trace, workload, [1e-3], space.target, None)
    )
    found = ms.database.JSONDatabase(*paths, allow_missing=False).query_schedule(base, space.target, "main")
    assert found is not None
    assert space.point(found) == points[0]
    engine.tvm.ir.assert_structural_equal(found.mod, schedules[0].mod)


def test_the_operator_alone_cannot_be_compiled_by_mistake() -> None:
    (space,) = design_spaces(rope(16), [LAYER], target="llvm", most=1)
    assert list(space.intrinsics.values()) == [space.space.hand]
    assert "no design was chosen" in space.module.script()


def test_designs_for_a_gpu_are_kernels() -> None:
    (space,) = design_spaces(alibi(2), [LAYER], target="nvidia/nvidia-a100", most=2)
    for schedule in drawn(space, 2):
        assert "__global__" in engine.cuda_source(engine.compile_module(schedule.mod, space.target))


@pytest.mark.slow
def test_metaschedule_tunes_an_operator(tmp_path: Path) -> None:
    (space,) = design_spaces(rope(16), [LAYER], target="llvm", most=4)
    found = ms.tune_tir(
        space.module,
        space.target,
        str(tmp_path),
        max_trials_global=2,
        space=space.generator,
        strategy="replay-trace",
        builder=ms.builder.LocalBuilder(max_workers=1, timeout_sec=300.0),
        num_tuning_cores=1,
        seed=1,
    )
    schedule = found.query_schedule(ms.tune_context._normalize_mod(space.module), space.target, "main")
    assert schedule is not None
    check(schedule.mod, rope(16), space)
