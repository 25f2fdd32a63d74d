"""Kernels keep to what they needed when their table was written, on three GPUs that need not be there."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from grape_compile.kernels.gates import CAPABILITIES, KernelGate, breaches, gates, regressions

ROOT = Path(__file__).parents[2]
TABLE = json.loads(Path(__file__).with_name("gates.json").read_text())
GATES = {gate.name: gate for gate in gates()}


@cache
def compiled(capability: int) -> dict[str, Any]:
    """What a process of its own measures: here kernels may be loaded for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "grape_compile.kernels.gates", "--capability", str(capability)]
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_gate_is_in_the_table() -> None:
    assert sorted(TABLE["gates"]) == sorted(GATES)
    assert all(set(row) == set(map(str, CAPABILITIES)) for row in TABLE["gates"].values())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [90, *(pytest.param(at, marks=pytest.mark.slow) for at in (80, 100))])
def test_gates(capability: int) -> None:
    table, told = compiled(capability), []
    for name, row in table["gates"].items():
        found, kept = row[str(capability)], TABLE["gates"][name][str(capability)]
        told += [f"{name}: {each}" for each in breaches(GATES[name], found, capability)]
        # Another compiler makes another table; what is promised without one holds all the same.
        if table["triton"] == TABLE["triton"]:
            told += [f"{name}: {each}" for each in regressions(found, kept)]
    assert not told
    assert set(table["gates"]) == set(GATES)


def usage(**changed: Any) -> dict[str, Any]:
    plain = {
        "registers": 40,
        "stack": 0,
        "shared": 1024,
        "tensor_memory": 0,
        "matrix": "HMMA",
        "instructions": 300,
        "kinds": {"matrix": 8},
        "loops": [{"instructions": 100, "matrix": 8}],
        "loads": {"128": 4},
        "stores": {"128": 2},
    }
    return plain | changed


STRICT = KernelGate(
    "strict", lambda capability: pytest.fail("not built"), registers=48, wide=True, matrix=True
)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, None),
        ({"stack": 16}, "spills"),
        ({"kinds": {"local": 2}}, "spills"),
        ({"kinds": {"atomic": 1}}, "atomics"),
        ({"registers": 49}, "more than 48"),
        ({"matrix": ""}, "matrix instruction missing"),
        ({"tensor_memory": 1024}, "tensor memory"),
        ({"shared": 240_000}, "shared memory"),
        ({"loads": {"64": 8}}, "no loads of 128 bits"),
        ({"stores": {"32": 8}}, "no stores of 128 bits"),
    ],
)
def test_a_promise_that_is_broken_is_found(changed: dict[str, Any], sentence: str | None) -> None:
    told = breaches(STRICT, usage(**changed), 90)
    assert not told if sentence is None else any(sentence in each for each in told)


def test_what_was_the_fastest_may_spill_where_it_was_timed() -> None:
    timed = replace(STRICT, timed=True)
    assert not breaches(timed, usage(stack=16), 90)
    assert any("spills" in each for each in breaches(timed, usage(stack=16), 80))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, None),
        ({"registers": 39, "instructions": 280, "loops": [{"instructions": 90, "matrix": 8}]}, None),
        ({"registers": 41}, "registers"),
        ({"shared": 2048}, "shared"),
        ({"matrix": "HGMMA"}, "HMMA -> HGMMA"),
        ({"instructions": 301}, "instructions"),
        ({"loops": [{"instructions": 101, "matrix": 8}]}, "loop 0"),
        ({"loops": [{"instructions": 100, "matrix": 8, "shuffle": 2}]}, "shuffle 0 -> 2"),
        ({"loads": {"64": 8}}, "loads"),
    ],
)
def test_a_regression_is_found(changed: dict[str, Any], sentence: str | None) -> None:
    told = regressions(usage(**changed), usage())
    assert not told if sentence is None else any(sentence in each for each in told)
