"""The tuner without a GPU: spaces, what is dropped before it runs, records, and refusing to time nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import DEVICE

from grape_compile.encoding import (
    Accumulated,
    Compose,
    Half,
    Learned,
    Pairs,
    Positions,
    Rotation,
    alibi,
    fox,
    grape_ap,
    rope,
)
from grape_compile.errors import GrapeError
from grape_compile.kernels import configuration as configurations
from grape_compile.kernels.ahead import Usage
from grape_compile.kernels.configuration import (
    Configuration,
    configuration_for,
    default_configuration,
    source_hash,
)
from grape_compile.kernels.path_configurations import KERNELS
from grape_compile.kernels.tunable import Case
from grape_compile.records import Key, read, write
from grape_compile.tuning import Shape, tune_kernels
from grape_compile.tuning import kernels as tuner
from grape_compile.tuning.kernels import all_cases, search, unfit

LAYER = Shape(4, 4096, 32, 8, 128)
KEY = Key("a GPU", "9.0", "3.7.1", "abc")
FITS = Usage(48, 0, 0, 0, "", 1000, {}, (), {"128": 8}, {"128": 8})


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the compiler, which does not run where kernels are interpreted: wide programs of one warp spill."""
    seen: list[str] = []

    def usage(launch: Any, capability: int) -> Usage:
        seen.append(launch.function.__name__)
        planes = launch.arguments["BLOCK"] * launch.arguments["WIDTH"] / (32 * launch.options["num_warps"])
        return Usage(**{**asdict(FITS), "stack": 1024 if planes > 16 else 0})

    monkeypatch.setattr(tuner, "usage", usage)
    return seen


def by_block(case: Case, configuration: Mapping[str, Any]) -> float:
    """Stands for the GPU: the fewer tokens and the more heads a program has, the faster it is."""
    return 10.0 + int(configuration["block"]) - int(configuration["group"])


def test_spaces_fit_the_shape() -> None:
    (forth, back) = all_cases([LAYER])
    assert forth.name == "turn planes=half(128) angles=positions bits=16 many"
    assert back.name == "back planes=half(128) angles=positions bits=16 many"
    assert len(forth.space) > 20
    assert {each["group"] for each in back.space} == {1}
    (decode, _) = all_cases([Shape(8, 1, 32, 8, 128)])
    assert decode.name.endswith("few")
    assert {each["block"] for each in decode.space} == {8}
    (narrow, _) = all_cases([Shape(1, 4096, 2, 1, 128)])
    assert max(each["group"] for each in narrow.space) == 2


def test_biases_tune_the_kernels_of_attention() -> None:
    cases = all_cases([LAYER, Shape(8, 3000, 32, 8, 128)], [alibi(32), Compose((rope(128), fox()))])
    assert [case.name for case in cases if case.name.startswith("attention")] == [
        f"attention {kernel} {kind} bfloat16 128 128 x4 4096 causal"
        for kind in ("steps", "clock")
        for kernel in ("forward", "by_query", "by_key")
    ]
    assert [case.name for case in cases if case.name.startswith("decode")] == [
        f"decode 1 x {keys} {kind} bfloat16 128 128 x4 4096"
        for keys in (32, 64)
        for kind in ("steps", "clock")
    ]
    shared = [case for case in cases if case.name.startswith(("attention", "decode"))]
    assert all(case.default(90) in case.space for case in shared)


def test_each_case_is_tuned_once_and_unknown_encodings_not_at_all() -> None:
    assert len(all_cases([LAYER, LAYER, Shape(8, 8192, 32, 8, 128)])) == 2
    paths = all_cases([LAYER], [grape_ap(32, 8)])
    assert [case.name.split()[:2] for case in paths[:-1]] == [["path", kernel] for kernel in KERNELS]
    assert paths[-1].name == "decode 1 x 32 logsigmoid bfloat16 128 128 8 x4 4096"
    assert all(case.default(90) in case.space for case in paths)
    assert all_cases([LAYER], [Compose((grape_ap(32, 8), fox()))]) == []
    encodings = [rope(128), Rotation(Half(128), Learned("theta"), Accumulated("rates", True))]
    assert {case.name.split()[2] for case in all_cases([LAYER], encodings)} == {
        "angles=steps",
        "angles=exact",
    }


IRREGULAR = Rotation(Pairs(((0, 3), (5, 1)), 16), Learned("t"), Positions("n"))


@pytest.mark.parametrize("encoding", [rope(16), IRREGULAR], ids=str)
def test_every_configuration_of_a_space_launches(encoding: Rotation) -> None:
    """Each one computes: none asks for a block of no tokens, or for heads that are not there."""
    for case in all_cases([Shape(1, 5, 3, 1, 16, torch.float32)], [encoding]):
        for configuration in case.space:
            case.launch(configuration, torch.device(DEVICE)).run()


