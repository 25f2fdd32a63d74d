"""`tune` with real compilers and processes: a layer, a model, what a crash costs, kills, a fleet, its messages."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm")

from tvm_stand_ins import small

from grape_compile.encoding import alibi, grape_m, rope
from grape_compile.errors import EngineError, GrapeError
from grape_compile.export.tvm.operators import Operators
from grape_compile.kernels.tensorir.bench import Library, device_here, library_ending
from grape_compile.kernels.tensorir.engine import to_target
from grape_compile.kernels.tensorir.linear import linear
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.kernels.tensorir.replay import Recorded, version_text
from grape_compile.records import Log, Place, Winner, read_log
from grape_compile.records.trials import candidate_key
from grape_compile.tuning import Progress, Shape, TuningReport, tune
from grape_compile.tuning.fleet import Fleet
from grape_compile.tuning.running import Processes, Runner
from grape_compile.tuning.tasks import found_in, of_encoding, of_model
from grape_compile.tuning.workloads import Program

LAYER = Shape(1, 128, 2, 2, 64, torch.float32)
TARGET = to_target("llvm")


def children() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuningReport, list[Progress], set[int]]:
    """Four trials of a rotation: the directory, the report, what was told, and processes that were left."""
    told: list[Progress] = []
    directory, before = tmp_path_factory.mktemp("records"), children()
    report = tune(rope(64), [LAYER], target="llvm", trials=4, records=directory, jobs=1, progress=told.append)
    return directory, report, told, children() - before


def test_four_trials_find_a_verified_winner(
    tuned: tuple[Path, TuningReport, list[Progress], set[int]],
) -> None:
    directory, report, told, left = tuned
    (task,) = report.tasks
    assert task.winner is not None
    assert task.winner.error <= task.winner.allowed
    assert (task.tried, task.recorded, task.failed, task.share) == (4, 0, 0, 1.0)
    assert [(each.done, each.trials) for each in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    held = read_log(directory)
    assert (len(held.trials), held.winners, held.problems) == (4, (task.winner,), ())
    assert os.listdir(directory) == ["trials.jsonl"]
    assert not left
    assert "x as fast as untuned" in str(report)


def test_a_replay_measures_nothing(
    tuned: tuple[Path, TuningReport, list[Progress], set[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, report, _, _ = tuned
    again = tune(rope(64), [LAYER], target="llvm", trials=4, records=directory)
    assert again.tasks[0].winner == report.tasks[0].winner
    assert (again.tasks[0].tried, again.tasks[0].recorded) == (0, 4)
    (work,) = of_encoding(rope(64), [LAYER], TARGET).workloads
    recorded = Recorded(TARGET, directory)
    assert report.tasks[0].winner is not None
    assert recorded.point(lambda sizes: (work.task, work.space)) == report.tasks[0].winner.candidate
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_what_cannot_be_compiled_or_run_costs_itself(tmp_path: Path) -> None:
    work = small()
    with Runner(str(TARGET), tmp_path, None, 1, 60) as runner:
        arguments = runner.save(work.arguments(work.draw(0)))
        broken, library = runner.build([Program("{", "rotate", ""), work.program(work.candidates[0])])
        assert isinstance(broken, str)
        assert broken.startswith("it cannot be compiled")
        assert isinstance(library, Library)
        outcomes = dict(runner.measure([Library(library.path, "no such function"), library], arguments))
        assert outcomes[0].failure.startswith("it does not run")
        assert min(outcomes[1].seconds) > 0
    assert not list(tmp_path.iterdir())


def test_a_process_that_hangs_or_crashes_is_followed_by_another() -> None:
    before, processes = children(), Processes(1, ready=int)
    first = processes.submit(processes.call, 60, os.getpid).result()
    with pytest.raises(TimeoutError, match="not done after 1 seconds"):
        processes.submit(processes.call, 1, time.sleep, 60).result()
    with pytest.raises(ChildProcessError):
        processes.submit(processes.call, 60, os._exit, 1).result()
    assert processes.submit(processes.call, 60, os.getpid).result() != first
    processes.close()
    assert children() == before


class Rotating(nn.Module):
    """Two layers of rotated queries and keys, the keys with fewer heads."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        angles = torch.arange(query.shape[2])[:, None] * self.inv_freq
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        scores = []
        for layer in (1, 2):
            q, k = (
                x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin for x in (layer * query, layer * key)
            )
            heads = (q, k, key)
            scores.append(nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True))
        return torch.cat(scores)


