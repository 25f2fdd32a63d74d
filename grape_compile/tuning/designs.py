"""The spaces of programs as MetaSchedule takes them: a block without a program, and every program for it as a design.

A schedule turns loops into other loops, and no schedule makes online softmax of them; but it may replace a block by a
tensor intrinsic (Feng et al., TensorIR, 2022, 4.1). So each point of a space is the intrinsic of one block that
stands for the whole operator. What MetaSchedule draws, builds, measures and keeps is a choice of the intrinsic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from grape_compile.encoding import Encoding
from grape_compile.kernels.tensorir import engine
from grape_compile.kernels.tensorir.space import Point, Space
from grape_compile.records import Task
from grape_compile.tuning.tasks import found_in


@dataclass(frozen=True)
class DesignSpace:
    """One operator for `meta_schedule.tune_tir(each.module, each.target, ..., space=each.generator)`.

    `module` has one function, whose block calls what is nowhere: it can be compiled when a design has been chosen.
    `generator` gives `most` designs, the program by hand and others drawn at random, all where `most` is None. TVM
    knows programs of this process by their text: another one that made the same space replays a database.
    """

    task: Task
    target: engine.Target
    space: Space
    most: int | None = None

    @cached_property
    def module(self) -> engine.IRModule:
        """The function without a program."""
        return engine.module_of({self.space.name: engine.without_program(self._hand, self.space.name)})

    @cached_property
    def generator(self) -> Any:
        """What tells MetaSchedule of the designs."""
        return engine.s_tir.meta_schedule.space_generator.ScheduleFn(self._designs, [], [], {})

    @cached_property
    def intrinsics(self) -> Mapping[str, Point]:
        """The names of the designs and what they are; each program is there once."""
        points = self.space.candidates()
        if self.most is not None:
            points = (points[0], *Random(str(self.task)).sample(points[1:], min(self.most, len(points)) - 1))
        found: dict[str, Point] = {}
        for point in points:
            found.setdefault(engine.as_intrinsic(self.space.write(point), self.space.name), point)
        return found

    def point(self, schedule: Any) -> Point:
        """Return what a schedule made of the operator."""
        chosen = [str(each.attrs[0]) for each in schedule.trace.insts if str(each.kind.name) == "Tensorize"]
        return self.intrinsics[chosen[-1]]

    @cached_property
    def _hand(self) -> engine.PrimFunc:
        return self.space.write(self.space.hand)

    def _designs(self, schedule: Any) -> list[Any]:
        (function,) = (str(each.name_hint) for each in schedule.mod.get_global_vars())
        designs = []
        for name in self.intrinsics:
            design = schedule.copy()
            design.tensorize(design.get_sblock(self.space.name, func_name=function), name)
            designs.append(design)
        return designs


def design_spaces(
    model_or_encoding: nn.Module | ExportedProgram | Encoding,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Mapping[str, Any],
    most: int | None = None,
) -> tuple[DesignSpace, ...]:
    """Return the operators of a model, or of layers with an encoding, for MetaSchedule; arguments are those of `tune`.

    Of each space `most` programs are taken, all by default. Raises as `tune` does.
    """
    place = engine.to_target(target)
    found = found_in(model_or_encoding, args, kwargs or {}, place)
    return tuple(DesignSpace(each.task, place, each.space, most) for each in found.workloads)
