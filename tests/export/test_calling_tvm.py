"""Tuned functions of TVM in graphs that torch.compile made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attention_layers import BiasedAttention, example
from bias_spellings import distance_then_masked_fill
from torch.utils.dlpack import from_dlpack

pytest.importorskip("tvm")

from grape_compile import grape_compile, report
from grape_compile.export.tvm import calling
from grape_compile.tuning import tune

TUNED = "grape::attend by TVM, tuned"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    tune(
        BiasedAttention(distance_then_masked_fill).eval(),
        (example(),),
        target="llvm",
        trials=1,
        records=folder,
    )
    return folder


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is timed first, the function behind it."""
    times: Iterator[float] = iter((2.0, 1.0))
    monkeypatch.setattr(calling, "_seconds", lambda run: (run(), next(times))[1])


@pytest.mark.slow
@pytest.mark.usefixtures("faster")
def test_a_graph_calls_what_is_faster_and_none_with_gradients(records: Path) -> None:
    x, layer = example(), BiasedAttention(distance_then_masked_fill).eval()
    with torch.no_grad():
        expected = layer(x)
    grape_compile(layer, backend="eager", options={"tvm": records})
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, expected)
    assert [site.lowering for site in report(layer).sites if site.kind == "bias"] == [TUNED]
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.slow
def test_what_is_slower_or_not_on_record_is_left(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((1.0, 2.0))
    monkeypatch.setattr(calling, "_seconds", lambda run: next(times))
    for folder in (records, tmp_path):
        layer = grape_compile(
            BiasedAttention(distance_then_masked_fill).eval(), backend="eager", options={"tvm": folder}
        )
        with torch.no_grad():
            layer(example())
        assert TUNED not in {site.lowering for site in report(layer).sites}


def test_tensors_are_shared_and_those_that_lie_otherwise_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def double(x: object, y: object) -> None:
        seen.append(from_dlpack(x).data_ptr())
        from_dlpack(y).copy_(from_dlpack(x) * 2)

    monkeypatch.setattr(calling, "_functions", [double])
    whole = torch.arange(65.0)
    for x, is_shared in ((whole[:64], True), (whole[1:], False), (whole[:64].view(8, 8).t(), False)):
        torch.testing.assert_close(torch.ops.grape.tuned([x], list(x.shape), 0), x * 2)
        assert (seen[-1] == x.data_ptr()) == is_shared