def test_a_model_is_taken_apart_into_its_distinct_operators() -> None:
    found = of_model(Rotating(), (torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)), {}, TARGET)
    counted = [(each.task.operator, each.task.sizes.split("]")[0], each.count) for each in found.workloads]
    assert counted == [
        ("rotate", "x[1,4,8,16", 2),
        ("rotate", "x[1,2,8,16", 2),
        ("attend", "query[1,4,8,16", 2),
    ]
    assert found.left_out == ()


def test_an_encoding_is_tuned_in_a_layer() -> None:
    (attend,) = of_encoding(alibi(2), [LAYER], TARGET).workloads
    assert attend.task.operator == "attend"
    assert "causal" in attend.task.sizes
    nothing = of_encoding(grape_m(64, basis="basis"), [LAYER], TARGET)
    assert nothing.workloads == ()
    assert "basis" in nothing.left_out[0]


def test_products_with_weights_are_tuned_on_a_cpu(tmp_path: Path) -> None:
    """Layers of the same sizes are one task, whose programs keep the contract, and whose winner is built."""
    model, x = (
        nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 7, bias=False)),
        torch.randn(2, 3, 24),
    )
    works = of_model(model, (x,), {}, TARGET).workloads
    assert [(str(each.task), each.count) for each in works] == [
        ("linear nope x[6,24]:float32 weight[24,24]:float32 bias[24]:float32 float32", 2),
        ("linear nope x[6,24]:float32 weight[7,24]:float32 float32", 1),
    ]
    inputs = works[0].draw(1)
    result = works[0].define(inputs)
    error, allowed = works[0].error(result, inputs)
    assert error <= allowed
    chosen = works[0].candidates[1]
    with Log(tmp_path) as log:
        place = Place(device_here(str(TARGET)), str(TARGET), version_text())
        program = works[0].program(chosen).hash
        log.append(Winner(works[0].task, place, chosen, program, 1e-6, 2e-6, error, allowed, 2))
    recorded = Recorded(TARGET, tmp_path)
    operators = Operators(TARGET, recorded)
    operands = Operand(("rows", 24)), Operand((24, 24)), Operand((24,))
    assert str(operators._layer(*operands)) == str(linear(*operands, TARGET, chosen))
    assert [each.operator for each in recorded.used] == ["linear"]
    with pytest.raises(GrapeError, match="no product with weights"):
        found_in(model, (x,), {}, to_target("nvidia/nvidia-a100"))