def test_the_best_is_kept_and_the_rest_dropped(tmp_path: Path, compiled: list[str]) -> None:
    path = tmp_path / "records.json"
    report = search(all_cases([LAYER]), KEY, 90, path, by_block)
    forth, back = report.cases
    assert compiled.count("turn") == len(all_cases([LAYER])[0].space)
    assert forth.dropped["it spills more than 512 bytes"] > 0
    assert forth.timed + sum(forth.dropped.values()) == len(all_cases([LAYER])[0].space)
    assert (forth.configuration["block"], forth.configuration["group"]) == (8, 8)
    assert forth.microseconds < forth.default_microseconds
    assert back.configuration["group"] == 1
    assert "best of" in str(report)
    assert str(path) in str(report)
    held = read(path, KEY).cases[forth.case]
    assert Configuration.of(held) == Configuration(**forth.configuration)


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, compiled: list[str]) -> None:
    path = tmp_path / "records.json"
    cases = all_cases([LAYER])

    def stops(case: Case, configuration: Mapping[str, Any]) -> float:
        if case.name.startswith("back"):
            raise KeyboardInterrupt
        return by_block(case, configuration)

    with pytest.raises(KeyboardInterrupt):
        search(cases, KEY, 90, path, stops)
    compiled.clear()
    report = search(cases, KEY, 90, path, by_block)
    assert [tuned.from_record for tuned in report.cases] == [True, False]
    assert set(compiled) == {"turn_back"}
    again = search(cases, KEY, 90, path, by_block, fresh=True)
    assert not any(tuned.from_record for tuned in again.cases)


def test_no_configuration_is_worse_than_the_default(tmp_path: Path, compiled: list[str]) -> None:
    best = asdict(default_configuration(64))
    report = search(
        all_cases([LAYER])[:1], KEY, 90, tmp_path / "r.json", lambda _, each: 1.0 if each == best else 2.0
    )
    assert report.cases[0].configuration == best


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"stack": 8}, ""),
        ({"stack": 1024}, "spills"),
        ({"shared": 300_000}, "shared memory"),
        ({"registers": 255}, "registers"),
    ],
)
def test_what_is_not_worth_running(changed: dict[str, int], why: str) -> None:
    told = unfit(Usage(**{**asdict(FITS), **changed}), {"warps": 16}, 90)
    assert (why in told) if why else not told


@pytest.mark.parametrize(
    "change",
    [{"block": 3}, {"warps": "4"}, {"warps": 64}, {"group": True}, {"group": 0}, {"block": None}],
    ids=str,
)
def test_a_row_that_no_kernel_can_have_is_not_used(change: dict[str, Any]) -> None:
    row = {"block": 16, "group": 4, "warps": 4}
    assert Configuration.of(row) == Configuration(16, 4, 4)
    assert Configuration.of(row | change) is None
    assert Configuration.of({}) is None


def test_records_are_looked_up_and_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reads the file once; a foreign one is told of once, and what is shipped runs."""
    path, device = tmp_path / "records.json", torch.device("cuda", 0)
    write(path, KEY, {"case": {"block": 64, "group": 2, "warps": 8}})
    monkeypatch.setenv(configurations.VARIABLE, str(path))
    monkeypatch.setattr(configurations, "key_of", lambda device: KEY)
    monkeypatch.setattr(configurations, "capability_of", lambda device: 90)
    configurations.forget_records()
    try:
        assert configuration_for("case", 64, device) == Configuration(64, 2, 8)
        assert configuration_for("other", 64, device) == default_configuration(64, 90)
        path.unlink()
        assert configuration_for("case", 64, device) == Configuration(64, 2, 8)
        write(
            path, Key("another GPU", "9.0", "3.7.1", "abc"), {"case": {"block": 64, "group": 2, "warps": 8}}
        )
        configurations.forget_records()
        with pytest.warns(UserWarning, match="another GPU"):
            assert configuration_for("case", 64, device) == default_configuration(64, 90)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            configuration_for("case", 64, device)
    finally:
        configurations.forget_records()


def test_every_known_kind_of_gpu_has_a_default() -> None:
    assert [default_configuration(64, at) for at in (70, 80, 86, 89, 90, 100, 120)] == [
        Configuration(16, 4, 4)
    ] * 7
    assert [default_configuration(64, at, "back") for at in (70, 89, 90, 120)] == [
        *[Configuration(8, 1, 4)] * 2,
        *[Configuration(16, 1, 8)] * 2,
    ]


def test_another_kernel_is_another_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels of other text make old records foreign."""
    (tmp_path / "turn.py").write_text("a kernel")
    monkeypatch.setattr(configurations, "files", lambda package: tmp_path)
    first = source_hash.__wrapped__()
    (tmp_path / "turn.py").write_text("a better kernel")
    assert source_hash.__wrapped__() != first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_a_gpu_nothing_is_timed(device: str, tmp_path: Path) -> None:
    with pytest.raises(GrapeError, match="no CUDA device"):
        tune_kernels([LAYER], records=tmp_path / "r.json", device=device)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tuning_on_a_gpu(tmp_path: Path) -> None:
    report = tune_kernels([Shape(1, 256, 4, 2, 64)], records=tmp_path / "r.json")
    assert all(0 < tuned.microseconds <= tuned.default_microseconds for tuned in report.cases)
