"""The winners that come with the package are of programs as they are written now."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tvm")

from grape_compile.encoding import Encoding
from grape_compile.kernels.tensorir.engine import to_target
from grape_compile.kernels.tensorir.replay import SHIPPED, Recorded, version_text
from grape_compile.records.log import read_file
from grape_compile.tuning import Shape
from grape_compile.tuning.shipping import layers
from grape_compile.tuning.tasks import of_encoding

HELD = read_file(SHIPPED)


def test_every_line_is_a_winner() -> None:
    assert HELD.winners
    assert (HELD.trials, HELD.problems) == ((), ())
    assert {each.place.versions for each in HELD.winners} == {version_text()}
    assert all(each.seconds <= each.untuned for each in HELD.winners)


@pytest.mark.parametrize(("encoding", "shape"), layers(), ids=str)
def test_a_common_layer_is_replayed_on_the_cpu_it_was_tuned_for(encoding: Encoding, shape: Shape) -> None:
    """Where this fails, programs are written differently now: `make tvm-defaults` tunes them again."""
    (text,) = {each.place.target for each in HELD.winners}
    target = to_target(json.loads(text))
    (work,) = of_encoding(encoding, [shape], target).workloads
    recorded = Recorded(target, device="any")
    point = recorded.point(lambda sizes: (work.task, work.space))
    assert recorded.problems == []
    assert recorded.used[work.task].candidate == point
    elsewhere = Recorded(to_target({"kind": "llvm", "mcpu": "skylake"}), device="any")
    assert elsewhere.point(lambda sizes: (work.task, work.space)) == dict(work.space.hand)