@pytest.mark.parametrize("encoding", [rope(64), alibi(2)], ids=str)
def test_the_definition_is_what_untuned_programs_compute(encoding: Any, tmp_path: Path) -> None:
    """The judge of winners passes the program by hand, and fails it when one value is off."""
    (work,) = of_encoding(encoding, [LAYER], TARGET).workloads
    inputs = work.draw(1)
    result = work.define(inputs)
    error, allowed = work.error(result, inputs)
    assert error <= allowed
    result[..., 0] *= 1.001
    error, allowed = work.error(result, inputs)
    assert error > allowed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": "nvidia/nvidia-h1000"}, "nvidia/nvidia-h100"),
        ({"target": "raspberry-pi/4b-aarch64"}, "on this machine"),
        ({"trials": 0}, "at least one trial"),
        ({"tracker": "somewhere"}, "address and port"),
        ({"tracker": "127.0.0.1:1"}, "python -m tvm.exec.rpc_tracker"),
        ({"model_or_encoding": nn.ReLU(), "args": (torch.ones(1, 2),)}, "no position encoding"),
        ({"model_or_encoding": 3}, "torch.nn.Module"),
        ({"model_or_encoding": grape_m(64, basis="basis")}, "basis"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    given: dict[str, Any] = {
        "model_or_encoding": rope(64),
        "args": [LAYER],
        "target": "llvm",
        "trials": 4,
    } | change
    with pytest.raises(GrapeError, match=sentence):
        tune(**given, records=tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_programs_for_a_gpu_want_a_fleet_without_one(tmp_path: Path) -> None:
    with pytest.raises(GrapeError, match="tracker="):
        tune(rope(64), [LAYER], target="nvidia/nvidia-h100", trials=4, records=tmp_path)


def test_libraries_are_linked_where_the_linker_is() -> None:
    phone = {"kind": "llvm", "mtriple": "aarch64-linux-android", "mattr": ["+neon"]}
    assert library_ending(str(TARGET), is_here=True) == ".so"
    assert library_ending(str(to_target("raspberry-pi/4b-aarch64")), is_here=False) == ".tar"
    assert library_ending(str(to_target(phone)), is_here=False) == ".so"


def test_without_tvm_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from grape_compile.kernels.tensorir import engine

    monkeypatch.setattr(engine, "_installed", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install .*apache-tvm"):
        engine.check_installation()


_CHILD = """
import sys, torch
from grape_compile.encoding import rope
from grape_compile.tuning import Shape, tune
layer = Shape(1, 128, 2, 2, 64, torch.float32)
tune(rope(64), [layer], target="llvm", trials=28, records=sys.argv[1], jobs=1)
"""


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    """Killed at random moments ten times, from the start of the process on: no finished trial is lost or repeated."""
    draws, before = random.Random(0), 0
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            time.sleep(draws.uniform(3, 16))
            process.kill()
        held = read_log(tmp_path)
        keys = [candidate_key(each.candidate) for each in held.trials]
        assert len(keys) == len(set(keys)) >= before
        before = len(keys)
        Log(tmp_path).close()
    report = tune(rope(64), [LAYER], target="llvm", trials=28, records=tmp_path, jobs=1)
    assert report.tasks[0].winner is not None
    assert report.tasks[0].recorded >= before
    assert len(read_log(tmp_path).trials) == 28
    assert os.listdir(tmp_path) == ["trials.jsonl"]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _started(module: str, *words: str) -> subprocess.Popen[bytes]:
    port = _port()
    command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", *words]
    command += ["--port", str(port), "--port-end", str(port + 1)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    process.port = port  # type: ignore[attr-defined]  # carried along for the test
    return process


@contextmanager
def loopback(servers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A tracker and servers on this machine; all of their processes end with the test."""
    running = [_started("rpc_tracker")]
    address = f"127.0.0.1:{running[0].port}"  # type: ignore[attr-defined]  # set above
    try:
        running += [_started("rpc_server", "--tracker", address, "--key", "here") for _ in range(servers)]
        end = time.monotonic() + 120
        while True:
            try:
                if len(Fleet(address, "here")) == servers:
                    break
            except GrapeError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.3)
        yield address, running[1:]
    finally:
        for each in running:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()


@pytest.mark.slow
def test_a_fleet_loses_a_device_and_finds_what_one_machine_finds(tmp_path: Path) -> None:
    """Two servers share the trials; one is killed in the middle, and no trial is lost or failed."""
    with loopback(2) as (address, servers):

        def killing(step: Progress) -> None:
            if step.done == 12:
                os.killpg(servers[0].pid, signal.SIGKILL)

        with pytest.raises(GrapeError, match=r"here \(2\)"):
            Fleet(address, "elsewhere")
        report = tune(
            rope(64), [LAYER], target="llvm", trials=28, records=tmp_path / "fleet", tracker=address,
            jobs=1, progress=killing,
        )  # fmt: skip
        assert len(report.servers) == 2
        assert report.place.device.startswith("here, ")
        (task,) = report.tasks
        assert (task.tried, task.failed) == (28, 0)
        os.killpg(servers[1].pid, signal.SIGKILL)
        with pytest.raises(GrapeError, match=r"servers by key|none is left"):
            tune(
                alibi(2),
                [LAYER],
                target="llvm",
                trials=2,
                records=tmp_path / "none",
                tracker=address,
                key="here",
            )
    local = tune(rope(64), [LAYER], target="llvm", trials=28, records=tmp_path / "local", jobs=1)
    assert task.winner is not None
    assert local.tasks[0].winner is not None
    # The same candidates on the same CPU: their ratios to the untuned program, each measured side by side.
    ratios = [each.seconds / each.untuned for each in (task.winner, local.tasks[0].winner)]
    assert max(ratios) <= 1.5 * min(ratios)
