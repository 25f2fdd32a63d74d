"""What the interpreter takes, the compiler may refuse: the cases of the tests, compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import CASES

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def compiled(folder: Path, *names: str) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(ROOT / "tests" / "compiled_attention.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: row for line in done.stdout.splitlines() for name, row in json.loads(line).items()}


def test_cases_with_most_in_them_compile(tmp_path: Path) -> None:
    found = compiled(tmp_path, "together", "lowest_numbers")
    assert all(set(row) == {"forward", "by_query", "by_key"} for row in found.values())
    assert set(found) == {"together", "lowest_numbers"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_case_compiles(tmp_path: Path) -> None:
    """A few registers may go to the stack in tiles of float32 and of heads that are no power of two."""
    found = compiled(tmp_path)
    assert found.keys() >= CASES.keys()
    assert max(stack for row in found.values() for stack in row.values()) <= 64
